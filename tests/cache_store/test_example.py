"""The how-to's example runs as it stands, and stays short."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "cache-another-model.md"


def test_the_example_of_the_how_to(tmp_path) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    for _ in range(2):  # the second run finds everything there
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        assert done.stdout.splitlines() == [f"image-{i} ({50 + i}, 64) {i % 3}" for i in range(8)]
