"""The how-to on adding a model family names what is there: its code runs in `test_code_blocks`."""

import re

from markdown_pages import ROOT

from alpacache.alpamayo.family import Family

PAGE = (ROOT / "docs/how-to/add-a-model.md").read_text()
MODEL = ROOT / "alpacache/alpamayo"


def test_modules_and_names_of_the_table_exist():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and ".py" in line]
    assert len(rows) >= 7
    for row in rows:
        for module in re.findall(r"`(\w+\.py)`", row):
            assert (MODEL / module).is_file(), module
        for module, name in re.findall(r"`(\w+\.py)`: `(?:\w+\.)?(\w+)`", row):
            assert re.search(rf"(class|def) {name}\b", (MODEL / module).read_text()), (module, name)
    for field in re.findall(r"`Family\.(\w+)`", PAGE):
        assert field in Family.__dataclass_fields__


def test_the_tests_it_names_exist():
    for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`(test_\w+\.py)`", PAGE):
        assert (ROOT / "tests/alpacache/alpamayo" / name).is_file(), name


def test_the_refusal_that_the_page_quotes_is_the_one_that_is_printed(tmp_path, monkeypatch, capsys):
    """Everything up to the whole way, in a fresh place; the page's own comment is the expected line."""
    from markdown_pages import blocks

    from alpacache.alpamayo import families

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    code = "\n".join(block.code for block in blocks(ROOT / "docs/how-to/add-a-model.md", "python")[:3])
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.strip() == re.search(r"print\(error\)  # (.*)", code)[1]
