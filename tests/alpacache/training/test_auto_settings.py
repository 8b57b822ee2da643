"""What a run settles before its first step: alike in all processes, and as it was begun."""

import shutil
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

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
from alpacache.training.auto_settings import batch_seconds
from alpacache.training.config import TrainConfig
from alpacache.training.data_order import DamagedSamples
from alpacache.training.run_directory import RunCheckpoint, RunDirectory
from alpacache.training.run_inputs import RunInputs
from alpacache.training.train import _with_kept_settings
from cache_store import CacheReader, CorruptSampleError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("run_plan") / "store"
    config = ExtractConfig(source="synthetic:4", model=str(tiny_checkpoint), store=str(path), frames=1, device="cpu")
    alpacache.extract(config)
    return path


def test_a_batch_beyond_the_data_is_refused_before_anything_is_made(tiny_checkpoint, store, tmp_path):
    common = {"stores": (str(store),), "model": str(tiny_checkpoint), "out": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(UsageError, match="batch_size is 65536; expected at most 4, as many as the stores have samples"):
        alpacache.train(TrainConfig(**common, steps=1, batch_size=65536))
    with pytest.raises(UsageError, match=r"epochs is 1e-09; expected at least 0\.75, one batch of 3 of 4 samples"):
        alpacache.train(TrainConfig(**common, epochs=1e-9, batch_size=3))
    assert not list(tmp_path.iterdir())


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
    values = {"steps": 3, "micro_batch": 2} | changes
    settings = asdict(_with_kept_settings(TrainConfig(stores=paths, model="tiny", out="run", **values)))
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
    ("one", "other"),
    [
        ({"steps": None, "epochs": 3}, {"steps": 3, "epochs": None}),
        ({"steps": 40}, {"steps": 40, "warmup": 4}),
        ({"steps": None, "epochs": 40.0, "warmup": 4}, {"steps": 40}),
        ({"trainable": "lora"}, {"trainable": "lora", "lora_alpha": 32.0}),
        ({"trainable": "head", "lora_rank": 4, "resume": True}, {"trainable": "head"}),
        ({"seed": 0, "draws": 1, "betas": [0.9, 0.999]}, {"keep": 9, "save_every": 1, "ema": 0.9}),
    ],
)
def test_equal_settings_in_another_form_are_equal(one, other):
    """Two samples in batches of 8: an epoch is 0.25 steps."""
    for first, second in ((one, other), (other, one)):
        if first.get("epochs"):
            first = first | {"epochs": first["epochs"] * 4}
        if second.get("epochs"):
            second = second | {"epochs": second["epochs"] * 4}
        resume_check.check_unchanged(record(ONE, **first), record(ONE, **second), run="run")


def test_what_an_older_version_left_open_is_not_compared_and_a_real_change_named():
    before = record(ONE) | {"optimizer": "auto"}
    resume_check.check_unchanged(before, record(ONE) | {"optimizer": "adamw"}, run="run")
    with pytest.raises(UsageError, match=r"optimizer: the run has 'adamw', now 'adamw8'"):
        resume_check.check_unchanged(before | {"optimizer": "adamw"}, record(ONE) | {"optimizer": "adamw8"}, run="run")
    former = {key: value for key, value in before.items() if key != "label_rule"}
    resume_check.check_unchanged(former, former | {"label_rule": "unguarded"}, run="run")
    former = {key: value for key, value in former.items() if key != "prefix"}
    resume_check.check_unchanged(former, former | {"prefix": "direct"}, run="run")
    with pytest.raises(UsageError, match="prefix: the run has 'direct', now 'mix'"):
        resume_check.check_unchanged(former, former | {"prefix": "mix"}, run="run")
    with pytest.raises(UsageError, match="label_rule: the run has 'unguarded', now 'guarded'"):
        resume_check.check_unchanged(former, former | {"label_rule": "guarded"}, run="run")
    with pytest.raises(UsageError, match=r"steps: the run has 3, now 4\nRepeat"):
        resume_check.check_unchanged(record(ONE), record(ONE, steps=None, epochs=16.0), run="run")


def test_what_a_run_was_begun_with_need_not_be_repeated(tmp_path, run_state):
    state = run_state(average={"decay": 0.9, "behind": 1}, free_settings={"ema_every": 4})
    state["settings"] |= {"draws": 4, "seed": 7}
    RunDirectory(tmp_path).save(1, RunCheckpoint(model={}, optimizer={}, state=state), keep=1)
    config = TrainConfig(stores=("s",), model="m", out=str(tmp_path), steps=3, resume=True)

    def found(config):
        names = ("seed", "draws", "ema", "ema_every", "label_rule")
        return [getattr(_with_kept_settings(config), name) for name in names]

    # The run is one of before labels had a rule.
    assert found(config) == [7, 4, 0.9, 4, "unguarded"]
    assert found(replace(config, seed=0, ema=0.5, label_rule="guarded")) == [0, 4, 0.5, 4, "guarded"]
    assert found(replace(config, resume=False)) == [0, 1, None, 100, "guarded"]
    assert _with_kept_settings(config).prefix == "direct"  # nor was there a choice of prefixes


