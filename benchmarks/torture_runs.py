"""Commands that are killed at every step of theirs, and runs with flipped bits: nothing lost, nothing silently wrong.

    python benchmarks/torture_runs.py --kills 100 --flips 20 --seed 0

`convert` (pictures and films), `prepare`, `extract` with a codec that it learns, `copy` of such a store, `train`,
`export`, `eval` (over an older evaluation) and `drive` of a tiny model are killed before their system calls that open
for writing, write, flush, rename, link, delete or make a folder: before each of them, or before so many that are evenly
spread. Then the same command is run again (`train` with `--resume`) and must end with the same bytes as one that nobody
disturbed, and nothing else may lie about.

Then single bits are flipped in every file of a run. `train --resume`, `export` and `eval` must end with the bytes of
the undamaged run, or name the damaged file.

The last line counts what was lost, what was wrong without a word, and what was left lying about; the exit status is 1
unless all are zero. Linux on x86-64 only.
"""

import argparse
import hashlib
import importlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import kill_at_call
import numpy as np
import torch
from alpacache_cli.main import main as alpacache
from benchmark_report import commit, hardware_name, table, versions
from PIL import Image

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.errors import AlpacacheError
from alpacache.training.run_directory import RunDirectory, find_checkpoint, read_checkpoint
from cache_store import CacheReader, CacheStoreError, verify
from cache_store.format import codec_tables

FIXED = ["--device", "cpu", "--model", "../model"]
IMPORTED = [
    "training.train",
    "evaluation.evaluate",
    "exporting.export",
    "extraction.extract",
    "extraction.codec_choice",
    "sources.prepared_writer",
    "converters.carla",
    "converters.writer",
    "driver.film",
]
"""What commands import when they are called: here once, not in each of a thousand processes."""
TRAIN = ["train", *FIXED, "--store", "../train", "--val", "../val", "--out", "run", "--steps", "4", "--val-every", "2"]
TRAIN += ["--save-every", "1", "--keep", "1", "--batch-size", "1", "--draws", "1", "--ema", "0.9", "--track", "none"]
EVAL = ["eval", *FIXED, "--store", "../val", "--out", "eval", "--paths", "2", "--flow-steps", "2"]
EXPORT = ["export", "--model", "../model", "--out", "export"]
CLEAN = ["clean", "store", "--min-age", "0"]
CONVERT = ["convert", "carla", "../inputs/log", "--out", "drives", "--axes", "left-handed", "--no-check"]
DRIVE = ["drive", "synthetic:1", *FIXED, "--out", "film.mp4", "--begin", "5", "--seconds", "0.6"]
DRIVE += ["--paths", "2", "--flow-steps", "2", "--seed", "1"]
LEARN = ["extract", "synthetic:3", *FIXED, "--store", "store", "--frames", "1", "--workers", "1", "--samples", "3"]
LEARN += ["--hidden-states", "none", "--codec", "transform:6"]
PREPARE = ["prepare", "synthetic:3", "--out", "samples", "--frames", "1"]
_TIMES = ("samples_per_s", "step_ms", "data_wait")
"""Numbers of a step that differ from one undisturbed run to the next. Those of `_SINCE` are means since the last
validation or resumption."""
_SINCE = "train_loss/"
_STATE = ("step", "best", "average", "files", "settings", "free_settings", "skipped", "damaged_indices")
"""What must be the same of a checkpoint's state; the rest are checksums of what has times in it."""

Tree = dict[str, str]
"""Digest of each file by its path; of a link, where it points."""


