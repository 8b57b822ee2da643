"""The builders of the site lie in a folder of their own, outside the packages."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parents[1] / "docs_build"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
