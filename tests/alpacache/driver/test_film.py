"""A film shows what was predicted, goes on where it was stopped, and refuses what it cannot play in words."""

from types import SimpleNamespace

import numpy as np
import pytest

import alpacache
from alpacache.directory_lock import DirectoryLock
from alpacache.driver import driver as driver_module
from alpacache.driver import film
from alpacache.driver.config import DriveConfig
from alpacache.driver.driver import Driver
from alpacache.driver.film import drive
from alpacache.driver.observer import Observer
from alpacache.driving.cameras import CAMERAS
from alpacache.errors import BadClipError, InterruptedRunError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.pictures.drive_frame import SIZE, Shown, drive_frame
from alpacache.sources.registry import open_source
from alpacache.sources.synthetic import SyntheticSource
from alpacache.training.config import TrainConfig

pytestmark = pytest.mark.system  # whole films with a tiny model


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """A run of a few steps on a store of one frame."""
    root = tmp_path_factory.mktemp("film")
    common = {"model": str(tiny_checkpoint), "device": "cpu"}
    alpacache.extract(ExtractConfig(source="synthetic:2", store=str(root / "store"), frames=1, **common))
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-2, "trainable": "head"}
    alpacache.train(TrainConfig(stores=(str(root / "store"),), out=str(root / "run"), **settings, **common))
    return str(root / "run")


def config(model, out, **settings):
    values = {"source": "synthetic:1", "begin": 5.0, "seconds": 0.6, "paths": 2, "flow_steps": 2, "device": "cpu"}
    return DriveConfig(**values | {"model": str(model), "out": str(out)} | settings)


def pictures_of(path):
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], rate


def test_base_beside_trained_and_resumed_after_a_stop(tiny_checkpoint, run, tmp_path, monkeypatch):
    out, seen, asked = tmp_path / "films" / "drive.mp4", [], []
    monkeypatch.setattr(film, "drive_frame", lambda shown: (seen.append(shown), drive_frame(shown))[1])
    predict = Driver.paths
    monkeypatch.setattr(Driver, "paths", lambda *a, **k: (asked.append(a[1].sample.ref.t0_us), predict(*a, **k))[1])

    class Guard(film.InterruptGuard):
        requested = property(lambda self: len(asked) >= 4, lambda self, value: None)

    with monkeypatch.context() as patch:
        patch.setattr(film, "InterruptGuard", Guard)
        with pytest.raises(InterruptedRunError, match="2 of 4 moments are predicted; the same command goes on"):
            drive(config(tiny_checkpoint, out, checkpoint=run))
    assert not out.exists()
    kept = sorted(path.name for path in (tmp_path / "films" / "drive.mp4.paths").glob("*.npz"))
    assert kept == ["5000000.npz", "5200000.npz"]
    report = drive(config(tiny_checkpoint, out, checkpoint=run))
    assert (report.pictures, report.resumed, report.models) == (4, 2, ("base", "trained"))
    assert asked == [t0 for t0 in (5_000_000, 5_200_000, 5_400_000, 5_600_000) for _ in range(2)]
    assert [path.name for path in out.parent.iterdir()] == ["drive.mp4"]
    pictures, rate = pictures_of(out)
    assert (len(pictures), rate, pictures[0].shape) == (4, 5, (SIZE[1], SIZE[0], 3))
    expected = drive_frame(seen[-1]).astype(float)
    assert np.abs(pictures[-1] - expected).mean() < 6
    last = seen[-1]
    assert [colour for colour, _ in last.paths.values()] == list(MODEL_COLOURS[:2])
    assert not np.array_equal(last.paths["base"][1], last.paths["trained"][1])
    assert np.abs(last.history_xyz[-1]).max() < 1e-9
    assert last.driven_xyz.shape == (64, 3)


@pytest.fixture
def stopped(tiny_checkpoint, tmp_path, monkeypatch):
    """A film that was stopped after its first moment: `out`, and the folder beside it."""
    out = tmp_path / "drive.mp4"

    class Guard(film.InterruptGuard):
        requested = property(lambda self: any(tmp_path.glob("drive.mp4.paths/*.npz")), lambda self, value: None)

    with monkeypatch.context() as patch:
        patch.setattr(film, "InterruptGuard", Guard)
        with pytest.raises(InterruptedRunError):
            drive(config(tiny_checkpoint, out, seconds=0.2))
    return out, tmp_path / "drive.mp4.paths"


