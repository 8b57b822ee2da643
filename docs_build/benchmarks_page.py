"""The benchmarks page, made of the JSON files in `benchmarks/results/`.

A file is named `<benchmark>_<hardware>_<date>.json`. Of each benchmark on each hardware the newest is shown in full and
older ones are listed. A new file needs no change here: its rows are shown under the keys they come with.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "<!-- all results -->"
HEADLINE_MARKER = "<!-- headline table -->"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_FILE = re.compile(r"(?P<benchmark>.+)_(?P<hardware>[^_]+)_(?P<date>\d{4}-\d{2}-\d{2})\.json")
_HEADLINE = "train_e2e"
_MEDIA = {"pinned": "RAM, page-locked", "page_cache": "page cache, every byte checked"}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One file."""

    benchmark: str
    slug: str
    """Hardware as in the file's name."""
    date: str
    report: Mapping[str, Any]

    @property
    def anchor(self) -> str:
        return anchor(f"{self.benchmark}_{self.slug}_{self.date}.json")


def anchor(file_name: str) -> str:
    """Where on the page a result stands, whatever its date; empty for a file that is no result."""
    match = _FILE.fullmatch(re.sub(r"\.md$", ".json", file_name))
    return f"{match['benchmark']}-{match['hardware']}".replace("_", "-") if match else ""


def read(directory: Path = RESULTS) -> list[Result]:
    """All results, by benchmark and hardware, newest first. Raises `ValueError` for a name or content that is none."""
    found = []
    for file in sorted(directory.glob("*.json")):
        match = _FILE.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file}: expected a name like train_step_nvidia-h100_2026-01-31.json.")
        report = json.loads(file.read_text())
        missing = {"command", "hardware", "commit", "rows"} - report.keys()
        if missing:
            raise ValueError(f"{file}: the report lacks {', '.join(sorted(missing))}.")
        found.append(Result(benchmark=match["benchmark"], slug=match["hardware"], date=match["date"], report=report))
    return sorted(sorted(found, key=lambda result: result.date, reverse=True), key=lambda r: (r.benchmark, r.slug))


def page(results: Sequence[Result]) -> str:
    """Markdown: a section for each benchmark on each hardware."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.benchmark, result.slug), []).append(result)
    return "\n".join(_section(newest, older) for newest, *older in groups.values())


def headline(results: Sequence[Result]) -> str:
    """End to end against the public recipe's shape: the newest run of each hardware and number of cameras."""
    blocks: dict[tuple[str, int], str] = {}
    for result in (result for result in results if result.benchmark == _HEADLINE):
        rows = result.report["rows"]
        for cameras in sorted({row.get("cameras") or 0 for row in rows}, reverse=True):
            block = _against_recipe(result, [row for row in rows if row.get("cameras") == cameras], cameras)
            if block:
                blocks.setdefault((result.slug, cameras), block)
    return "\n".join(blocks.values())


def _against_recipe(result: Result, rows: Sequence[Row], cameras: int) -> str:
    """Empty unless the run measured both sides with this number of cameras."""
    timed = [row for row in rows if row.get("samples_s")]
    recipe = [row for row in timed if row["medium"] == "recipe"]
    ours = [row for row in timed if row["medium"] != "recipe"]
    if not (recipe and ours):
        return ""
    smallest = min(row["batch"] for row in recipe)
    one = max((row for row in recipe if row["batch"] == smallest), key=lambda row: row["samples_s"])
    best = max(recipe, key=lambda row: row["samples_s"])
    lines = [
        f"**{cameras} camera{'s' if cameras > 1 else ''}, {result.report['hardware']}, {result.date}, "
        f"commit `{result.report['commit']}`**",
        "",
        "| | batch | draws | samples/s | against the recipe at batch 1 / at its best | GPU memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in [one] if one is best else [one, best]:
        lines.append(_headline_row("public recipe's shape, VLM in every step", row, one, best))
    for row in ours:
        name = f"`train`, {row['codec']}, {_MEDIA.get(row['medium'], row['medium'])}"
        if row.get("micro_batch") and row["micro_batch"] < row["batch"]:
            name += f", micro-batches of {row['micro_batch']}"
        if row.get("optimizer") not in (None, "auto"):
            name += f", {row['optimizer']}"
        if row.get("trainable") not in (None, "all"):
            name += f", {row['trainable']}"
        if row.get("compile") is False:
            name += ", layers not compiled"
        if row.get("checkpointing"):
            name += ", checkpointed"
        lines.append(_headline_row(name, row, one, best))
    return "\n".join([*lines, ""])


def _headline_row(name: str, row: Row, one: Row, best: Row) -> str:
    over_one = row.get("over_recipe_b1") or row["samples_s"] / one["samples_s"]
    over_best = row.get("over_recipe_best") or row["samples_s"] / best["samples_s"]
    ratio = f"{over_one:.1f}x / {over_best:.1f}x"
    speed = f"{row['samples_s']:.3g}"
    if row["draws"] > 1:
        speed += f" ({row['draws_s']:.3g} draws)"
    memory = "" if row.get("peak_gib") is None else f"{row['peak_gib']:.1f} GiB"
    return f"| {name} | {row['batch']} | {row['draws']} | {speed} | {ratio} | {memory} |"


def _section(result: Result, older: Sequence[Result]) -> str:
    report = result.report
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    lines = [f"### {result.benchmark}: {report['hardware']} {{ #{result.anchor} }}", ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| hardware | {report['hardware']} |", f"| date | {result.date} |"]
    lines += [f"| commit | `{report['commit']}` |", f"| command | `{_cell(report['command'])}` |"]
    lines += [f"| versions | {versions} |"] if versions else []
    lines += [f"| notes | {_cell(report['notes'])} |"] if report.get("notes") else []
    if older:
        earlier = ", ".join(f"{past.date} at `{past.report['commit']}`" for past in older)
        lines.append(f"| earlier | {earlier} |")
    return "\n".join([*lines, "", table(report["rows"]), ""])


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows that may lack keys; columns without a value are left out."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if any(_has(row.get(key)) for row in rows)]
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(_show(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _has(value: Any) -> bool:
    return value is not None and value != ""


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
