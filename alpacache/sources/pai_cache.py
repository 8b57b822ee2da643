"""Lets the PhysicalAI-AV devkit read a local tree, dressed up as the hub's cache.

The devkit takes a cache directory and a revision and reads cached files without asking the hub. So a tree becomes a
temporary cache whose one snapshot consists of links to it. Two files that the devkit would otherwise ask the hub for,
and that partial or older trees lack, are derived from what the tree holds: the default split (a column of the old clip
index) and the table of present features (`sensor_presence` before 26.03).
"""

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

from alpacache.errors import DataError, SourceError
from alpacache.regular_file import regular_size
from alpacache.sources.pai_metadata import Faults, read_by_clip, sound_index, sound_presence, sound_splits
from alpacache.sources.retry import first_line

REPO = "nvidia/PhysicalAI-Autonomous-Vehicles"
FEATURES_FILE = "features.csv"
MAX_FEATURES_BYTES = 2**24
_INDEX, _COLLECTION = "clip_index.parquet", "metadata/data_collection.parquet"
_NEEDED = (FEATURES_FILE, _INDEX, _COLLECTION)
_FIRST_CHUNK = (
    f"hf download {REPO} --repo-type dataset --local-dir DIR --include features.csv --include clip_index.parquet "
    "--include 'metadata/*' --include 'splits/*' --include 'labels/egomotion/*chunk_0000*' "
    "--include 'camera/camera_front_wide_120fov/*chunk_0000*' --include 'calibration/*/*chunk_0000*'"
)
_LOCAL = f"or read a local tree with pai:DIR; its first chunk is fetched by: {_FIRST_CHUNK}"
_SPLITS = Path("splits/default.parquet")
_WIDE = re.compile(r"\{(?:chunk|clip)_id[^{}]*\d{3,}")
"""A place in a file's name that is filled up to a hundred characters or more."""
_PRESENCE, _OLD_PRESENCE = Path("metadata/feature_presence.parquet"), Path("metadata/sensor_presence.parquet")


class LinkedCache:
    """A hub cache with one snapshot that links into `tree`; its directory is removed with the object."""

    revision = "0" * 40
    """Any full commit hash will do: the devkit then takes cached files without asking the hub."""

    def __init__(self, tree: Path) -> None:
        """Raises `SourceError`, naming missing files and the command that fetches them."""
        self.tree = Path(os.path.realpath(tree))
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
        self.unusable = self._put_in_order(snapshot)
        """Clips that the metadata is wrong about -> how."""

    def _put_in_order(self, snapshot: Path) -> Faults:
        """Replace the tables that the devkit joins by what it can join; what is wrong with the clips left out."""
        index, index_is_so = read_by_clip(self.tree / _INDEX, ("chunk",))
        presence_file = self.tree / (_PRESENCE if (self.tree / _PRESENCE).is_file() else _OLD_PRESENCE)
        presence, presence_is_so = read_by_clip(presence_file)
        if (self.tree / _SPLITS).is_file():
            splits, splits_are_so = read_by_clip(self.tree / _SPLITS, ("split",))
        else:
            splits = (index if "split" in index.columns else index.assign(split="train"))[["split"]]
            splits_are_so = False
        for file in (FEATURES_FILE, _COLLECTION):
            _check_regular(self.tree / file)
        if (wide := _WIDE.search((self.tree / FEATURES_FILE).read_text(errors="replace"))) is not None:
            raise SourceError(f"{self.tree / FEATURES_FILE} holds {wide[0][:60]!r}, no name of a file. Fetch it again.")
        read_by_clip(self.tree / _COLLECTION)
        sound, faults = sound_index(index, _INDEX)
        known, unknown = sound_presence(presence, sound, str(presence_file.relative_to(self.tree)))
        for name, table, changed in (
            (_INDEX, sound, not index_is_so or not sound.equals(index)),
            (
                _PRESENCE,
                known,
                presence_file.name != _PRESENCE.name or not presence_is_so or not known.equals(presence),
            ),
            (_SPLITS, kept := sound_splits(splits, sound), not splits_are_so or not kept.equals(splits)),
        ):
            if changed:
                (snapshot / name).unlink(missing_ok=True)
                table.to_parquet(snapshot / name)
        return unknown | faults


def _check_regular(file: Path) -> None:
    try:
        regular_size(file, limit_bytes=MAX_FEATURES_BYTES if file.name == FEATURES_FILE else None)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error}.") from error


def unreachable_hub(why: str) -> SourceError:
    """The error for a hub that was not asked, as it is out of reach."""
    help_text = "unset it" if why.startswith("HF_HUB_OFFLINE") else "try again online"
    return SourceError(f"pai ({REPO}): the hub cannot be reached ({why}); {help_text}, {_LOCAL}.")


def explain_hub_error(error: Exception) -> SourceError:
    """Tell offline, gated and unreachable apart, and name the command that helps.

    `error` is one of `connection_errors`, or the `DataError` of `with_retry`.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    cause = error.__cause__ if isinstance(error, DataError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    refused = isinstance(cause, RepositoryNotFoundError) or status in (401, 403)  # gated ones are "not found" too
    if isinstance(cause, OfflineModeIsEnabled):
        help_text = f"HF_HUB_OFFLINE is set; unset it, {_LOCAL}"
    elif isinstance(cause, HfHubHTTPError) and refused:
        page = f"https://huggingface.co/datasets/{REPO}"
        help_text = f"the dataset is gated; accept its terms at {page}, then run: hf auth login"
    else:
        help_text = f"the hub cannot be reached; try again online, {_LOCAL}"
    repeated = "after repeated tries, " if cause is not error else ""
    return SourceError(f"pai ({REPO}): {help_text} ({repeated}{first_line(cause or error)})")
