"""Disasters that a store must survive: kills, power cuts, full disks, flipped bits, lost and cut files, faulty lines.

    python benchmarks/torture_store.py --kills 1000 --flips 10000 --seed 0

Writers are killed at random, `copy` and `verify --repair` before each operation on the file system (each 15th below 300
kills). Over a line that flips one answer in twenty, or says as often that nothing is there, repair must condemn nothing
that is whole.

The last line counts acknowledged samples lost, torn samples visible, and wrong bytes read without an error; the exit
status is 1 unless all are zero. Linux only (it forks).
"""

import argparse
import errno
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_store import (
    CacheReader,
    CacheStoreError,
    CacheWriter,
    Field,
    IdentityMismatchError,
    StoreFullError,
    build_index,
    collect_garbage,
    copy,
    rereading,
    verify,
)
from cache_store.format import codec_tables
from cache_store.upkeep import verification

rereading.WAITS_S = (0.0,) * len(rereading.WAITS_S)  # as many readings as ever, at once
verification.REPAIR_ROUNDS_S = (0.0,) * len(verification.REPAIR_ROUNDS_S)
verification.ROUNDS_S = (0.0,) * len(verification.ROUNDS_S)

FIELDS = [
    Field(name="kv", dtype="bfloat16", axes=("layer", "token", "channel"), chunk_mb=0.004),
    Field(name="z", dtype="float32", axes=("i",), compression="zstd", chunk_mb=0.004),
    Field(name="writer", dtype="int64", layout="packed"),
    Field(name="text", dtype="str", layout="text"),
]
TABLES = bytes(range(256)) * 20
"""What a codec has learnt, an object beside the root, which names it."""
TABLES_NAME = hashlib.sha256(TABLES).hexdigest()
SAMPLES = 24
GARBAGE_AGE_S = 5.0


@dataclass
class Counts:
    """Failures, and how much was tried."""

    lost: int = 0
    torn: int = 0
    wrong: int = 0
    tried: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int = 1) -> None:
        self.tried[what] = self.tried.get(what, 0) + count


def values_of(sample_id: str, writer: int) -> dict[str, Any]:
    """Values that this writer stores under this id; the two determine every byte."""
    rng = np.random.default_rng([writer, zlib.crc32(sample_id.encode())])
    return {
        "kv": rng.integers(0, 2**16, (5, 12, 64)).astype(np.uint16),
        "z": np.round(rng.standard_normal(2000), 1).astype(np.float32),
        "writer": np.array(writer),
        "text": f"{sample_id} by {writer}",
    }


def open_writer(path: Path, identity: str = "a") -> CacheWriter:
    settings = {"model": identity, "codec_definition": {"tables_sha256": TABLES_NAME}}
    return CacheWriter(path, fields=FIELDS, identity=settings, codec_tables=TABLES)


def has_tables(path: Path, counts: Counts) -> bool:
    """Tell whether the codec's tables can be read; what is read are those."""
    try:
        counts.wrong += codec_tables.read_at(path, TABLES_NAME) != TABLES
    except CacheStoreError:
        return False
    return True


def check_sample(reader: CacheReader, sample_id: str, counts: Counts, *, may_fail: bool = False) -> bool:
    """Read one sample and compare every byte; returns whether it was readable."""
    try:
        got = reader.read(sample_id)
    except CacheStoreError:
        counts.torn += not may_fail
        return False
    expected = values_of(sample_id, int(got["writer"]))
    counts.wrong += any(got[name].tobytes() != np.asarray(expected[name]).tobytes() for name in expected)
    return True


def check_store(path: Path, acknowledged: set[str], counts: Counts) -> None:
    if not (path / "zarr.json").exists():
        counts.lost += len(acknowledged)
        return
    counts.lost += not has_tables(path, counts)
    reader = CacheReader(path)
    counts.lost += len(acknowledged - set(reader.sample_ids))
    for sample_id in reader.sample_ids:
        check_sample(reader, sample_id, counts)


