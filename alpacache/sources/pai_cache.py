"""Lets the PhysicalAI-AV devkit read a local tree, dressed up as the hub's cache.

The devkit takes a cache directory and a revision and reads cached files without asking the hub. So a tree becomes a
temporary cache whose one snapshot consists of links to it. Two files that the devkit would otherwise ask the hub for,
and that partial or older trees lack, are derived from what the tree holds: the default split (a column of the old clip
index) and the table of present features (`sensor_presence` before 26.03).
"""

import shutil
import tempfile
import weakref
from pathlib import Path

from alpacache.errors import DataError, SourceError
from alpacache.sources.retry import first_line

REPO = "nvidia/PhysicalAI-Autonomous-Vehicles"
FEATURES_FILE = "features.csv"
_NEEDED = (FEATURES_FILE, "clip_index.parquet", "metadata/data_collection.parquet")
_FIRST_CHUNK = (
    f"hf download {REPO} --repo-type dataset --local-dir DIR --include features.csv --include clip_index.parquet "
    "--include 'metadata/*' --include 'splits/*' --include 'labels/egomotion/*chunk_0000*' "
    "--include 'camera/camera_front_wide_120fov/*chunk_0000*' --include 'calibration/*/*chunk_0000*'"
)
_SPLITS = Path("splits/default.parquet")
_PRESENCE, _OLD_PRESENCE = Path("metadata/feature_presence.parquet"), Path("metadata/sensor_presence.parquet")


class LinkedCache:
    """A hub cache with one snapshot that links into `tree`; its directory is removed with the object."""

    revision = "0" * 40
    """Any full commit hash will do: the devkit then takes cached files without asking the hub."""

    def __init__(self, tree: Path) -> None:
        """Raises `SourceError`, naming missing files and the command that fetches them."""
        import pandas as pd

        self.tree = tree.resolve()
        if not self.tree.is_dir():
            raise SourceError(f"pai:{self.tree}: no such directory.")
        missing = [name for name in _NEEDED if not (self.tree / name).is_file()]
        if not any((self.tree / name).is_file() for name in (_PRESENCE, _OLD_PRESENCE)):
            missing.append(str(_PRESENCE))
        if missing:
            fetch = f"hf download {REPO} {' '.join(missing)} --repo-type dataset --local-dir {self.tree}"
            raise SourceError(f"pai:{self.tree} lacks {', '.join(missing)}; run: {fetch}")
        self.directory = tempfile.mkdtemp(prefix="alpacache-pai-")
        self.close = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        snapshot = Path(self.directory) / f"datasets--{REPO.replace('/', '--')}" / "snapshots" / self.revision
        for folder in (".", "metadata", "splits"):
            (snapshot / folder).mkdir(parents=True, exist_ok=True)
            for entry in (self.tree / folder).glob("*"):
                if entry.name not in ("metadata", "splits"):
                    (snapshot / folder / entry.name).symlink_to(entry)

        if not (snapshot / _PRESENCE).exists():
            table = pd.read_parquet(snapshot / _OLD_PRESENCE)
            table.select_dtypes(include=bool).to_parquet(snapshot / _PRESENCE)
        if not (snapshot / _SPLITS).exists():
            index = pd.read_parquet(snapshot / "clip_index.parquet")
            labels = index["split"] if "split" in index.columns else pd.Series("train", index=index.index)
            labels.to_frame("split").to_parquet(snapshot / _SPLITS)


def explain_hub_error(error: Exception) -> SourceError:
    """Tell offline, gated and unreachable apart, and name the command that helps.

    `error` is one of `connection_errors`, or the `DataError` of `with_retry`.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    cause = error.__cause__ if isinstance(error, DataError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    refused = isinstance(cause, RepositoryNotFoundError) or status in (401, 403)  # gated ones are "not found" too
    local = f"or read a local tree with pai:DIR; its first chunk is fetched by: {_FIRST_CHUNK}"
    if isinstance(cause, OfflineModeIsEnabled):
        help_text = f"HF_HUB_OFFLINE is set; unset it, {local}"
    elif isinstance(cause, HfHubHTTPError) and refused:
        page = f"https://huggingface.co/datasets/{REPO}"
        help_text = f"the dataset is gated; accept its terms at {page}, then run: hf auth login"
    else:
        help_text = f"the hub cannot be reached; try again online, {local}"
    repeated = "after repeated tries, " if cause is not error else ""
    return SourceError(f"pai ({REPO}): {help_text} ({repeated}{first_line(cause or error)})")
