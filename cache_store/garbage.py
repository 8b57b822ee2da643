"""Garbage collection: attempts that no commit record names and temporaries, once they are old enough.

Nobody can tell a slow writer's attempt from a killed one's, so only age decides, by the file system's own clock. If the
limit was too short nothing acknowledged is lost all the same: an attempt is first moved aside, and moved back if its
record has appeared meanwhile; a writer that finds its attempt gone withdraws its record and fails.
"""

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from cache_store import commit_record, local_files, store_root
from cache_store.sample_key import is_attempt, is_key

DEFAULT_MIN_AGE_S = 24 * 3600.0
"""Far longer than any attempt at a sample takes."""
_ASIDE = "garbage."


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbageReport:
    """What was removed, or would be."""

    attempts: tuple[str, ...]
    """Folders of `samples/`, by name."""
    temporaries: int
    """Files of `staging/`."""
    size_bytes: int
    kept_young: int
    """Attempts and temporaries without a record that have not reached the age."""


def collect_garbage(
    path: str | os.PathLike[str], *, min_age_s: float = DEFAULT_MIN_AGE_S, dry_run: bool = False
) -> GarbageReport:
    """Remove what no record names and nothing has touched for `min_age_s` seconds.

    Raises `FormatError` if any commit record is damaged: its attempt could not be told from garbage; run `verify` with
    `repair` first. Safe beside readers and writers, and beside other collectors.
    """
    root_path = store_root.resolve(path)
    root = store_root.read(root_path)
    now = _now(root_path)
    attempts = [name for name in local_files.names(root_path, store_root.SAMPLES) if _key(name)]
    removed, temporaries, size, young = [], 0, 0, 0
    for name in sorted(attempts):  # listed before any record is read: a record that appears meanwhile is seen
        folder = root_path / store_root.SAMPLES / name
        if _is_committed(root_path, root, name):
            continue
        found_bytes, changed = _extent(folder)
        if now - changed < min_age_s:
            young += 1
        elif dry_run or _remove_attempt(root_path, root, name):
            removed.append(name)
            size += found_bytes
    for name in sorted(local_files.names(root_path, store_root.STAGING)):
        entry = root_path / store_root.STAGING / name
        if name.startswith(_ASIDE):
            if not dry_run:
                _finish(root_path, root, name)
            continue
        found_bytes, changed = _extent(entry)
        if now - changed < min_age_s:
            young += 1
            continue
        temporaries += 1
        size += found_bytes
        if not dry_run:
            local_files.remove_file(entry)
    return GarbageReport(attempts=tuple(removed), temporaries=temporaries, size_bytes=size, kept_young=young)


def _key(name: str) -> str:
    """The key of an attempt's folder, or nothing for another name."""
    key, _, attempt = name.rpartition(".")
    return key if is_key(key) and is_attempt(attempt) else ""


def _is_committed(root_path: Path, root: store_root.StoreRoot, name: str) -> bool:
    try:
        record = commit_record.read(root_path, _key(name), fields=root.fields, fingerprint=root.fingerprint)
    except FileNotFoundError:
        return False
    return record.folder == f"{store_root.SAMPLES}/{name}"


def _remove_attempt(root_path: Path, root: store_root.StoreRoot, name: str) -> bool:
    aside = f"{_ASIDE}{name}"
    try:
        (root_path / store_root.SAMPLES / name).rename(root_path / store_root.STAGING / aside)
    except FileNotFoundError:  # its writer gave up, or another collector was first
        return False
    return _finish(root_path, root, aside)


def _finish(root_path: Path, root: store_root.StoreRoot, aside: str) -> bool:
    """Remove what was moved aside, unless it was committed at the last moment; also after a killed collector."""
    name = aside.removeprefix(_ASIDE)
    folder = root_path / store_root.STAGING / aside
    if _key(name) and _is_committed(root_path, root, name):
        if local_files.exists(folder):
            folder.rename(root_path / store_root.SAMPLES / name)
            local_files.sync_folder(root_path / store_root.SAMPLES)
        return False
    local_files.remove_tree(folder)
    return True


def _extent(path: Path) -> tuple[int, float]:
    """Bytes below a path, and when it last changed (seconds of the file system's clock)."""
    size, changed = 0, 0.0
    pending = [path]
    while pending:
        item = pending.pop()
        try:
            status = item.lstat()
            if item.is_dir() and not item.is_symlink():
                pending += list(item.iterdir())
            else:
                size += status.st_size
        except FileNotFoundError:  # its writer is at work
            return size, time.time()
        changed = max(changed, status.st_mtime, status.st_ctime if item.is_file() else 0.0)
    return size, changed


def _now(root_path: Path) -> float:
    """The clock that stamps files: a server's may differ from this machine's."""
    probe = root_path / store_root.STAGING / secrets.token_hex(16)
    try:
        local_files.write_new((probe, [b""]))
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