@dataclass
class Row:
    """What was tried in one way, and what came of it."""

    what: str
    tried: int = 0
    of: int = 0
    """Number of calls that change a disk, of all that the command makes."""
    lost: int = 0
    """Something committed before is gone or cannot be read."""
    silent: int = 0
    """A wrong result, a mixture or a half file, without a word."""
    left: int = 0
    """Leftovers that the next run does not clean."""
    notes: Counter[str] = field(default_factory=Counter)

    def fail(self, kind: str, note: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        print(f"{self.what}: {kind}: {note}", file=sys.stderr, flush=True)

    @property
    def ok(self) -> bool:
        return not (self.lost or self.silent or self.left)

    def shown(self) -> dict[str, object]:
        row: dict[str, object] = {"disaster": self.what, "calls": self.of or None, "tried": self.tried}
        row |= {"lost": self.lost, "silent": self.silent, "left over": self.left}
        return row | {"outcome": ", ".join(f"{count} {what}" for what, count in sorted(self.notes.items()))}


def command(words: Sequence[str], place: Path, *, kill_at: int | None = None) -> tuple[int, int | None, str]:
    """Run a command of `alpacache` in a folder; returns its calls, its exit status (None if killed), and its words."""
    log = place.parent / "words"

    def body() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w")) for number in (1, 2))
        logging.getLogger().handlers.clear()
        os.chdir(place)
        sys.argv = ["alpacache", *words]
        alpacache()

    calls, status = kill_at_call.run(body, kill_at=kill_at)
    return calls, status, log.read_text(errors="replace")


def undisturbed(words: Sequence[str], place: Path) -> None:
    _, status, said = command(words, place)
    if status != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {status}:\n{said}")


def tree(place: Path) -> Tree:
    """All that lies in a folder, without the times in it."""
    found: Tree = {}
    for path in sorted(place.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(place))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(place))] = digest(path)
    return found


def digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "state.json":  # of a checkpoint, or of the data set that `prepare` writes, which has a fingerprint
        state = json.loads(data)
        kept = _STATE if "step" in state else sorted(state.keys() - {"_fingerprint"})
        data = json.dumps([state[key] for key in kept]).encode()
    elif path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        data = json.dumps(
            [{key: row[key] for key in row if key not in _TIMES and not key.startswith(_SINCE)} for row in rows]
        ).encode()
    return hashlib.sha256(data).hexdigest()


