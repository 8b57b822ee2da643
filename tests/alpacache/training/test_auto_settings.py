"""What a run settles before its first step: alike in all processes, and as it was begun."""

import shutil
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.expert import action_space
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.order import GlobalOrder
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.planning.gpus import GPUS
from alpacache.planning.memory_model import memory_plan
from alpacache.planning.workload import MAX_DRAWS, Workload, expert_sizes
from alpacache.training import auto_settings, resume_check
from alpacache.training.auto_settings import (
    SettledStep,
    StepSettings,
    batch_seconds,
    restore_auto_settings,
    settle_on_cpu,
    settle_on_gpu,
)
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunCheckpoint, RunDirectory
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
    settings = asdict(TrainConfig(stores=paths, model="tiny", out="run", steps=3, micro_batch=2, **changes))
    return resume_check.settings_record(settings, resume_check.stores_record(paths, Stores(*stores)), processes=1)


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
        resume_check.check_unchanged(record(ONE, FOUR), record(*now), run="run")


def test_stores_may_move_and_a_revision_may_be_forgotten():
    moved = record((ONE[0], identity(["front"], None)), FOUR, paths=("elsewhere/0", "elsewhere/1"), keep=7)
    resume_check.check_unchanged(record(ONE, FOUR), moved, run="run")
    with pytest.raises(UsageError, match=r"seed: the run has 0, now 1\nRepeat them"):
        resume_check.check_unchanged(record(ONE), record(ONE, seed=1), run="run")


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
    seen = {"directory": RunDirectory(tmp_path), "checkpoint": checkpoint, "val": None, "total": 3}
    seen["stores"] = resume_check.stores_record([str(store)], CachedDataset([store], checkpoint))
    world = Beside(rank=0, size=2, device=CPU)
    resume_check.check_processes_agree(world, asdict(config), **seen)
    with pytest.raises(UsageError, match=f"2 processes of run do not see the same:\n  {message}\nNothing was changed"):
        resume_check.check_processes_agree(replace(world, theirs=theirs), asdict(config), **seen)


GPU = torch.device("cuda")
OPEN = StepSettings(draws=1, micro_batch=None, checkpointing=None)


@pytest.fixture(scope="module")
def work(tiny_checkpoint, store):
    """Eight samples a step."""
    checkpoint = Checkpoint(str(tiny_checkpoint))
    data = CachedDataset([store], checkpoint)
    sizes = expert_sizes(checkpoint.shapes(*EXPERT_PARTS), "all", 16)
    settings = {"trainable": "all", "batch_size": 8, "optimizer": "adamw8", "compiled": True, "validates": False}
    return Workload(**sizes, layout=data.layout, longest=data.longest, **settings)


def settle(work, asked=OPEN, world=None, *, cap=2**40, run=None, batch_s=0.0):
    world = world or World(rank=0, size=1, device=GPU)
    return settle_on_gpu(asked, work, world, cap_bytes=cap, batch_seconds=lambda: batch_s, resumed_run=run)


def test_open_settings_get_values_on_a_gpu(work, monkeypatch):
    monkeypatch.setattr(auto_settings, "gpu_speed", lambda number: GPUS["h100"])
    open_draws = replace(OPEN, draws="auto")
    settled = settle(work, open_draws, batch_s=1e9)
    assert (settled.draws, settled.micro_batch, settled.checkpointing) == (MAX_DRAWS, 8, False)
    assert settled.plan.draws == MAX_DRAWS
    assert settle(work, open_draws).draws == 1
    settled = settle(work, StepSettings(draws=2, micro_batch=3, checkpointing=True))
    assert (settled.draws, settled.micro_batch, settled.checkpointing) == (2, 3, True)
    assert (settled.plan.draws, settled.plan.micro_batch, settled.plan.checkpointing) == (2, 3, True)


def test_on_a_cpu_nothing_is_planned():
    assert settle_on_cpu(replace(OPEN, draws="auto"), 8) == SettledStep(
        draws=1, micro_batch=8, checkpointing=False, plan=None
    )
    assert settle_on_cpu(replace(OPEN, micro_batch=99), 8).micro_batch == 8


def test_what_was_left_open_is_restored_where_the_run_has_as_many_processes(tmp_path):
    directory, alone = RunDirectory(tmp_path), World(rank=0, size=1, device=CPU)
    asked = replace(OPEN, draws="auto")
    assert restore_auto_settings(asked, directory, alone) == asked
    settings = {"draws": 4, "micro_batch": 2, "processes": 1}
    directory.save(1, RunCheckpoint(model={}, optimizer={}, state={"settings": settings}), keep=1)
    restored = restore_auto_settings(asked, directory, alone)
    assert restored == StepSettings(draws=4, micro_batch=2, checkpointing=None)
    assert restore_auto_settings(asked, directory, replace(alone, size=2)).micro_batch is None
    given = StepSettings(draws=3, micro_batch=1, checkpointing=True)
    assert restore_auto_settings(given, directory, alone) == given


def test_processes_take_what_the_one_with_the_least_room_planned(work):
    settled = settle(work, world=Beside(rank=0, size=2, device=GPU, theirs={"plan": (1, True)}))
    assert (settled.micro_batch, settled.checkpointing) == (1, True)
    assert (settled.plan.micro_batch, settled.plan.checkpointing) == (1, True)
    assert settle(work, world=Beside(rank=0, size=2, device=GPU)).micro_batch == 8


def test_a_run_that_no_longer_fits_is_told_what_may_still_change(work):
    cap = memory_plan(work, draws=1, micro_batch=1, checkpointing=False).device_bytes
    assert cap < memory_plan(work, draws=1, micro_batch=8, checkpointing=True).device_bytes
    given = StepSettings(draws=1, micro_batch=8, checkpointing=True)
    with pytest.raises(UsageError, match=r"(?s)^run does not fit as it was begun: .*\nPass --micro-batch \d") as caught:
        settle(work, given, cap=cap, run="run")
    assert "--batch-size" not in str(caught.value)
    with pytest.raises(UsageError, match=r"must stay: free GPU memory, raise --memory-budget") as caught:
        settle(work, given, cap=1000, run="run")
    assert "--batch-size" not in str(caught.value)


def test_damage_in_the_first_batches_is_left_out_of_their_timing(tiny_checkpoint, store, tmp_path):
    broken = shutil.copytree(store, tmp_path / "broken")
    reader = CacheReader(broken)
    chunk = sorted((broken / reader.record(reader.sample_ids[0]).folder / "kv").glob("c.*"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    checkpoint = Checkpoint(str(tiny_checkpoint))
    data = CachedDataset([broken], checkpoint)
    given = {"batch_size": 2, "device": CPU}
    order, space = GlobalOrder(0, len(data)), action_space(checkpoint)
    assert batch_seconds(data, space, order, **given, skip_damaged=True) > 0
    with pytest.raises(CorruptSampleError):
        batch_seconds(data, space, order, **given, skip_damaged=False)
