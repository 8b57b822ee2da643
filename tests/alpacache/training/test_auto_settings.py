"""What a run settles before its first step: alike in all processes, and as it was begun."""

import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.planning.memory_model import memory_plan
from alpacache.training import auto_settings, resume_check
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory
from cache_store import CacheReader, CorruptSampleError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("run_plan") / "store"
    config = ExtractConfig(source="synthetic:4", model=str(tiny_checkpoint), store=str(path), frames=1, device="cpu")
    alpacache.extract(config)
    return path


class Stores:
    """A dataset of ids and identities alone."""

    def __init__(self, *stores):
        ends = [sum(len(ids) for ids, _ in stores[: count + 1]) for count in range(len(stores))]
        self.store_ranges = [range(end - len(ids), end) for (ids, _), end in zip(stores, ends, strict=True)]
        self._index = [(SimpleNamespace(identity=identity), name) for ids, identity in stores for name in ids]

    def __len__(self):
        return len(self._index)

    def sample_id(self, index):
        return self._index[index][1]

    def locate(self, index):
        return self._index[index]


@dataclass(frozen=True, kw_only=True)
class Beside(World):
    """The first of two processes; the other one says `theirs`, where it says something else."""

    theirs: dict = field(default_factory=dict)

    def all_gather(self, value):
        return [value, value | self.theirs if isinstance(value, dict) else self.theirs.get("plan", value)]


def identity(cameras, revision="abc"):
    return {"model": {"id": "Tiny", "revision": revision}, "cameras": cameras}


ONE, FOUR = (["a", "b"], identity(["front"])), (["a", "b"], identity(["front", "left"]))


def record(*stores, paths=None, **changes):
    paths = paths or tuple(f"cache/{number}" for number in range(len(stores)))
    config = TrainConfig(stores=paths, model="tiny", out="run", steps=3, micro_batch=2, **changes)
    return resume_check.settings_record(config, resume_check.stores_record(config, Stores(*stores)), processes=1)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ((FOUR, ONE), "the order of the stores: the run has cache/0, cache/1\n  now cache/0, cache/1"),
        ((ONE, ONE), r'store cache/1 has other features than cache/1 had: cameras.*expected .*"left"'),
        (((["a", "b", "c"], ONE[1]), FOUR), "store cache/0 has grown: 3 samples, 2 when the run began"),
        ((ONE, (["a"], FOUR[1])), "store cache/1 has lost samples: 1, 2 when the run began"),
        ((ONE, (["a", "c"], FOUR[1])), "store cache/1 has other samples than cache/1 had"),
        ((ONE,), "2 samples of 1 stores .cache/0.\n  the run has 4 of 2 stores"),
    ],
)
def test_a_run_goes_on_with_its_own_samples_alone(now, message):
    with pytest.raises(UsageError, match=f"^run was begun with other samples:\n  {message}(.|\n)*another --out"):
        resume_check.check_settings(record(ONE, FOUR), record(*now), run="run")


def test_stores_may_move_and_a_revision_may_be_forgotten():
    moved = record((ONE[0], identity(["front"], None)), FOUR, paths=("elsewhere/0", "elsewhere/1"), keep=7)
    resume_check.check_settings(record(ONE, FOUR), moved, run="run")
    with pytest.raises(UsageError, match=r"seed: the run has 0, now 1\nRepeat them"):
        resume_check.check_settings(record(ONE), record(ONE, seed=1), run="run")


