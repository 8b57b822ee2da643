"""Makes the folder's shared module importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
