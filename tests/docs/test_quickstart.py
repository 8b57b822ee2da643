"""The notebook: its code runs in order in one process, and does what its text says."""

import json
import subprocess
import sys

import pytest
from markdown_pages import ROOT

NOTEBOOK = ROOT / "docs/examples/quickstart.ipynb"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_its_code_is_plain_python_and_its_links_lead_somewhere():
    for number, code in enumerate(cells("code")):
        compile(code, f"cell {number}", "exec")
    for text in cells("markdown"):
        for target in [part.split(")")[0].split("#")[0] for part in text.split("](")[1:]]:
            assert (NOTEBOOK.parent / target).resolve().is_file(), target


@pytest.mark.ci
def test_a_folder_of_drives_becomes_a_trained_expert_and_a_picture(tmp_path):
    program = "\n\n".join([*cells("code"), "print(json.dumps(taken))"])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    assert taken["base"] < 0.2 < 0.5 < taken["trained"]
    assert (tmp_path / "eval/one/pictures/median.png").stat().st_size > 10_000
    assert (tmp_path / "eval/one/report.html").is_file()
