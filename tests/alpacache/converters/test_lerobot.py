"""LeRobot data sets of both versions in their own layout."""

import json
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.converters.lerobot import drives
from alpacache.driving.sample import split_of
from alpacache.errors import UsageError

FRONT = "observation.images.front_left"
SPEED_MPS, RATE = 11.0, 0.08
BEGAN_NS = 1_700_000_000_000_000_000
AXES = ["speed", "heading", "heading_error", "hp_loc_latitude", "hp_loc_longitude", "hp_loc_altitude"]
PLACE = (52.5, 13.4)
ROWS = 300


def moment(row):
    """Place (m) and yaw (rad, 0 = east) of a drive at its row, 10 a second, on a circle."""
    yaw = 0.3 + RATE * np.asarray(row) / 10
    radius = SPEED_MPS / RATE
    return np.stack([radius * (np.sin(yaw) - np.sin(0.3)), radius * (np.cos(0.3) - np.cos(yaw))], axis=-1), yaw


def degrees(way):
    """Latitude and longitude by the ellipsoid's radii of curvature."""
    latitude, squared = np.deg2rad(PLACE[0]), 0.00669437999014
    bent = 1 - squared * np.sin(latitude) ** 2
    meridian, normal = 6378137 * (1 - squared) / bent**1.5, 6378137 / np.sqrt(bent)
    east, north = way.T
    there = latitude + (north - east**2 * np.tan(latitude) / (2 * normal)) / meridian
    longitude = east / (normal * np.cos(latitude)) * (1 + north / normal * np.tan(latitude))
    return np.rad2deg(there), PLACE[1] + np.rad2deg(longitude)


def episode(index, first, drive=0):
    """Rows `first` to `first + ROWS` of a drive, as columns."""
    rows = np.arange(first, first + ROWS)
    way, yaw = moment(rows)
    latitude, longitude = degrees(way)
    heading = (90 - np.rad2deg(yaw)) % 360
    vehicle = np.stack([0 * yaw + SPEED_MPS * 3.6, heading, 0 * yaw, latitude, longitude, 0 * yaw + 60], axis=1)
    texts = ["When you have the right of way, turn left" if row < 150 else "Follow the road" for row in rows]
    return {
        "observation.state.vehicle": list(vehicle.astype(np.float32)),
        "observation.state.timestamp": BEGAN_NS + drive * 10**13 + rows * 100_000_123,
        "task.instructions": texts,
        "timestamp": (np.arange(ROWS) / 10).astype(np.float32),
        "frame_index": np.arange(ROWS),
        "episode_index": np.full(ROWS, index),
    }


def film(file, frames):
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as movie:
        stream = movie.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p", options={"g": "2"})
        for number in range(frames):
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), number % 256, np.uint8))))
        movie.mux(stream.encode(None))


def write_rows(file, *episodes):
    file.parent.mkdir(parents=True, exist_ok=True)
    tables = [pa.table({name: pa.array(list(column)) for name, column in one.items()}) for one in episodes]
    pq.write_table(pa.concat_tables(tables), file)