def torture_kills(folder: Path, kills: int, rng: random.Random, counts: Counts) -> None:
    """Kill 1 to 8 racing writers at random, beside a reader and a garbage collector that must not suffer."""
    done, number = 0, 0
    while done < kills:
        path = folder / f"kills{number}"
        number += 1
        acknowledged: set[str] = set()
        others = [fork(lambda p=path: watch(p)), fork(lambda p=path: collect(p))]
        budget = min(kills - done, 60)
        while budget > 0:
            crowd = [start_writer(path, rng.randrange(2**31)) for _ in range(rng.randint(1, 8))]
            for pid, receive in rng.sample(crowd, len(crowd)):
                time.sleep(rng.random() * 0.02)
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                killed = os.WIFSIGNALED(status)
                budget -= killed
                done += killed
                counts.torn += not killed and os.waitstatus_to_exitcode(status) != 0
                acknowledged |= receive_ids(receive)
            check_store(path, acknowledged, counts)
            if len(acknowledged) == SAMPLES:
                break
        for pid in others:
            os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            counts.torn += os.waitstatus_to_exitcode(status) != 0
        with open_writer(path) as writer:  # the same command again goes on
            for i in range(SAMPLES):
                writer.write(f"s{i}", values_of(f"s{i}", 1))
        check_store(path, {f"s{i}" for i in range(SAMPLES)}, counts)
        counts.torn += not verify(path, deep=True).ok
        shutil.rmtree(path)
    counts.add("kills", done)


def fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def start_writer(path: Path, seed: int) -> tuple[int, int]:
    receive, send = os.pipe()

    def body() -> None:
        order = random.Random(seed).sample(range(SAMPLES), SAMPLES)
        with open_writer(path) as writer:
            for i in order:
                writer.write(f"s{i}", values_of(f"s{i}", seed))
                os.write(send, f"s{i}\n".encode())

    pid = fork(body)
    os.close(send)
    return pid, receive


def receive_ids(receive: int) -> set[str]:
    data = b""
    while block := os.read(receive, 65536):
        data += block
    os.close(receive)
    return {line.decode() for line in data.split(b"\n")[:-1]}


def until_terminated(body: Callable[[], None]) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    while not stopped:
        body()


def watch(path: Path) -> None:
    """Read while writers commit; any error or wrong byte ends the process with status 1."""
    counts = Counts()
    readers: list[CacheReader] = []

    def look() -> None:
        if not (path / "zarr.json").exists():
            return
        readers[:] = readers or [CacheReader(path)]
        readers[0].refresh()
        for sample_id in readers[0].sample_ids:
            check_sample(readers[0], sample_id, counts)

    until_terminated(look)
    assert counts.wrong == counts.torn == 0, counts


def collect(path: Path) -> None:
    def sweep() -> None:
        if (path / "zarr.json").exists():
            collect_garbage(path, min_age_s=GARBAGE_AGE_S)
        time.sleep(0.01)

    until_terminated(sweep)


def torture_power(folder: Path, counts: Counts) -> None:
    """A power cut after every fsync of two writes: all that was not forced to the medium is gone."""
    path, acknowledged = folder / "power", set[str]()
    contents: dict[int, bytes] = {}
    names: dict[int, dict[str, tuple[bool, int]]] = {}
    states: list[tuple[Any, Any, set[str]]] = []
    parent = folder.stat().st_ino
    real = os.fsync

    def fsync(descriptor: int) -> None:
        remember()
        real(descriptor)
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        inode = os.fstat(descriptor).st_ino
        if place.is_dir():
            names[inode] = {item.name: (item.is_dir(), item.lstat().st_ino) for item in place.iterdir()}
        else:
            contents[inode] = place.read_bytes()

    def remember() -> None:
        states.append((dict(contents), {key: dict(value) for key, value in names.items()}, set(acknowledged)))

    os.fsync = fsync
    try:
        with open_writer(path) as writer:
            for i in range(2):
                writer.write(f"s{i}", values_of(f"s{i}", i))
                acknowledged.add(f"s{i}")
    finally:
        os.fsync = real
    remember()
    for number, (kept_contents, kept_names, kept_acknowledged) in enumerate(states):
        after = folder / f"power{number}"

        def restore(inode: int, target: Path, kept: Any = kept_names, data: Any = kept_contents) -> None:
            target.mkdir()
            for name, (is_folder, child) in kept.get(inode, {}).items():
                if is_folder:
                    restore(child, target / name)
                else:
                    (target / name).write_bytes(data.get(child, b""))

        restore(parent, after)
        store = after / "power"
        check_store(store, kept_acknowledged, counts)
        with open_writer(store) as writer:
            for i in range(2):
                writer.write(f"s{i}", values_of(f"s{i}", 7))
        check_store(store, {"s0", "s1"}, counts)
        counts.torn += not verify(store, deep=True).ok
        shutil.rmtree(after)
    counts.add("power cuts", len(states))


