"""What every benchmark shares: `--quick` and `--json`, and the report with command, hardware, commit and versions.

Full runs are kept as `benchmarks/results/<benchmark>_<hardware>_<date>.json`, with a Markdown table beside them.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("numpy", "zarr", "numcodecs", "google-crc32c", "torch", "transformers", "tensorstore", "safetensors")

Row = Mapping[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, within a minute on 2 cores; nothing is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--commit", default=commit(), help="of these files, where they are not a checkout")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the report")
    return parser


def finish(benchmark: str, rows: Sequence[Row], options: argparse.Namespace, *, hardware: str | None = None) -> None:
    """Print the rows as a table; write the report to `--json`, and after a full run to `benchmarks/results/`."""
    report = {
        "benchmark": benchmark,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "hardware": hardware or hardware_name(),
        "notes": options.note,
        "commit": options.commit,
        "versions": versions(),
        "rows": list(rows),
    }
    print(table(rows))
    text = json.dumps(report, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    if not options.quick:
        slug = re.sub("[^a-z0-9]+", "-", report["hardware"].lower()).strip("-")
        path = RESULTS / f"{benchmark}_{slug}_{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        notes = f"\n{options.note}\n" if options.note else ""
        path.with_suffix(".md").write_text(f"`{report['command']}` at {options.commit}{notes}\n\n{table(rows)}\n")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows that may lack keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(_show(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def hardware_name() -> str:
    """Processor model and number of usable cores."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name} {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The checked-out commit, with `+` if files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python and the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)