def write_info(root, version, **paths):
    features = {
        FRONT: {"dtype": "video", "shape": [3, 1080, 1920]},
        "observation.images.map": {"dtype": "video", "shape": [3, 360, 640]},
        "observation.state.vehicle": {"dtype": "float32", "shape": [6], "names": {"axes": AXES}},
        "observation.state.timestamp": {"dtype": "int64", "shape": [1]},
        "task.instructions": {"dtype": "string", "shape": [1]},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    info = {"codebase_version": version, "fps": 10, "chunks_size": 1000, "features": features, **paths}
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.fixture
def version_2(tmp_path):
    """Windows of 30 s, each 2.7 s after the one before, and one of another drive."""
    root = tmp_path / "L2D"
    starts = [0, 27, 54, 81, 270, 297]
    write_info(
        root,
        "v2.1",
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    lines = []
    for index, first in enumerate([*starts, 0]):
        drive = int(index == len(starts))
        write_rows(root / f"data/chunk-000/episode_{index:06d}.parquet", episode(index, first, drive))
        film(root / f"videos/chunk-000/{FRONT}/episode_{index:06d}.mp4", ROWS)
        lines.append(json.dumps({"episode_index": index, "tasks": ["drive"], "length": ROWS}))
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    return root


def test_l2d_is_smoothed_and_each_moment_taken_once(version_2):
    copies, *found = drives(version_2)
    assert (copies.what, copies.count) == ("rows", 7 * ROWS - (597 + ROWS))
    times = np.concatenate([drive.track.timestamps_us for drive in found])
    assert len(np.unique(times)) == len(times) == 597 + ROWS
    first, rest, other = found
    assert (first.name, other.name) == ("L2D-000000-000", "L2D-000006")
    assert len({split_of(drive.name) for drive in (first, rest)}) == 1
    assert split_of(first.name) == split_of("L2D-000000")
    assert first.track.timestamps_us[:2].tolist() == [BEGAN_NS // 1000, (BEGAN_NS + 100_000_123) // 1000]
    way, yaw = moment(np.arange(ROWS))
    steps = np.diff(first.track.xyz[:, :2], axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1)[20:-20] * 10, SPEED_MPS, atol=0.1)
    off = first.track.xyz[:, :2] - (way - way[0])
    assert np.abs(off - off.mean(axis=0)).max() < 0.35  # places alone jump by 0.42 m
    heading = 2 * np.unwrap(np.arctan2(*first.track.quaternion_xyzw[:, 2:].T), period=np.pi)
    assert np.abs(np.rad2deg((heading - yaw + np.pi) % (2 * np.pi) - np.pi))[20:-20].max() < 0.2
    front = rest.cameras["camera_front_wide_120fov"]
    assert (front.path.name, front.first) == ("episode_000005.mp4", 4)  # of two frames one is a key frame
    assert front.times_us.tolist() == rest.track.timestamps_us[1:].tolist()
    assert [text for _, text in first.routes] == ["When you have the right of way, turn left", "Follow the road"]
    assert first.routes[1][0] == first.track.timestamps_us[150]


def test_version_3_finds_each_film_by_its_own_index(tmp_path):
    root = tmp_path / "set"
    write_info(
        root,
        "v3.0",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    write_rows(root / "data/chunk-000/file-000.parquet", episode(0, 0), episode(1, 0, drive=1))
    write_rows(root / "data/chunk-000/file-001.parquet", episode(2, 0, drive=2))
    film(root / f"videos/{FRONT}/chunk-000/file-000.mp4", ROWS)
    film(root / f"videos/{FRONT}/chunk-000/file-001.mp4", 2 * ROWS)
    table = {"episode_index": [0, 1, 2], "data/chunk_index": [0] * 3, "data/file_index": [0, 0, 1]}
    for key in (FRONT, "observation.images.map"):
        table |= {f"videos/{key}/chunk_index": [0] * 3, f"videos/{key}/file_index": [0, 1, 1]}
        table |= {f"videos/{key}/from_timestamp": [0.0, 0.0, 30.0]}
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(table), root / "meta/episodes/chunk-000/file-000.parquet")
    found = list(drives(root))
    fronts = [drive.cameras["camera_front_wide_120fov"] for drive in found]
    assert [(front.path.name, front.first) for front in fronts] == [
        ("file-000.mp4", 0),
        ("file-001.mp4", 0),
        ("file-001.mp4", 300),
    ]
    (root / f"videos/{FRONT}/chunk-000/file-000.mp4").unlink()
    alone, *_ = drives(root)
    assert (alone.cameras, alone.dropped[0].what) == ({}, "cameras")
    film(root / f"videos/{FRONT}/chunk-000/file-001.mp4", 2 * ROWS - 5)
    *_, last = drives(root)
    assert isinstance(last, Dropped)
    assert "295 of 300 frames from 30.000 s on" in last.reason


def test_columns_of_metres_by_name(tmp_path):
    root = tmp_path / "set"
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "yaw"]},
        "observation.image": {"dtype": "image", "shape": [3, 8, 8]},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    info = {"codebase_version": "v2.1", "fps": 10, "features": features, "video_path": None}
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0}\n')
    way, yaw = moment(np.arange(50))
    state = np.column_stack([way, np.rad2deg(yaw)]).astype(np.float32)
    pictures = [{"bytes": b"\xff\xd8\xff" + bytes([number]), "path": None} for number in range(50)]
    columns = {"observation.state": list(state), "observation.image": pictures}
    stamps = {"timestamp": (np.arange(50) / 10).astype(np.float32), "episode_index": np.zeros(50, np.int64)}
    write_rows(root / "data/chunk-000/episode_000000.parquet", columns | stamps)
    with pytest.raises(UsageError, match="no poses among the columns"):
        list(drives(root))
    mapped = ("x_m=observation.state.x", "y_m=observation.state[1]", "yaw_deg=observation.state.yaw")
    (drive,) = drives(root, map=mapped)
    np.testing.assert_allclose(drive.track.xyz[:, :2], way, atol=1e-5)
    np.testing.assert_allclose(2 * np.arctan2(*drive.track.quaternion_xyzw[:, 2:].T), yaw, atol=1e-6)
    assert drive.facts["clock"] == "nominal, 10 rows a second; no recorded times"
    assert list(drive.cameras["camera_front_wide_120fov"].read(3, 5)) == [b"\xff\xd8\xff\x03", b"\xff\xd8\xff\x04"]
    with pytest.raises(UsageError, match=r"there is no such column.*observation\.state"):
        list(drives(root, map=("x_m=observation.state.z",)))
    with pytest.raises(UsageError, match="speed_furlongs is unknown"):
        list(drives(root, map=("speed_furlongs=observation.state[0]",)))