def test_settings_that_differ_from_the_last_call_are_told():
    before = resume_check.free_settings({"keep": 2, "stores": ("a",), "ema": None, "seed": 1, "resume": False})
    assert before == {"keep": 2, "stores": ["a"], "ema": None}
    now = resume_check.free_settings({"keep": 1, "stores": ("a",), "ema": 0.9, "patience": 3})
    assert resume_check.differing_settings(before, now) == ["keep 2 -> 1", "ema null -> 0.9"]


def test_places_on_this_machine_are_recorded_whole_and_compared_so(tmp_path, monkeypatch):
    for name in ("owner/model", "store", "other=0.5x", "val"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    stores = ("store=2", "other=0.5x", "s3://bucket/store=3", "away")
    typed = TrainConfig(model="owner/model", stores=stores, val="val", out="run", steps=1)
    whole = typed.with_absolute_places()
    assert (whole.model, whole.val, whole.out) == (f"{tmp_path}/owner/model", f"{tmp_path}/val", "run")
    assert whole.stores == (f"{tmp_path}/store=2", f"{tmp_path}/other=0.5x", "s3://bucket/store=3", "away")
    assert replace(typed, model="nvidia/model").with_absolute_places().model == "nvidia/model"
    before, now = (resume_check.free_settings(asdict(config)) for config in (typed, whole))
    assert resume_check.differing_settings(before, now) == []  # as older versions recorded it
    monkeypatch.chdir("/")
    assert whole.with_absolute_places() == whole
    assert len(resume_check.differing_settings(before, now)) == 3


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
    out = tmp_path / "run"
    config = TrainConfig(stores=(str(store),), model=str(tiny_checkpoint), out=str(out), steps=3, batch_size=4, seed=0)
    world = Beside(rank=0, size=2, device=CPU)
    assert RunInputs.of(config, world).total == 3
    with pytest.raises(UsageError, match=f"2 processes of .* do not see the same:\n  {message}\nNothing was changed"):
        RunInputs.of(config, replace(world, theirs=theirs))


GPU = torch.device("cuda")
OPEN = {"draws": 1, "micro_batch": None, "checkpointing": None}


@pytest.fixture(scope="module")
def work(tiny_checkpoint, store):
    """Eight samples a step."""
    checkpoint = Checkpoint(str(tiny_checkpoint))
    data = CachedDataset([store], checkpoint)
    sizes = expert_sizes(checkpoint.shapes(*EXPERT_PARTS), "all", 16)
    settings = {"trainable": "all", "batch_size": 8, "optimizer": "adamw8", "compiled": True, "validates": False}
    return Workload(**sizes, layout=data.layout, longest=data.longest, **settings)


def settle(work, asked=OPEN, world=None, *, cap=2**40, run="none", batch_s=0.0):
    """The plan where a GPU has `cap` bytes of room."""
    world, given = world or World(rank=0, size=1, device=GPU), {"budget_bytes": None, "batch_seconds": lambda: batch_s}
    with mock.patch.object(auto_settings, "cap_memory", return_value=cap):
        return auto_settings.settle(work, world, RunDirectory(run), **asked, **given)


def settled(plan):
    return plan.draws, plan.micro_batch, plan.checkpointing


def test_open_settings_get_values_on_a_gpu(work, monkeypatch):
    monkeypatch.setattr(auto_settings, "gpu_speed", lambda number: GPUS["h100"])
    open_draws = OPEN | {"draws": "auto"}
    assert settled(settle(work, open_draws, batch_s=1e9)) == (MAX_DRAWS, 8, False)
    assert settle(work, open_draws).draws == 1
    assert settled(settle(work, {"draws": 2, "micro_batch": 3, "checkpointing": True})) == (2, 3, True)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A GPU and its bus as if they had been measured."""
    monkeypatch.setattr(auto_settings, "gpu_speed", lambda number: GPUS["h100"])
    monkeypatch.setattr(auto_settings, "bus_speed", lambda number: 25e9)


def test_state_goes_to_ram_where_there_is_no_room_and_one_process(released, monkeypatch):
    work = released(longest=880)
    plan = settle(work, OPEN | {"draws": 1}, cap=int(11.5 * 2**30))
    assert plan.streamed_layers > 0
    with pytest.raises(UsageError, match="training would take"):
        settle(work, OPEN | {"draws": 1}, Beside(rank=0, size=2, device=GPU), cap=int(11.5 * 2**30))
    monkeypatch.setattr(auto_settings, "available_bytes", lambda: 2**30)
    with pytest.raises(UsageError, match=r"GiB would be page-locked in RAM, .* optimizer state .* 1\.00 GiB are"):
        settle(work, OPEN | {"draws": 1}, cap=int(11.5 * 2**30))


def test_all_that_is_page_locked_has_to_fit_ram(released, monkeypatch):
    """Batches too, and samples that stay in RAM, of all processes of this machine."""
    work, settings = released(longest=880), OPEN | {"draws": 1}
    plan = settle(work, settings, cap=int(11.5 * 2**30))
    batches = plan.pinned - plan.streamed
    assert min(batches, plan.streamed) > 2**28
    monkeypatch.setattr(auto_settings, "available_bytes", lambda: plan.pinned - 1)
    with pytest.raises(UsageError, match=r"lower --batch-size, raise --memory-budget, or use --trainable lora\."):
        settle(work, settings, cap=int(11.5 * 2**30))
    monkeypatch.setattr(auto_settings, "available_bytes", lambda: batches)
    assert settle(work, settings).streamed == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"are available\. Free RAM, or lower --batch-size\."):
        settle(work, settings)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(UsageError, match=r"are available\. Free RAM, or leave --in-memory out\."):
        settle(replace(work, pinned_bytes=batches + 1), settings)


def test_a_cpu_has_room_for_everything(work):
    alone = World(rank=0, size=1, device=CPU)
    assert settled(settle(work, OPEN | {"draws": "auto"}, alone, cap=0)) == (1, 8, False)
    assert settled(settle(work, {"draws": 3, "micro_batch": 99, "checkpointing": True}, alone, cap=0)) == (3, 8, True)


@pytest.fixture
def begun(tmp_path, run_state):
    """A run of one process that was begun with 4 draws and micro-batches of 2."""
    state = run_state()
    state["settings"] |= {"draws": 4, "micro_batch": 2, "processes": 1}
    RunDirectory(tmp_path / "begun").save(1, RunCheckpoint(model={}, optimizer={}, state=state), keep=1)
    return tmp_path / "begun"


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_was_left_open_is_restored_where_the_run_has_as_many_processes(work, begun, device):
    open_draws, alone = OPEN | {"draws": "auto"}, World(rank=0, size=1, device=device)
    assert settled(settle(work, open_draws, alone, run=begun)) == (4, 2, False)
    assert settled(settle(work, open_draws, Beside(rank=0, size=2, device=device), run=begun)) == (4, 8, False)
    given = {"draws": 3, "micro_batch": 1, "checkpointing": True}
    assert settled(settle(work, given, alone, run=begun)) == (3, 1, True)


def test_processes_take_what_the_one_with_the_least_room_planned(work):
    assert settled(settle(work, world=Beside(rank=0, size=2, device=GPU, theirs={"plan": (1, True)}))) == (1, 1, True)
    assert settle(work, world=Beside(rank=0, size=2, device=GPU)).micro_batch == 8


def test_a_run_that_no_longer_fits_is_told_what_may_still_change(work, begun):
    cap = memory_plan(work, draws=1, micro_batch=1, checkpointing=False).device_bytes
    assert cap < memory_plan(work, draws=1, micro_batch=8, checkpointing=True).device_bytes
    given = {"draws": 1, "micro_batch": 8, "checkpointing": True}
    with pytest.raises(UsageError, match=r"(?s)does not fit as it was begun: .*\nPass --micro-batch \d") as caught:
        settle(work, given, cap=cap, run=begun)
    assert "--batch-size" not in str(caught.value)
    with pytest.raises(UsageError, match=r"must stay: free GPU memory, raise --memory-budget") as caught:
        settle(work, given, cap=1000, run=begun)
    assert "--batch-size" not in str(caught.value)


def test_damage_in_the_first_batches_is_left_out_of_their_timing(tiny_checkpoint, store, tmp_path):
    broken = shutil.copytree(store, tmp_path / "broken")
    reader = CacheReader(broken)
    chunk = sorted((broken / reader.record(reader.sample_ids[0]).folder / "kv").glob("c.*"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    checkpoint = Checkpoint(str(tiny_checkpoint))
    data = CachedDataset([broken], checkpoint)
    order, space = GlobalOrder(0, len(data)), action_space(checkpoint)
    damaged, stopping = DamagedSamples(data, "skip"), DamagedSamples(data, "stop")
    assert batch_seconds(data, space, order, damaged, batch_size=2, device=CPU) > 0
    assert len(damaged.indices) == 1
    with pytest.raises(CorruptSampleError):
        batch_seconds(data, space, order, stopping, batch_size=2, device=CPU)


def test_out_of_memory_advises_what_takes_less(released):
    """A smaller micro-batch rules two backwards out, and takes more memory then."""
    for backwards, checkpointing, told in (
        (1, False, "go on with --resume --micro-batch 4 --checkpointing"),
        (2, False, "go on with --resume --checkpointing"),
        (2, True, "go on with --resume and a larger --memory-budget"),
    ):
        plan = memory_plan(
            released(batch_size=8), draws=1, micro_batch=8, checkpointing=checkpointing, backwards=backwards
        )
        error = auto_settings.out_of_memory(torch.OutOfMemoryError("none"), plan, 0, resumable=True)
        assert f"{told};" in str(error)
