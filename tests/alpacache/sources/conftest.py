"""A small recording in the folder layout: a circle driven at 10 m/s, frames whose brightness is their number."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

FRONT = "camera_front_wide_120fov"
LEFT = "camera_cross_left_120fov"
CURVATURE, SPEED = 0.02, 10.0


def table(path, **columns):
    pq.write_table(pa.table(columns), path)


def circle_poses(seconds=12.0, rate_hz=20):
    t = np.arange(int(seconds * rate_hz) + 1) / rate_hz
    yaw = SPEED * CURVATURE * t
    quat = Rotation.from_euler("z", yaw[:, None]).as_quat()
    columns = {"timestamp": np.round(t * 1e6).astype(np.int64)}
    columns |= {"x": np.sin(yaw) / CURVATURE, "y": (1 - np.cos(yaw)) / CURVATURE, "z": 0 * t}
    return columns | {name: quat[:, i] for i, name in enumerate(("qx", "qy", "qz", "qw"))}


def brightness(index):
    return 20 + 3 * (index % 70)


def write_camera(clip, camera, stamps, *, mp4=False, size=(64, 32)):
    table(clip / f"{camera}.timestamps.parquet", timestamp=stamps)
    images = [np.full((size[1], size[0], 3), brightness(i), np.uint8) for i in range(len(stamps))]
    if mp4:
        write_mp4(clip / f"{camera}.mp4", images)
        return
    (clip / camera).mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(clip / camera / f"{index:06d}.jpg", quality=95)


def write_mp4(file, images):
    import av

    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "g": "15"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="session")
def assert_same():
    """Raises unless two samples are equal in every field, arrays bit for bit."""

    def check(found, wanted):
        for field in dataclasses.fields(wanted):
            left, right = getattr(found, field.name), getattr(wanted, field.name)
            if isinstance(right, np.ndarray):
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)
            else:
                assert left == right

    return check


@pytest.fixture(scope="session")
def in_threads():
    """What `work` gives for each number, called in a thread for each, all at once."""

    def call(work, count):
        results = {}

        def keep(number):
            results[number] = work(number)

        threads = [threading.Thread(target=keep, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return call


@pytest.fixture
def folder(tmp_path, pristine_folder):
    """A copy that a test may break."""
    return shutil.copytree(pristine_folder, tmp_path / "drive")


@pytest.fixture(scope="session")
def pristine_folder(tmp_path_factory):
    """Two clips with two cameras at 10 Hz, 12 s: `a` in JPEGs, `b` in MP4."""
    root = tmp_path_factory.mktemp("folder")
    for name in ("a", "b"):
        clip = root / "clips" / name
        clip.mkdir(parents=True)
        table(clip / "egomotion.parquet", **circle_poses())
        for camera in (FRONT, LEFT):
            write_camera(clip, camera, np.arange(121, dtype=np.int64) * 100_000, mp4=name == "b")
        (clip / "calibration.json").write_text(json.dumps({FRONT: {"fx": 1.5}, "other": {}}))
    index = {"name": "circles", "cameras": [FRONT, LEFT], "clips": ["a", "b"]}
    (root / "dataset.json").write_text(json.dumps(index))
    return root