def torture_full_disk(folder: Path, counts: Counts) -> None:
    """ENOSPC at every single write, after half of its bytes."""
    real = os.write
    for step in range(1, 10_000):
        path, left, acknowledged = folder / f"full{step}", step, set[str]()

        def write(descriptor: int, data: Any) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                real(descriptor, bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, "no space left on device")
            return real(descriptor, data)

        os.write = write
        full = False
        try:
            with open_writer(path) as writer:
                for i in range(2):
                    writer.write(f"s{i}", values_of(f"s{i}", i))
                    acknowledged.add(f"s{i}")
        except StoreFullError:
            full = True
        finally:
            os.write = real
        check_store(path, acknowledged, counts)
        if not full:
            counts.add("full disks", step - 1)
            return
        with open_writer(path) as writer:
            for i in range(2):
                writer.write(f"s{i}", values_of(f"s{i}", 5))
        check_store(path, {"s0", "s1"}, counts)
        report = verify(path, deep=True)
        counts.torn += not report.ok or bool(report.orphans) or bool(report.stale_temporaries)
        shutil.rmtree(path)


def make_store(path: Path) -> None:
    with open_writer(path) as writer:
        for i in range(4):
            writer.write(f"s{i}", values_of(f"s{i}", i))
        writer.quarantine("bad", "kind", "reason", "traceback")
    build_index(path)
    then = time.time() - 60
    (path / "staging" / ("0" * 32)).write_bytes(b"left over")
    shutil.copytree(next((path / "samples").glob("s0*")), path / "samples" / f"orphan-{'0' * 32}.{'1' * 16}")
    os.utime(path / "commits", (then, then))


def files_of(path: Path) -> list[Path]:
    return sorted(item for item in path.rglob("*") if item.is_file())


def read_damaged(path: Path, counts: Counts) -> set[str] | None:
    """Read a damaged store and compare whatever comes without an error; the ids of that, None if it does not open."""
    try:
        reader = CacheReader(path)
    except CacheStoreError:
        return None
    return {sample_id for sample_id in reader.sample_ids if check_sample(reader, sample_id, counts, may_fail=True)}


def torture_flips(folder: Path, flips: int, rng: random.Random, counts: Counts) -> None:
    """Flip single bits, over every file in turn."""
    path = folder / "flips"
    make_store(path)
    whole = {f"s{i}" for i in range(4)}
    files = files_of(path)
    for number in range(flips):
        target = files[number % len(files)]
        data = target.read_bytes()
        at = rng.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        target.write_bytes(flipped)
        readable = read_damaged(path, counts)
        noticed = readable != whole or not has_tables(path, counts)
        if target.name == TABLES_NAME:
            counts.wrong += not noticed or verify(path, deep=True).ok
        target.write_bytes(data)
        counts.add("flips noticed", noticed)
        if target != path / "zarr.json":  # anything but the root costs one sample at most
            counts.lost += readable is None or len(whole - readable) > 1
    counts.torn += not verify(path, deep=True).ok
    counts.add("flips", flips)
    shutil.rmtree(path)