def differing(got: Tree, expected: Tree) -> str:
    """Names that differ, a few of them; empty if there are none."""
    names = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def fresh(place: Path, template: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A command to kill: what lies there before, what must hold after a kill, and how it is run again."""

    name: str
    words: Sequence[str]
    template: Path
    after: Callable[[Path, Row], None] = lambda place, row: None
    again: Callable[[Path], Sequence[str]] | None = None
    then: Sequence[str] = ()
    """Command that clears up what the next run leaves."""
    seen: Callable[[Path], Tree] = tree
    """What is compared: all that lies there, or what is read of it where names are drawn by chance."""


def torture_kills(victim: Victim, place: Path, kills: int) -> Row:
    """Kill a command before so many of its calls, evenly spread, and run it again each time."""
    row = Row(f"kill of {victim.name}")
    fresh(place, victim.template)
    undisturbed(victim.words, place)
    expected, inputs = victim.seen(place), tree(place.parent / "inputs")
    fresh(place, victim.template)
    row.of, status, said = command(victim.words, place)
    if status != 0 or (wrong := differing(victim.seen(place), expected)):
        raise RuntimeError(f"{victim.name} is not repeatable: {status}, {'' if status else wrong}\n{said}")
    for number in range(min(kills, row.of)):
        at = 1 + number * row.of // min(kills, row.of)
        fresh(place, victim.template)
        _, status, said = command(victim.words, place, kill_at=at)
        row.tried += 1
        if status is not None:  # threads make a call more or less
            row.notes["too late"] += 1
        victim.after(place, row)
        words = victim.words if victim.again is None else victim.again(place)
        _, status, said = command(words, place)
        if status != 0:
            row.fail("lost", f"killed at call {at}, run again it ends with {status}: {said[-400:]}")
            continue
        if victim.then:
            undisturbed(victim.then, place)
        got = victim.seen(place)
        if wrong := differing({name: got[name] for name in got.keys() & expected.keys()}, expected):
            row.fail("silent", f"killed at call {at} and run again, {wrong} differ")
        if more := sorted(got.keys() - expected.keys()):
            row.fail("left", f"killed at call {at} and run again, {', '.join(more[:4])} is left")
        if wrong := differing(tree(place.parent / "inputs"), inputs):
            row.fail("lost", f"killed at call {at}: {wrong} of its inputs differ")
    return row


def check_run(place: Path, row: Row) -> None:
    """After a kill of a training, what can be seen of checkpoints is whole, and none that was committed is gone."""
    run = RunDirectory(place / "run")
    for step in run.steps:
        try:
            read_checkpoint(run.checkpoint(step), optimizer=True, average=True)
        except AlpacacheError as error:
            row.fail("silent", str(error))
    steps = {entry["step"] for entry in run.metrics.rows(up_to=4)}
    committed = max(steps, default=0) - 2  # a step's row is written once the checkpoint two steps before it is
    if max(run.steps, default=0) < committed:
        row.fail("lost", f"of a run that has come to step {max(steps)} the newest checkpoint is {run.steps}")
    if committed > 0:
        try:
            find_checkpoint(run.path)
        except AlpacacheError as error:
            row.fail("lost", str(error))


def resumed(place: Path) -> Sequence[str]:
    return [*TRAIN, "--resume"] if RunDirectory(place / "run").steps else TRAIN


def check_all_or_nothing(place: Path, row: Row, *, name: str, whole: Tree) -> None:
    """After a kill a directory is there as a whole or not at all."""
    if (place / name).exists() and (wrong := differing(tree(place / name), whole)):
        row.fail("silent", f"{name} is there, but {wrong} is not or not whole")


def check_evaluation(place: Path, row: Row, *, old: Tree, new: Tree, got: Tree | None = None) -> None:
    """After a kill no file of one evaluation lies beside one of another, and `eval.json` has all the rest.

    `report.html` goes after it and comes before it, and holds its pictures itself: alone it is whole, too.
    """
    if got is None:
        got = {name: value for name, value in tree(place / "eval").items() if not name.startswith(".")}
    if any(got == {name: of.get(name) for name in got} for of in (old, new)):
        if "eval.json" in got and not any(got == of for of in (old, new)):
            row.fail("silent", f"eval.json is there without the rest: {', '.join(got)}")
        row.notes["old" if got == old else "new" if got == new else "neither"] += 1
    else:
        row.fail("silent", f"a mixture: {', '.join(got)}")


def check_film(place: Path, row: Row, *, whole: Tree) -> None:
    """After a kill of `drive` the film is there as a whole or not at all."""
    if (place / "film.mp4").exists() and digest(place / "film.mp4") != whole["film.mp4"]:
        row.fail("silent", "the film is there, but not whole")


def check_clips(place: Path, row: Row, *, whole: Tree) -> None:
    """After a kill of `convert` what has its name is whole; its report may be the one of the beginning."""
    for name, value in tree(place).items():
        hidden = any(part.startswith(".") or part == "lock" for part in Path(name).parts)
        if not hidden and Path(name).name != "convert.json" and value != whole.get(name):
            row.fail("silent", f"{name} is there, but not whole")
    for clip in {Path(name).parts[2] for name in whole if name.startswith("drives/clips/")}:
        files = {name for name in whole if name.startswith(f"drives/clips/{clip}/")}
        if (place / "drives" / "clips" / clip).exists() and not all((place / name).exists() for name in files):
            row.fail("silent", f"a part of the clip {clip} is not there")


def stored(place: Path) -> Tree:
    """Every value of a store by its sample, and the tables of its codec; what lies about in it is left over."""
    reader, store = CacheReader(place / "store"), place / "store"
    found = {}
    for sample_id in reader.sample_ids:
        for name, array in sorted(reader.read(sample_id).items()):
            data = array.encode() if isinstance(array, str) else array.tobytes()
            found[f"{sample_id}/{name}"] = hashlib.sha256(data).hexdigest()
    names = codec_tables.name_in(reader.identity)
    for path in sorted((store / "codecs").iterdir()):
        found["tables" if path.name == names else f"codecs/{path.name}"] = digest(path)
    report = verify(store, deep=True)
    left = [*report.orphans, *(["temporaries"] if report.stale_temporaries else [])]
    return found | {f"left in the store: {name}": "" for name in left}


def check_store(place: Path, row: Row) -> None:
    """After a kill what a store shows can be read, and so can the tables of its codec."""
    if (place / "store" / "zarr.json").exists():
        reader = CacheReader(place / "store")
        if name := codec_tables.name_in(reader.identity):
            try:
                codec_tables.read_at(place / "store", name)
            except CacheStoreError as error:
                row.fail("lost", str(error))
        for sample_id in reader.sample_ids:
            try:
                reader.read(sample_id)
            except CacheStoreError as error:
                row.fail("silent", str(error))


def victims(folder: Path, made: Path) -> list[Victim]:
    """The commands that are killed, of what was made before."""
    (folder / "nothing").mkdir()
    older = folder / "older"
    older.mkdir()
    undisturbed(EVAL, older)
    fresh(made, older)
    undisturbed([*EVAL, "--checkpoint", "../inputs/run"], made)
    undisturbed([*EXPORT, "--checkpoint", "../inputs/run"], made)
    undisturbed(PREPARE, made)
    undisturbed(CONVERT, made)
    undisturbed(DRIVE, made)
    old, new = tree(older / "eval"), tree(made / "eval")
    export, samples = tree(made / "export"), tree(made / "samples")
    drives = {name: value for name, value in tree(made).items() if name.startswith("drives/")}
    film = {"film.mp4": digest(made / "film.mp4")}
    nothing = folder / "nothing"
    return [
        Victim(
            name="prepare",
            words=PREPARE,
            template=nothing,
            after=partial(check_all_or_nothing, name="samples", whole=samples),
        ),
        Victim(name="convert", words=CONVERT, template=nothing, after=partial(check_clips, whole=drives)),
        Victim(
            name="extract that learns a codec",
            words=LEARN,
            template=nothing,
            after=check_store,
            then=CLEAN,
            seen=stored,
        ),
        Victim(name="copy", words=["copy", "../learnt", "store"], template=nothing, after=check_store, then=CLEAN),
        Victim(name="train", words=TRAIN, template=nothing, after=check_run, again=resumed),
        Victim(
            name="export",
            words=[*EXPORT, "--checkpoint", "../inputs/run"],
            template=nothing,
            after=partial(check_all_or_nothing, name="export", whole=export),
        ),
        Victim(
            name="eval over an older one",
            words=[*EVAL, "--checkpoint", "../inputs/run"],
            template=older,
            after=partial(check_evaluation, old=old, new=new),
        ),
        Victim(name="drive", words=DRIVE, template=nothing, after=partial(check_film, whole=film)),
    ]


def begun_run(folder: Path, place: Path) -> Path:
    """A folder with a run that was killed after its second checkpoint."""
    begun = folder / "begun"
    (folder / "before").mkdir()
    fresh(place, folder / "before")
    calls, _, _ = command(TRAIN, place)
    for at in range(calls // 2, calls):
        fresh(place, folder / "before")
        command(TRAIN, place, kill_at=at)
        if RunDirectory(place / "run").steps[-1:] == [2]:
            fresh(begun, place)
            return begun
    raise RuntimeError("no kill leaves a run at step 2")


def torture_flips(folder: Path, place: Path, flips: int, rng: random.Random) -> list[Row]:
    """Flip bits in every file of a run, and go on with the run, export it and judge it."""
    begun = begun_run(folder, place)
    commands = {
        "train --resume": ["train", "--config", "run/config.toml", "--resume"],
        "export --ema": [*EXPORT, "--checkpoint", "run", "--ema"],
        "eval": [*EVAL, "--checkpoint", "run"],
    }
    expected: dict[str, Tree] = {}
    for name, words in commands.items():
        fresh(place, begun)
        undisturbed(words, place)
        expected[name] = result(place, name)
    files = [path.relative_to(begun) for path in sorted(begun.rglob("*")) if path.is_file() and not path.is_symlink()]
    files = [path for path in files if path.suffix]  # all but the lock
    rows = []
    for file in files:
        row = Row(f"flip in {file.relative_to('run')}")
        for _ in range(flips):
            at = rng.randrange(8 * (begun / file).stat().st_size)
            for name, words in commands.items():
                fresh(place, begun)
                data = bytearray((place / file).read_bytes())
                data[at // 8] ^= 1 << at % 8
                (place / file).write_bytes(data)
                _, status, said = command(words, place)
                row.tried += 1
                judge_flip(row, file, f"{name} with bit {at} of {file} flipped", status, said, place, name, expected)
        rows.append(row)
    return rows


def judge_flip(
    row: Row, file: Path, what: str, status: int | None, said: str, place: Path, name: str, expected: dict[str, Tree]
) -> None:
    """Count what a command made of a damaged run: the same, a refusal or a warning that names the file, or worse."""
    named = file.name in said
    if file.name == "config.toml":  # a setting is refused, and a change of one is told, by the setting's own name
        named |= status != 0 or " -> " in said
    if "Traceback" in said:
        row.fail("silent", f"{what}: {said[-600:]}")
    elif status != 0:
        row.notes["refused"] += 1
        if not named:
            row.fail("silent", f"{what}: refused without its name: {said[-300:]}")
    elif wrong := differing(result(place, name), expected[name]):
        row.notes["said"] += named
        if not named:
            row.fail("silent", f"{what}: {wrong} differ")
    else:
        row.notes["same"] += 1


def result(place: Path, name: str) -> Tree:
    """What a command is run for."""
    if not name.startswith("train"):
        return tree(place / name.split()[0])
    return {
        path: value for path, value in tree(place / "run").items() if Path(path).suffix in (".safetensors", ".jsonl")
    }


def make_inputs(folder: Path) -> Path:
    """A tiny model, two stores and a run; returns the folder that commands are run in."""
    place = folder / "work"
    place.mkdir()
    make_tiny_checkpoint(folder / "inputs" / "model")
    make_log(folder / "inputs" / "log")
    for name in ("model", "train", "val", "learnt"):
        (folder / name).symlink_to(folder / "inputs" / name)
    for split, clips in (("train", 3), ("val", 20)):
        words = ["extract", f"synthetic:{clips}", "--split", split, "--samples", "3", "--frames", "1"]
        undisturbed([*words, *FIXED, "--store", f"../inputs/{split}", "--workers", "1"], place)
    undisturbed(LEARN, place)
    (place / "store").rename(folder / "inputs" / "learnt")
    undisturbed(TRAIN, place)
    (place / "run").rename(folder / "inputs" / "run")
    return place


def make_log(log: Path) -> None:
    """Two drives of 9 s as CARLA's recorder leaves them, one with a film and one with pictures."""
    shades = [np.full((36, 64, 3), 4 * row, np.uint8) for row in range(46)]
    for run in ("run_1", "run_2"):
        (log / run / "images").mkdir(parents=True)
        rows = []
        for row, shade in enumerate(shades):
            name = f"images/{row:06d}.jpg"
            rows.append({"timestamp": 10 + row / 5, "steer": 0.0, "vehicle_x": 2.0 * row, "vehicle_y": 0.0})
            rows[-1] |= {"vehicle_z": 0.0, "vehicle_yaw_deg": 0.0, "front_rgb_path": f"outputs/{run}/{name}"}
            if run == "run_2":
                Image.fromarray(shade).save(log / run / name)
        (log / run / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with av.open(str(log / "run_1" / "front_rgb.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=5, width=64, height=36, pix_fmt="yuv420p")
        for shade in shades:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(shade)))
        film.mux(stream.encode(None))


def torture(folder: Path, *, kills: int, flips: int, seed: int, only: str = "") -> list[Row]:
    place, made = make_inputs(folder), folder / "made"
    rows = []
    for victim in victims(folder, made):
        if kills and only in victim.name:
            rows.append(torture_kills(victim, place, kills))
            print(rows[-1].shown(), file=sys.stderr, flush=True)
    if flips:
        rows += torture_flips(folder, place, flips, random.Random(seed))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each command, at most; spread evenly over its calls")
    parser.add_argument("--flips", type=int, default=20, help="in each file of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a command's name: kill only this one")
    parser.add_argument("--dir", type=Path, help="where all is made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    if not kill_at_call.is_possible():
        parser.error("this needs Linux on x86-64")
    torch.set_num_threads(1)
    for name in ("datasets", "torch._dynamo", *(f"alpacache.{name}" for name in IMPORTED)):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder, suppress(KeyboardInterrupt):
        rows = torture(
            Path(folder).resolve(), kills=options.kills, flips=options.flips, seed=options.seed, only=options.only
        )
    shown = [row.shown() for row in rows]
    if options.json:
        report = {"command": " ".join(["python", *sys.argv]), "hardware": hardware_name(), "commit": commit()}
        options.json.write_text(json.dumps(report | {"versions": versions(), "rows": shown}, indent=1) + "\n")
    print(table(shown))
    lost, silent, left = (sum(getattr(row, kind) for row in rows) for kind in ("lost", "silent", "left"))
    print(f"{sum(row.tried for row in rows)} tried: {lost} lost, {silent} silent, {left} left over")
    return int(lost + silent + left > 0)


if __name__ == "__main__":
    sys.exit(main())