def test_a_film_of_other_settings_begins_anew_and_strangers_stay(tiny_checkpoint, stopped):
    out, folder = stopped
    assert sorted(path.name for path in folder.iterdir()) == ["5000000.npz", "settings.json"]
    assert drive(config(tiny_checkpoint, out, seconds=0.2, seed=1)).resumed == 0
    assert not folder.exists()
    for name, said in (("letter.txt", "letter"), ("mine.npz", "mine"), ("settings.json", "settings")):
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(UsageError, match=rf"drive\.mp4\.paths holds {said}\.\w+, which no film keeps there"):
            drive(config(tiny_checkpoint, out, seconds=0.2))
        (folder / name).unlink()  # it is still there
        folder.rmdir()


def test_what_is_kept_is_predicted_again_where_it_is_damaged(tiny_checkpoint, stopped, caplog):
    out, folder = stopped
    kept, note = folder / "5000000.npz", folder / "settings.json"
    data, settings = kept.read_bytes(), note.read_text()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    for damaged in (b"", data[: len(data) // 2], bytes(flipped), b"\x80\x04." + data):
        folder.mkdir(exist_ok=True)
        note.write_text(settings)
        kept.write_bytes(damaged)
        assert drive(config(tiny_checkpoint, out, seconds=0.2)).resumed == 0
        assert "5000000.npz cannot be read" in caplog.text
        caplog.clear()


def test_nothing_but_a_film_is_written_over_and_nothing_lies_in_stores_and_runs(tiny_checkpoint, run, tmp_path):
    out = tmp_path / "mine.mp4"
    short = {"seconds": 0.1}
    for content in (b"", b"a letter", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"):
        out.write_bytes(content)
        with pytest.raises(UsageError, match="is there already and is no film of `alpacache drive`"):
            drive(config(tiny_checkpoint, out, **short))
        assert out.read_bytes() == content
    out.unlink()
    assert drive(config(tiny_checkpoint, out, **short)).pictures == 1
    assert drive(config(tiny_checkpoint, out, **short)).pictures == 1
    store = run.replace("run", "store")
    for place, kind in ((run, "run"), (store, "store")):
        with pytest.raises(UsageError, match=f"{place} is a {kind}; choose a directory outside of it"):
            drive(config(tiny_checkpoint, f"{place}/a.mp4", **short))
    with pytest.raises(UsageError, match=r"--out s3://bucket/a\.mp4 is no path"):
        drive(config(tiny_checkpoint, "s3://bucket/a.mp4", **short))
    with pytest.raises(UsageError, match="the name is too long"):
        drive(config(tiny_checkpoint, tmp_path / ("x" * 300 + ".mp4"), **short))


def test_a_film_has_one_owner(tiny_checkpoint, tmp_path):
    folder = tmp_path / "drive.mp4.paths"
    with (
        DirectoryLock(folder, remedy=""),
        pytest.raises(UsageError, match=r"drive\.mp4\.paths is being written by process \d+"),
    ):
        drive(config(tiny_checkpoint, tmp_path / "drive.mp4", seconds=0.1))
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_recording_is_played_without_a_future(tiny_checkpoint, tmp_path):
    report = drive(config(tiny_checkpoint, tmp_path / "end.mp4", begin=19.7, seconds=None, every=0.1, frames=2))
    assert report.pictures == 4
    assert report.clip == "synthetic-0-000000"


@pytest.mark.parametrize("frames", [1, 2])
def test_between_two_frames_the_older_one_is_seen_as_extract_takes_it(tiny_checkpoint, tmp_path, monkeypatch, frames):
    seen, see = [], Observer.see
    monkeypatch.setattr(Observer, "see", lambda self, sample, track: (seen.append(sample), see(self, sample, track))[1])
    cameras = CAMERAS[:2]
    settings = {"begin": 5.03, "seconds": 0.25, "every": 0.25, "frames": frames, "cameras": cameras}
    assert drive(config(tiny_checkpoint, tmp_path / "a.mp4", **settings)).pictures == 2
    assert [sample.ref.t0_us for sample in seen] == [5_030_000, 5_280_000]
    source = open_source("synthetic:1", cameras=cameras)
    for sample in seen:
        expected = source.load(sample.ref, cameras=cameras, frames=frames)
        assert np.array_equal(sample.frames, expected.frames)
        assert np.array_equal(sample.frame_timestamps_us, expected.frame_timestamps_us)


def test_a_hole_of_a_camera_is_left_out(tiny_checkpoint, tmp_path, monkeypatch, caplog):
    whole = SyntheticSource.frame_times_us

    def with_hole(self, clip_id, camera):
        times = whole(self, clip_id, camera)
        return times[(times <= 5_000_000) | (times >= 6_500_000)]

    monkeypatch.setattr(SyntheticSource, "frame_times_us", with_hole)
    settings = {"every": 0.4, "frames": 1}
    report = drive(config(tiny_checkpoint, tmp_path / "a.mp4", begin=5.0, seconds=2.0, **settings))
    assert (report.pictures, report.left_out) == (5, 1)
    assert "1 of 6 moments are left out; the first: synthetic-0-000000 at 6.200 s" in caplog.text
    with pytest.raises(BadClipError, match=r"is 1\.2\d\d s older; at most 1 s is taken"):
        drive(config(tiny_checkpoint, tmp_path / "b.mp4", begin=6.2, seconds=0.1, **settings))
    assert not (tmp_path / "b.mp4").exists()


def test_what_cannot_be_played_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"out is .*drive\.avi.*FILM\.mp4"):
        config(tiny_checkpoint, tmp_path / "drive.avi")
    with pytest.raises(UsageError, match="every"):
        config(tiny_checkpoint, tmp_path / "a.mp4", every=2.0)
    with pytest.raises(UsageError, match=r"synthetic:1 has no clip 'tuesday'; its first is 'synthetic-0-000000'"):
        drive(config(tiny_checkpoint, tmp_path / "a.mp4", clip="tuesday"))
    with pytest.raises(UsageError, match=r"poses and cameras cover it from 0\.0 to 20\.0 s; .* --begin is 30"):
        drive(config(tiny_checkpoint, tmp_path / "a.mp4", begin=30.0))
    for route in ("source", "turn left"):
        with pytest.raises(UsageError, match="is of family r1, whose prompt has no place for a route; leave it out"):
            drive(config(tiny_checkpoint, tmp_path / "a.mp4", route=route))
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(UsageError, match="is a directory; expected the name of a film"):
        drive(config(tiny_checkpoint, tmp_path / "taken.mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mp4"]


def test_paths_are_drawn_where_they_lead():
    """A path to the left is drawn left of the middle, in its colour, from above and in the camera's picture."""
    way = np.linspace(1, 40, 64)
    left = np.stack([way, 0.01 * way**2, np.zeros(64)], axis=1)
    lens = {"model": "pinhole", "width": 320, "height": 180, "fx": 200.0, "fy": 200.0, "cx": 160.0, "cy": 60.0}
    lens |= {"position_m": [0.8, 0.0, 1.5], "rotation": [[0, 0, 1.0], [-1.0, 0, 0], [0, -1.0, 0]]}
    shown = Shown(
        picture=np.full((3, 180, 320), 128, np.uint8),
        lens=lens,
        history_xyz=np.array([[-10.0, 0, 0], [0, 0, 0]]),
        driven_xyz=np.zeros((0, 3)),
        paths={"base": ("#ff0000", left[None])},
        caption="a long caption " * 20,
    )
    drawn = drive_frame(shown).astype(int)
    red = (drawn[..., 0] > 180) & (drawn[..., 1] < 110) & (drawn[..., 2] < 110)
    red[SIZE[1] - 34 :, :848] = False  # the legend
    columns = np.flatnonzero(red.any(axis=0))
    assert (columns < 848).any()
    assert (columns >= 848).any()
    above = red[:, 848:]
    rows, places = np.nonzero(above)
    assert places[rows == rows.min()].mean() < places[rows == rows.max()].mean() - 50
    assert places[rows == rows.max()].mean() == pytest.approx(216, abs=4)
    plain = drive_frame(Shown(**{**{name: getattr(shown, name) for name in Shown.__slots__}, "lens": None}))
    assert (plain[:440, :848] == 128).all()


@pytest.mark.parametrize(("trained", "said"), [(("crop",), True), ((), False), (None, False)])
def test_pictures_unlike_those_trained_on_are_told(tmp_path, monkeypatch, caplog, trained, said):
    def stop(*_, **__):
        raise UsageError("far enough")

    driver = SimpleNamespace(changes=trained, observer=SimpleNamespace(frames=1))
    monkeypatch.setattr(film, "_drivers", lambda *_, **__: (driver, {}))
    monkeypatch.setattr(film, "_moments", stop)
    with pytest.raises(UsageError, match="far enough"):
        drive(config("none", tmp_path / "a.mp4"))
    warned = "trained on pictures changed by crop, and those of synthetic:" in caplog.text
    assert (warned, bool(caplog.text)) == (said, said)


def test_what_a_run_was_trained_on_is_known_by_its_stores():
    def of(identity):
        return driver_module._recorded({"settings": {"stores": [{"identity": identity}]}}).changes

    assert (of({"changes": ["crop"]}), of({"frames": 4}), of({})) == (("crop",), (), None)