def kill_at_steps(
    body: Callable[[], None], prepare: Callable[[], None], check: Callable[[], None], *, every: int
) -> int:
    """Kill `body` before its first operation on the file system, then `every` so many later; returns how often."""
    for number, step in enumerate(range(1, 10_000, every)):
        prepare()
        pid = os.fork()
        if not pid:
            left = step

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def act(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return act

            for name in ("mkdir", "open", "write", "fsync", "link", "unlink", "rename", "replace"):
                setattr(os, name, counted(getattr(os, name)))
            try:
                body()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        check()
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            return number
    raise AssertionError("it never ends")


def torture_copies(folder: Path, counts: Counts, *, every: int) -> None:
    """Kill a copy at its steps: what it has shown is whole, and the next call finishes it."""
    source, target = folder / "source", folder / "copy"
    make_store(source)

    def prepare() -> None:
        shutil.rmtree(target, ignore_errors=True)

    def check() -> None:
        if (target / "zarr.json").exists():
            check_store(target, set(), counts)
        copy(source, target)
        check_store(target, {f"s{i}" for i in range(4)}, counts)

    counts.add("kills of a copy", kill_at_steps(lambda: void(copy(source, target)), prepare, check, every=every))
    shutil.rmtree(source)


def torture_repairs(folder: Path, counts: Counts, *, every: int) -> None:
    """Kill a repair at its steps: whole samples stay, the damaged one is in its place or aside and can be had back."""
    made, path = folder / "made", folder / "repair"
    make_store(made)
    damaged = next((made / "samples").glob("s1*/kv/c.0*"))
    data = damaged.read_bytes()
    damaged.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(made, path)

    def check() -> None:
        counts.lost += len({"s0", "s2", "s3"} - (read_damaged(path, counts) or set()))
        verify(path, deep=True, repair=True)
        counts.lost += len(CacheReader(path)) != 3
        (path / damaged.relative_to(made)).write_bytes(data)
        verify(path, restore=True)
        check_store(path, {f"s{i}" for i in range(4)}, counts)

    repair = lambda: void(verify(path, deep=True, repair=True))  # noqa: E731
    counts.add("kills of a repair", kill_at_steps(repair, prepare, check, every=every))
    shutil.rmtree(made)


def void(_: object) -> None:
    pass


def torture_line(folder: Path, rounds: int, rng: random.Random, counts: Counts) -> None:
    """Repair over a line that flips a bit in one answer in twenty, or says as often that nothing is there."""
    path = folder / "line"
    make_store(path)
    preadv, opened = os.preadv, os.open

    def flipping(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        if count and rng.random() < 0.05:
            counts.add("wrong answers")
            buffer = next(buffer for buffer in buffers if len(buffer))
            buffer[rng.randrange(len(buffer))] ^= 1 << rng.randrange(8)
        return count

    def absent(name: Any, *args: Any, **kwargs: Any) -> int:
        if "/samples/" in os.fspath(name) and rng.random() < 0.05:
            counts.add("wrong answers")
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(name))
        return opened(name, *args, **kwargs)

    for _ in range(rounds):
        os.preadv, os.open = flipping, absent
        try:
            report = verify(path, deep=True, repair=True)
        finally:
            os.preadv, os.open = preadv, opened
        counts.lost += len(report.repaired) + len(report.damaged)
    check_store(path, {f"s{i}" for i in range(4)}, counts)
    shutil.rmtree(path)


def torture_files(folder: Path, counts: Counts) -> None:
    """Cut every file at several lengths, or delete it; and open a writer of another model."""
    path = folder / "files"
    make_store(path)
    for target in files_of(path):
        data = target.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 4, len(data) - 1, None):
            if length is None:
                target.unlink()
            else:
                target.write_bytes(data[: max(0, length)])
            read_damaged(path, counts)
            counts.wrong += has_tables(path, counts) == (target.name == TABLES_NAME)
            target.write_bytes(data)
            counts.add("cut or deleted files")
    before = [(item, item.read_bytes()) for item in files_of(path)]
    try:
        open_writer(path, "another")
        counts.wrong += 1
    except IdentityMismatchError:
        counts.wrong += before != [(item, item.read_bytes()) for item in files_of(path)]
    shutil.rmtree(path)


def torture(folder: Path, *, kills: int, flips: int, seed: int) -> Counts:
    rng, counts = random.Random(seed), Counts()
    torture_power(folder, counts)
    torture_full_disk(folder, counts)
    torture_files(folder, counts)
    every = 1 if kills >= 300 else 15
    torture_copies(folder, counts, every=every)
    torture_repairs(folder, counts, every=every)
    torture_line(folder, max(1, flips // 50), rng, counts)
    torture_flips(folder, flips, rng, counts)
    torture_kills(folder, kills, rng, counts)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where stores are made (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        counts = torture(Path(folder), kills=options.kills, flips=options.flips, seed=options.seed)
    tried = ", ".join(f"{count} {what}" for what, count in counts.tried.items())
    print(f"{tried}: {counts.lost} lost, {counts.torn} torn, {counts.wrong} wrong")
    return int(counts.lost + counts.torn + counts.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
