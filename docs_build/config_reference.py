"""Tables of the configs' fields, read off their source: a field's name, type and default, and the text under it.

`<!-- fields of TrainConfig -->` in a page stands for the table of that dataclass, in whichever room it stands.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "alpacache"
_MARKER = re.compile(r"<!-- fields of (\w+) -->")


def filled(markdown: str) -> str:
    """A page with its tables."""
    return _MARKER.sub(lambda match: table(match[1]), markdown) if _MARKER.search(markdown) else markdown


def table(name: str) -> str:
    """Markdown: a row a field. Raises `LookupError` for a dataclass that is not there."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for node in ast.parse(text).body if f"class {name}" in text else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *_rows(node)])
    raise LookupError(f"alpacache has no class {name}.")


def _rows(config: ast.ClassDef) -> list[str]:
    rows = []
    for field, after in zip(config.body, [*config.body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        default = "required" if field.value is None else f"`{_default(field.value)}`"
        kind = ast.unparse(field.annotation).replace("'", '"')
        cells = (f"`{field.target.id}`", f"`{kind}`", default, _text(after))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return rows


def _default(value: ast.expr) -> str:
    factory = isinstance(value, ast.Call) and next((word.value for word in value.keywords), None)
    return f"{ast.unparse(factory)}()" if factory else ast.unparse(value).replace("'", '"')


def _text(node: ast.stmt | None) -> str:
    """The string under a field."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""