def test_of_a_run_of_an_older_version_the_number_of_samples_is_known():
    older = {
        key: value for key, value in record(ONE, FOUR).items() if key not in ("stores", "micro_batch", "processes")
    }
    resume_check.check_settings(older, record(FOUR, ONE), run="run")
    with pytest.raises(UsageError, match=r"2 samples of 1 stores .*\n  the run has 4\n"):
        resume_check.check_settings(older, record(ONE), run="run")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"samples of --store": "5 of"}, r"samples of --store: 4 of digest \w{8} in process 0; 5 of in process 1"),
        ({"samples of --val": "3"}, "samples of --val: none in process 0; 3 in process 1"),
        ({"steps in all": 9}, "steps in all: 3 in process 0; 9 in process 1"),
        ({"seed": 4}, "seed: 0 in process 0; 4 in process 1"),
    ],
)
def test_processes_that_see_different_things_refuse(tiny_checkpoint, store, tmp_path, theirs, message):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    config = TrainConfig(stores=(str(store),), model=str(tiny_checkpoint), out="run", steps=3)
    stores = resume_check.stores_record(config, CachedDataset([store], checkpoint))
    seen = (config, RunDirectory(tmp_path), checkpoint, stores, None)
    resume_check.check_alike(*seen, Beside(rank=0, size=2, device=CPU))
    with pytest.raises(UsageError, match=f"2 processes of run do not see the same:\n  {message}\nNothing was changed"):
        resume_check.check_alike(*seen, Beside(rank=0, size=2, device=CPU, theirs=theirs))


@pytest.fixture
def settle(tiny_checkpoint, store, monkeypatch):
    """`settle` as on a GPU with `allow[0]` bytes; the memory that settings take there."""
    checkpoint = Checkpoint(str(tiny_checkpoint))
    data, allow, works = CachedDataset([store], checkpoint), [2**40], []
    monkeypatch.setattr(auto_settings, "cap_memory", lambda budget, device: allow[0])
    of = auto_settings.Workload.of
    monkeypatch.setattr(
        auto_settings, "Workload", SimpleNamespace(of=lambda *a, **k: works.append(of(*a, **k)) or works[-1])
    )

    def run(world=None, *, cap=2**40, resumed=False, **changes):
        allow[0] = cap
        config = TrainConfig(stores=(str(store),), model=str(tiny_checkpoint), out="run", steps=3, **changes)
        world = world or World(rank=0, size=1, device=torch.device("cuda"))
        return auto_settings.settle(config, checkpoint, data, world, resumed=resumed)

    def taken(micro_batch, checkpointing=False):
        return memory_plan(works[-1], draws=1, micro_batch=micro_batch, checkpointing=checkpointing).device_bytes

    return run, taken


def test_processes_take_what_the_one_with_the_least_room_planned(settle):
    run, _ = settle
    world = Beside(rank=0, size=2, device=torch.device("cuda"), theirs={"plan": (1, True)})
    settled, plan = run(world)
    assert (settled.micro_batch, settled.checkpointing) == (1, True)
    assert (plan.micro_batch, plan.checkpointing) == (1, True)
    assert run(Beside(rank=0, size=2, device=torch.device("cuda")))[0].micro_batch == 4


def test_a_run_that_no_longer_fits_is_told_what_may_still_change(settle):
    run, taken = settle
    run()
    cap = taken(1)
    assert cap < taken(8, checkpointing=True)
    given = {"micro_batch": 8, "checkpointing": True}
    with pytest.raises(UsageError, match=r"(?s)^run does not fit as it was begun: .*\nPass --micro-batch \d") as caught:
        run(cap=cap, resumed=True, **given)
    assert "--batch-size" not in str(caught.value)
    with pytest.raises(UsageError, match=r"must stay: free GPU memory, raise --memory-budget") as caught:
        run(cap=1000, resumed=True, **given)
    assert "--batch-size" not in str(caught.value)


def test_damage_in_the_first_batches_is_left_out_of_their_timing(tiny_checkpoint, store, tmp_path):
    broken = shutil.copytree(store, tmp_path / "broken")
    reader = CacheReader(broken)
    chunk = sorted((broken / reader.record(reader.sample_ids[0]).folder / "kv").glob("c.*"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    checkpoint = Checkpoint(str(tiny_checkpoint))
    data, given = CachedDataset([broken], checkpoint), {"model": str(tiny_checkpoint), "out": "run", "steps": 3}
    for on_damage in ("skip", "stop"):
        config = TrainConfig(stores=(str(broken),), on_damage=on_damage, **given)
        if on_damage == "skip":
            assert auto_settings._delivery_seconds(config, data, checkpoint, CPU, 2) > 0
        else:
            with pytest.raises(CorruptSampleError):
                auto_settings._delivery_seconds(config, data, checkpoint, CPU, 2)