@pytest.mark.parametrize("path", ["{episode_index.__class__}", "../{episode_index}", "/etc/{episode_index}", "{fps}"])
def test_paths_of_a_stranger_stay_inside(version_2, path):
    write_info(version_2, "v2.1", data_path=path, video_path="videos/{video_key}.mp4")
    with pytest.raises(UsageError, match=r"the path|not within"):
        list(drives(version_2))


def test_wrong_units_and_versions_are_refused(version_2):
    *_, last = drives(version_2, map=("preset=l2d", "speed_mps=observation.state.vehicle.speed", "speed_kmh=timestamp"))
    assert isinstance(last, Dropped)
    write_info(version_2, "v4.0", data_path="a", video_path="b")
    with pytest.raises(UsageError, match=r"4\.0; 2\.1 and 3\.0 are read"):
        list(drives(version_2))


def test_of_a_data_set_on_the_hub_only_what_is_needed_is_fetched(version_2, tmp_path, monkeypatch):
    """The cache is that of the hub's client: a folder a commit, of links to files elsewhere."""
    commit, fetched = tmp_path / "cache/snapshots/c0ffee", []

    def download(repo, name, *, revision, **options):
        assert (repo, revision, options["repo_type"]) == ("yaak-ai/L2D", "c0ffee", "dataset")
        if not (version_2 / name).is_file():
            raise OSError(f"404: {name}")
        fetched.append(name)
        (commit / name).parent.mkdir(parents=True, exist_ok=True)
        (commit / name).symlink_to(version_2 / name)
        return str(commit / name)

    def snapshot(repo, *, allow_patterns, **_):
        assert allow_patterns == ["meta/*"]
        (commit / "meta/episodes.jsonl").symlink_to(version_2 / "meta/episodes.jsonl")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo: SimpleNamespace(sha="c0ffee"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("alpacache.converters.hub_files.why_unreachable", lambda: "")
    monkeypatch.chdir(tmp_path)
    (version_2 / f"videos/chunk-000/{FRONT}/episode_000006.mp4").unlink()
    _, first, rest, gone = drives(Path("yaak-ai/L2D"))
    assert (first.name, first.facts["hub"]) == ("L2D-000000-000", "yaak-ai/L2D at c0ffee")
    assert rest.cameras["camera_front_wide_120fov"].first == 4
    assert "404: videos" in gone.reason
    films = [name for name in fetched if name.startswith("videos")]
    assert films == [f"videos/chunk-000/{FRONT}/episode_000000.mp4", f"videos/chunk-000/{FRONT}/episode_000005.mp4"]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(UsageError, match=r"the hub does not give meta/info\.json of it \(gone\)"):
        list(drives(Path("yaak-ai/other")))


@pytest.mark.parametrize("index_name", ["__index_level_0__", "task", None])
def test_texts_of_tasks_become_routes(version_2, index_name):
    """By `task_index`, of version 2.1's lines (None) or the table of version 3, whose index pandas may name."""
    if index_name is None:
        lines = [{"task_index": 0, "task": "Turn left"}, {"task_index": 1, "task": "Go straight"}]
        (version_2 / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        pq.write_table(
            pa.table({"task_index": [1, 0], index_name: ["Go straight", "Turn left"]}), version_2 / "meta/tasks.parquet"
        )
    for index in range(7):
        file = version_2 / f"data/chunk-000/episode_{index:06d}.parquet"
        table = pq.read_table(file)
        pq.write_table(table.append_column("task_index", pa.array(np.arange(ROWS) // 200)), file)
    found = [item for item in drives(version_2, map=["preset=l2d", "route=task"]) if isinstance(item, LoggedDrive)]
    assert [text for _, text in found[0].routes] == ["Turn left", "Go straight"]
    assert found[0].routes[1][0] == (BEGAN_NS + 200 * 100_000_123) // 1000


def test_what_the_index_lacks_is_said_once(version_2):
    with pytest.raises(UsageError, match=r"tasks\.jsonl cannot be read: it does not exist; texts of tasks are there"):
        list(drives(version_2, map=["preset=l2d", "route=task"]))
    (version_2 / "meta/info.json").unlink()
    with pytest.raises(UsageError) as caught:
        list(drives(version_2))
    assert str(caught.value).count("cannot be read") == 1
