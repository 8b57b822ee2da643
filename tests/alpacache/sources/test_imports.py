import subprocess
import sys

import pytest

MODULES = (
    "alpacache.sources.selection",
    "alpacache.sources",
    "alpacache.sources.folder",
    "alpacache.sources.synthetic",
)
MODULES += ("alpacache.sources.pai", "benchmarks.pai_tree", "alpacache.sources.prepared")


@pytest.mark.parametrize("module", MODULES)
def test_sources_load_nothing_heavy(module):
    """The command line imports these to print its help."""
    heavy = ("torch", "transformers", "scipy", "av", "PIL", "pandas", "pyarrow", "datasets", "physical_ai_av")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found == "[]\n"
