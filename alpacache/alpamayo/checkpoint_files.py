"""The files that make up a checkpoint, links followed where they lead to a part of one and nowhere else.

Checkpoints are often folders of links: the hub's cache, a conversion script that writes a new `config.json` beside the
old weights. But an archive from elsewhere may hold links too, and what is exported is handed on.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from alpacache.errors import CheckpointError

_NOT_CHECKPOINT = {".cache", ".git"}
"""Directories that download tools leave behind."""
_MOST_LINKS = 40
"""Symbolic links followed in a row; Linux follows as many."""


def is_snapshot(directory: Path) -> bool:
    """Recognise `models--OWNER--NAME/snapshots/REVISION` of the hub's cache, whose files are links to `blobs`."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")


def files_below(root: Path, shards: Collection[str], patterns: Sequence[str]) -> dict[str, Path]:
    """Path inside the checkpoint, such as `vlm/config.json`, to the real path of its bytes.

    A link may lead to another file of the checkpoint, to the hub's blobs, or to what bears the same name in a folder
    that a linked shard lies in.

    Args:
        root: the checkpoint's directory, resolved.
        shards: names of its files of weights.
        patterns: only paths that match one of them, such as `*.json`; none: all.

    Raises `CheckpointError` for any other link, and for special files.
    """
    files = {}
    for inside, target, is_part in _walked(root, shards):
        if patterns and not any(fnmatchcase(inside, pattern) for pattern in patterns):
            continue
        if not is_part:
            raise CheckpointError(
                f"{root / inside} is a link or special file ({target}); expected a file inside the checkpoint, or "
                "of the same name in the folder that its linked shards lie in. Put the file itself there, or "
                "remove the link."
            )
        files[inside] = target
    return files


def links_out(root: Path, shards: Collection[str]) -> dict[str, Path]:
    """Path inside the checkpoint to where it leads, of all links and special files that `files_below` refuses."""
    return {inside: target for inside, target, is_part in _walked(root, shards) if not is_part}


def _walked(root: Path, shards: Collection[str]) -> Iterator[tuple[str, Path, bool]]:
    """Path inside the checkpoint of each file, its real path, and whether that is a file of the checkpoint."""
    homes = {home for shard in shards for home in _homes(root / shard)}
    if is_snapshot(root):
        homes.add(root.parent.parent / "blobs")

    def is_part(inside: str, target: Path) -> bool:
        if target.is_relative_to(root) or inside in shards:
            return True
        return any(target == home / inside or (_holds_blobs(home) and target.parent == home) for home in homes)

    for folder, below, names in os.walk(root, followlinks=True):
        links = [name for name in set(below) - _NOT_CHECKPOINT if (Path(folder) / name).is_symlink()]
        places = {name: (Path(folder) / name).relative_to(root).as_posix() for name in links}
        followed = {name for name, inside in places.items() if (root / inside).resolve() in {h / inside for h in homes}}
        below[:] = sorted(set(below) - _NOT_CHECKPOINT - set(links) | followed)
        for name in sorted({*names, *links} - followed):
            inside = (Path(folder) / name).relative_to(root).as_posix()
            target = (root / inside).resolve()
            yield inside, target, target.is_file() and is_part(inside, target)


def _homes(link: Path) -> Iterator[Path]:
    """The folders that a file lies in by each of the links that lead to it, resolved."""
    for _ in range(_MOST_LINKS):
        if not link.is_symlink():
            return
        link = link.parent / link.readlink()
        yield link.parent.resolve()


def _holds_blobs(folder: Path) -> bool:
    """Recognise `models--OWNER--NAME/blobs` of the hub's cache."""
    return folder.name == "blobs" and folder.parent.name.startswith("models--")
