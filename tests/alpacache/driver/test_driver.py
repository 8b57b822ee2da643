"""A driver gives the paths of an evaluation, bit for bit, from pictures and poses alone, and says what it lacks."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driver.driver import load_driver
from alpacache.driving.poses import interpolate
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, CheckpointError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.inference.prediction import eval_noise, predict_actions, predict_ahead, to_paths
from alpacache.sources.registry import open_source
from alpacache.sources.synthetic import SyntheticSource
from alpacache.training.config import TrainConfig

pytestmark = pytest.mark.system  # whole drives with a tiny model

T0_US = 5_100_000
PATHS = {"paths": 3, "flow_steps": 4}
CAMERAS = {
    "r1": ("camera_front_wide_120fov",),
    "1.5": ("camera_cross_left_120fov", "camera_front_wide_120fov"),
    "2": ("camera_front_wide_120fov",),
}


def recording(source, clip_id, *, cameras, until_us=T0_US, from_us=3_000_000):
    """What a car has recorded so far: frames `[cameras, n, H, W, 3]`, their times, poses `[m, 7]`, their times."""
    track = source.track(clip_id)
    past = (track.timestamps_us <= until_us) & (track.timestamps_us >= from_us)
    stamps = track.timestamps_us[past]
    recent = stamps[-9:]  # 20 Hz
    frames = np.stack([source.film(clip_id, name, recent).transpose(0, 2, 3, 1) for name in cameras])
    return frames, recent, np.concatenate([track.xyz, track.quaternion_xyzw], axis=1)[past], stamps


@pytest.fixture(scope="module", params=["r1", "1.5"])
def story(request, tiny_checkpoint, tiny_checkpoint_15, tiny_checkpoint_2, tmp_path_factory):
    """Family, model, source, and a store of two clips with what is needed to run on it."""
    model = {"r1": tiny_checkpoint, "1.5": tiny_checkpoint_15, "2": tiny_checkpoint_2}[request.param]
    cameras, store = CAMERAS[request.param], tmp_path_factory.mktemp("driver") / "store"
    alpacache.extract(
        ExtractConfig(source="synthetic:2", model=str(model), store=str(store), cameras=cameras, frames=2, device="cpu")
    )
    return str(model), SyntheticSource(2, cameras=cameras), cameras, str(store)


def evaluated(model, store, expert, index=0):
    """Id, actions and paths of a stored sample, as `eval` predicts them one by one."""
    data = CachedDataset([store], Checkpoint(model))
    settings = PATHS | {"flow_steps": (PATHS["flow_steps"],)}
    (predicted,) = predict_ahead(expert, data, [index], seed=5, batch_size=1, **settings)
    actions = predicted.actions[0]
    return data.sample_id(index), actions[0], *to_paths(expert.action_space, actions[0], *data.poses(index)[:2])


@pytest.mark.parametrize("story", ["r1", "1.5", "2"], indirect=True)
def test_paths_are_those_of_an_evaluation_to_the_bit(story):
    model, source, cameras, store = story
    driver = load_driver(model, device="cpu", frames=2)
    for index, clip_id in enumerate(source.clip_ids):
        sample_id, actions, xyz, rot = evaluated(model, store, driver._expert, index)
        assert sample_id == f"{clip_id}@{T0_US}#0"
        live = driver(*recording(source, clip_id, cameras=cameras), cameras=cameras, seed=5, name=clip_id, **PATHS)
        assert np.array_equal(live.actions, actions.numpy())
        assert np.array_equal(live.xyz, xyz)
        assert np.array_equal(live.rot, rot)
        assert live.times_us[[0, -1]].tolist() == [T0_US + 100_000, T0_US + 6_400_000]
        again = driver(
            *recording(source, clip_id, cameras=cameras), cameras=cameras, noise=noise_of(sample_id), **PATHS
        )
        assert np.array_equal(again.xyz, live.xyz)


def test_mirrored_views_give_the_paths_of_their_copies(tiny_checkpoint):
    source, cameras = SyntheticSource(1), CAMERAS["r1"]
    driver = load_driver(tiny_checkpoint, device="cpu")
    frames, times, *poses = recording(source, source.clip_ids[0], cameras=cameras)
    bgr = np.ascontiguousarray(frames[:, ::2, ..., ::-1])  # 10 Hz: chosen without a copy
    flipped, copied = (
        driver(each, times[::2], *poses, cameras=cameras, **PATHS) for each in (bgr[..., ::-1], bgr[..., ::-1].copy())
    )
    assert np.array_equal(flipped.actions, copied.actions)


def test_calls_in_and_out_of_inference_mode_agree(tiny_checkpoint):
    source, cameras = SyntheticSource(1), CAMERAS["r1"]
    given = recording(source, source.clip_ids[0], cameras=cameras)
    driver = load_driver(tiny_checkpoint, device="cpu", frames=1)
    with torch.inference_mode():
        inside = driver(*given, cameras=cameras, **PATHS)
    outside = driver(*given, cameras=cameras, **PATHS)
    assert np.array_equal(inside.actions, outside.actions)


def test_weights_are_checked_once_whichever_way_they_come_first(tiny_checkpoint):
    source, cameras = SyntheticSource(1), CAMERAS["r1"]
    frames, times, *_ = recording(source, source.clip_ids[0], cameras=cameras)
    track = source.track(source.clip_ids[0])
    observer = load_driver(tiny_checkpoint, device="cpu", frames=1).observer
    sample = observer.look(frames, times, track, cameras=cameras, t0_us=T0_US).sample
    checked = []
    observer._checks = checked.append
    observer.see_together([sample], [track])
    assert checked == [observer.checkpoint]
    observer.see(sample, track)
    assert checked == [observer.checkpoint]


def test_an_expert_alone_asks_for_its_vlm(tiny_checkpoint, tmp_path):
    alone = shutil.copytree(tiny_checkpoint, tmp_path / "alone")
    tensors = {}
    for shard in alone.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (alone / INDEX).unlink()
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("vlm.")}
    save_file(rest, alone / "model.safetensors")
    for vlm in (None, str(alone)):
        with pytest.raises(CheckpointError, match=r"alone holds no VLM: .* as --vlm MODEL, in Python") as caught:
            load_driver(alone, device="cpu", vlm=vlm)
        assert "\n" not in str(caught.value)
    assert load_driver(alone, device="cpu", vlm=str(tiny_checkpoint)).observer.frames == 4


def test_what_load_driver_cannot_take_is_refused_before_anything_is_read():
    for given, match in (
        ({"frames": 2.5}, "frames is 2.5; expected 1 to 4"),
        ({"frames": "2"}, "frames is '2'; expected 1 to 4"),
        ({"memory_budget": "12GB"}, "memory_budget is '12GB'; expected a whole number of bytes"),
        ({"blank": "front_tele"}, "blank is 'front_tele'; expected a list of names"),
        ({"average": True}, "average takes a run's average of the weights, and no run is named"),
    ):
        with pytest.raises(UsageError, match=match):
            load_driver("nowhere", device="cpu", **given)


def test_an_expert_of_ones_own_size_drives_as_it_is_evaluated(story, tmp_path):
    model, source, cameras, store = story
    values = {"steps": 1, "batch_size": 1, "warmup": 0, "device": "cpu", "track": "none", "from_scratch": True}
    run = str(tmp_path / "run")
    alpacache.train(TrainConfig(stores=(store,), model=model, out=run, expert_map=(3, 1, 1), expert_width=32, **values))
    driver, clip_id = load_driver(model, run, device="cpu"), source.clip_ids[0]
    assert driver._expert.prefix_layers == (1, 3)
    sample_id, actions, *_ = evaluated(model, store, driver._expert)
    live = driver(*recording(source, clip_id, cameras=cameras), cameras=cameras, seed=5, name=clip_id, **PATHS)
    assert np.array_equal(live.actions, actions.numpy())
    assert sample_id.startswith(clip_id)


def noise_of(sample_id):
    return eval_noise(5, [sample_id], PATHS["paths"])[0]


def test_the_world_frame_places_the_first_waypoint_before_the_car(story):
    model, source, cameras, _ = story
    driver, clip_id = load_driver(model, device="cpu", frames=1), source.clip_ids[0]
    frames, times, poses, stamps = recording(source, clip_id, cameras=cameras)
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned = poses.copy()
    turned[:, :3] = poses[:, :3] @ quarter.T + [100, 200, 3]
    turned[:, 3:] = [(0.0, 0.0, np.sin(a), np.cos(a)) for a in np.arctan2(poses[:, 5], poses[:, 6]) + np.pi / 4]
    here, there = (
        driver(frames, times, given, stamps, cameras=cameras, name=clip_id, **PATHS) for given in (poses, turned)
    )
    assert np.abs(here.xyz - there.xyz).max() < 1e-3
    (xyz, rot), (moved, _) = here.in_world(), there.in_world()
    assert np.abs(moved - (xyz @ quarter.T + [100, 200, 3])).max() < 1e-3
    step = xyz[0, 0] - poses[-1, :3]
    speed = np.linalg.norm(poses[-1, :3] - poses[-3, :3])
    assert np.linalg.norm(step) == pytest.approx(speed, abs=0.3)
    assert rot.shape == (3, 64, 3, 3)
    space = driver._expert.action_space
    assert here.controls[..., 0] == pytest.approx(here.actions[..., 0] * space.accel_std + space.accel_mean, abs=1e-5)


def test_poses_and_frames_come_at_any_rate(story):
    """A drive resampled at a rate that meets no instant of the model gives nearly the same path."""
    model, source, cameras, _ = story
    driver, clip_id = load_driver(model, device="cpu", frames=2), source.clip_ids[1]
    frames, times, poses, stamps = recording(source, clip_id, cameras=cameras)
    expected = driver(frames, times, poses, stamps, cameras=cameras, name=clip_id, **PATHS)
    track = source.track(clip_id)
    wanted = np.arange(T0_US + 20_000, 3_300_000, -33_333)[::-1].astype(np.int64)
    xyz, rot = interpolate(track, wanted)
    other = np.concatenate([xyz, Rotation.from_matrix(rot).as_quat()], axis=1)
    got = driver(frames, times, other, wanted, cameras=cameras, name=clip_id, t0_us=T0_US, **PATHS)
    assert np.abs(got.xyz - expected.xyz).max() < 0.05


def test_the_newest_frame_stands_for_a_moment_shortly_after_it(story):
    model, source, cameras, _ = story
    clip_id = source.clip_ids[1]
    frames, times, _, _ = recording(source, clip_id, cameras=cameras)
    track = source.track(clip_id)
    for count, driver in ((n, load_driver(model, device="cpu", frames=n)) for n in (1, 2)):
        for late in (1, 50_000, 200_000):
            look = {"cameras": cameras, "t0_us": T0_US + late, "name": clip_id}
            sample = driver.look(frames[:, -3:], times[-3:], track, **look).sample
            assert sample.frame_timestamps_us[:, -1].tolist() == [T0_US] * len(cameras)
            assert np.array_equal(sample.frames[:, -1], frames[:, -1].transpose(0, 3, 1, 2))
            assert sample.frames.shape[1] == count
        with pytest.raises(BadClipError, match="frames cover"):
            driver.look(frames[:, -3:], times[-3:], track, cameras=cameras, t0_us=T0_US + 300_001, name=clip_id)


def test_what_is_missing_is_named_with_its_place(story):
    model, source, cameras, _ = story
    driver, clip_id = load_driver(model, device="cpu", frames=4), source.clip_ids[0]
    frames, times, poses, stamps = recording(source, clip_id, cameras=cameras)

    def refused(match, *arrays, kind=BadClipError, **changes):
        with pytest.raises(kind, match=match) as caught:
            driver(*arrays, **{"cameras": cameras, "name": "log-7", **changes})
        assert "\n" not in str(caught.value)

    refused(
        r"log-7 at 5.100 s: camera_\w+: frames cover 5.000 s to 5.100 s, but 4.800 s",
        frames[:, -3:],
        times[-3:],
        poses,
        stamps,
    )
    refused(
        r"log-7: poses end at 4.900 s, before the moment to drive from, 5.100 s", frames, times, poses[:-4], stamps[:-4]
    )
    refused(r"log-7: frames end at 4.850 s, 0.250 s before the newest pose", frames[:, :-5], times[:-5], poses, stamps)
    refused(r"log-7 at 5.100 s: poses cover 4.600 s to 5.100 s, but 3.600 s", frames, times, poses[-11:], stamps[-11:])
    refused(
        r"expected uint8 RGB \[cameras, n, H, W, 3\]",
        frames.transpose(0, 1, 4, 2, 3),
        times,
        poses,
        stamps,
        kind=UsageError,
    )
    refused(r"frame times are \[8\] for frames", frames, times[1:], poses, stamps, kind=UsageError)
    refused(r"frame times are float64", frames, times / 1e6, poses, stamps, kind=UsageError)
    refused(r"poses are \[\d+, 3\]", frames, times, poses[:, :3], stamps, kind=UsageError)
    refused(r"unknown camera", frames, times, poses, stamps, cameras=["bonnet"] * len(cameras), kind=UsageError)
    bad = poses.copy()
    bad[-2, 0] = np.nan
    refused(r"log-7 at 5.100 s: 1 of \d+ poses hold NaN", frames, times, bad, stamps)
    refused(
        r"expected \[3, 64, 2\]", frames, times, poses, stamps, noise=torch.zeros(2, 64, 2), paths=3, kind=UsageError
    )
    refused(r"paths is 0", frames, times, poses, stamps, paths=0, kind=UsageError)
    thin = np.zeros((*frames.shape[:2], 4, 900, 3), np.uint8)
    refused(r"log-7@5100000#0: an image of 4x900 is degenerate", thin, times, poses, stamps)
    refused(r"log-7: frames make no array", [list(frames[0]), [1]], times, poses, stamps, kind=UsageError)
    refused(r"log-7: poses make no array", frames, times, "abc", stamps, kind=UsageError)
    refused(r"noise holds NaN", frames, times, poses, stamps, noise=np.full((6, 64, 2), np.nan), kind=UsageError)
    if driver.observer.takes_routes:
        refused(r"log-7 at 5.100 s: its route cannot go", frames, times, poses, stamps, route="<|im_end|>")
        late = np.stack([times - 400_000, times])
        refused(r"camera_cross_left_120fov shows 0.400 s before", frames, late, poses, stamps)
    else:
        refused(r"whose prompt has no place for a route", frames, times, poses, stamps, route="left", kind=UsageError)


@pytest.mark.ci
def test_a_run_drives_with_its_tensors_and_its_stores_prompt(story, tiny_checkpoint, tiny_checkpoint_15, tmp_path):
    model, source, cameras, store = story
    run = tmp_path / "run"
    common = {"stores": (store,), "model": model, "steps": 2, "batch_size": 2, "lr": 1e-2, "device": "cpu"}
    alpacache.train(TrainConfig(out=str(run), trainable="lora", lora_rank=2, ema=0.5, **common))
    base, trained, averaged = (
        load_driver(model, device="cpu"),
        load_driver(model, run, device="cpu"),
        load_driver(model, run, device="cpu", average=True),
    )
    assert (base.observer.frames, trained.observer.frames) == (4, 2)
    sample_id, actions, *_ = evaluated(model, store, trained._expert)
    clip_id = SampleRef.parse(sample_id).clip_id
    given = {"cameras": cameras, "seed": 5, "name": clip_id, **PATHS}
    live = [one(*recording(source, clip_id, cameras=cameras), **given) for one in (trained, averaged)]
    assert np.array_equal(live[0].actions, actions.numpy())
    assert not np.array_equal(live[0].actions, live[1].actions)
    beside = load_driver(model, device="cpu", frames=2).alongside(str(run))
    assert np.array_equal(beside(*recording(source, clip_id, cameras=cameras), **given).actions, live[0].actions)
    other = {str(tiny_checkpoint): tiny_checkpoint_15, str(tiny_checkpoint_15): tiny_checkpoint}[model]
    with pytest.raises(UsageError, match="was trained on another base model than"):
        load_driver(str(other), run, device="cpu")
    with pytest.raises(UsageError, match="neither a run directory with a checkpoint"):
        load_driver(model, tmp_path, device="cpu")


def test_streamed_layers_give_the_same_paths(story, monkeypatch):
    model, source, cameras, _ = story
    clip_id = source.clip_ids[0]
    given = recording(source, clip_id, cameras=cameras)
    resident, sizes = load_driver(model, device="cpu"), geometry_of(Checkpoint(model)).vlm
    budget = sum(parameter.nbytes for parameter in resident._expert.parameters())
    budget += 2 * (2 * sizes.layer_parameters + sizes.tower_parameters)
    streamed = load_driver(model, device="cpu", memory_budget=budget)
    assert type(streamed.observer._vlm).__name__ == "StreamedVLM"
    expected = resident(*given, cameras=cameras, **PATHS)
    for _ in range(2):
        assert np.array_equal(streamed(*given, cameras=cameras, **PATHS).xyz, expected.xyz)
    with pytest.raises(UsageError, match="reasoning needs the VLM's weights on the device"):
        streamed(*given, cameras=cameras, reasoning=True, **PATHS)
    with pytest.raises(UsageError, match=r"the memory budget of 0.00 GiB is too small"):
        load_driver(model, device="cpu", memory_budget=1000)
    monkeypatch.setattr("alpacache.driver.weights.available_bytes", lambda: 2**31)
    with pytest.raises(UsageError, match=r"2\.00 GiB of RAM are available, too few to read the VLM's layers through"):
        load_driver(model, device="cpu", memory_budget=budget)


def test_reasoning_gives_the_paths_of_an_evaluation_on_rollouts(tiny_checkpoint, rollout_samples, rollout_stores):
    driver, source = load_driver(tiny_checkpoint, device="cpu", frames=1), open_source("synthetic:2")
    data = CachedDataset([rollout_stores["bf16"]], Checkpoint(str(tiny_checkpoint)))
    expected = predict_actions(driver._expert, [data.load(0, tails=3)], seed=5, **PATHS)[0]
    clip_id = SampleRef.parse(data.sample_id(0)).clip_id
    cameras = CAMERAS["r1"]
    live = driver(
        *recording(source, clip_id, cameras=cameras), cameras=cameras, seed=5, name=clip_id, reasoning=True, **PATHS
    )
    assert np.array_equal(live.actions, expected.numpy())
    assert live.texts == tuple(tail.text for tail in rollout_samples[0][3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own use of torch.jit
def test_calls_on_a_gpu_agree_and_ask_for_no_memory_once_warm(tiny_checkpoint):
    source = SyntheticSource(1)
    given = recording(source, source.clip_ids[0], cameras=CAMERAS["r1"])
    call = {"cameras": CAMERAS["r1"], "paths": 2, "flow_steps": 4, "seed": 1}
    plain = load_driver(tiny_checkpoint, device="cuda", capture=False, compiled=False)(*given, **call)
    driver = load_driver(tiny_checkpoint, device="cuda")
    first = [driver(*given, **call) for _ in range(3)][-1]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    later = [driver(*given, **call) for _ in range(5)]
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    assert all(np.array_equal(one.actions, first.actions) for one in later)
    # Compiled code rounds otherwise: bfloat16 in place of float32 moves this random model's actions by a fifth.
    assert np.abs(first.actions - plain.actions).mean() < 0.3 * np.abs(plain.actions).mean()


def test_black_pictures_of_a_runs_stores_are_filled_in(tiny_checkpoint, tmp_path):
    store, blank = str(tmp_path / "store"), ("camera_cross_left_120fov",)
    common = {"model": str(tiny_checkpoint), "device": "cpu"}
    alpacache.extract(
        ExtractConfig(source="synthetic:1", store=store, cameras=CAMERAS["r1"], blank=blank, frames=1, **common)
    )
    run = str(tmp_path / "run")
    alpacache.train(TrainConfig(stores=(store,), out=run, steps=1, batch_size=1, trainable="head", **common))
    driver, source = load_driver(tiny_checkpoint, run, device="cpu"), SyntheticSource(1)
    assert (driver.observer.frames, driver.observer.blank) == (1, blank)
    expected = evaluated(str(tiny_checkpoint), store, driver._expert)[1]
    given, name = recording(source, source.clip_ids[0], cameras=CAMERAS["r1"]), source.clip_ids[0]
    live = driver(*given, cameras=["front_wide"], seed=5, name=name, **PATHS)
    assert np.array_equal(live.actions, expected.numpy())
    with pytest.raises(UsageError, match="in --cameras and in --blank"):
        driver(np.concatenate([given[0]] * 2), *given[1:], cameras=["cross_left", "front_wide"])
