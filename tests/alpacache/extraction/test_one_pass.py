"""Samples of one clip prepared in one pass: what each alone gives, value for value and refusal for refusal."""

import dataclasses
import io
import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import alpacache
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.preparation import Preparation, PreparationSettings
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.stretches import stretches
from alpacache.sources.synthetic import SyntheticSource
from cache_store import CacheReader

CAMERAS = ("camera_cross_left_120fov", "camera_front_wide_120fov")
SIZE = (96, 64)
FPS, SECONDS = 30, 12
EVERY = ("every:0.1", "every:0.35", "every:0.013")


def write_films(folder, camera, images):
    """B-frames, and one key frame in eight seconds."""
    av = pytest.importorskip("av")
    options = {"g": "250", "x264-params": "scenecut=0:bframes=3", "crf": "20"}
    with av.open(str(folder / f"{camera}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_pictures(folder, camera, images):
    (folder / camera).mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / camera / f"{number:06d}.jpg", quality=80)


def write_folder(root, write):
    """One clip of two cameras whose clocks differ; every picture is another."""
    drive = SyntheticSource(1, cameras=CAMERAS, size=SIZE)
    clip, track = drive.clip_ids[0], drive.track(drive.clip_ids[0])
    folder = root / "clips" / clip
    folder.mkdir(parents=True)
    poses = {"timestamp": track.timestamps_us} | {name: track.xyz[:, axis] for axis, name in enumerate("xyz")}
    poses |= {name: track.quaternion_xyzw[:, axis] for axis, name in enumerate(("qx", "qy", "qz", "qw"))}
    pd.DataFrame(poses).to_parquet(folder / "egomotion.parquet")
    ramp = np.arange(SIZE[1])[:, None, None] + np.arange(SIZE[0])[:, None] + np.arange(3)
    for shift, camera in enumerate(CAMERAS):
        count = FPS * SECONDS
        images = [((3 * number + shift + 2 * ramp) % 256).astype(np.uint8) for number in range(count)]
        stamps = np.round(np.arange(count) * 1e6 / FPS).astype(np.int64) + 7_000 * shift
        pd.DataFrame({"timestamp": stamps}).to_parquet(folder / f"{camera}.timestamps.parquet")
        write(folder, camera, images)
    (root / "dataset.json").write_text(json.dumps({"name": "one", "cameras": list(CAMERAS), "clips": [clip]}))


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_checkpoint):
    """The same kinds of sources that a user has, each with at least one clip of two cameras."""
    root = tmp_path_factory.mktemp("places")
    write_folder(root / "pictures", write_pictures)
    write_folder(root / "films", write_films)
    made = {"pictures": f"folder:{root / 'pictures'}", "films": f"folder:{root / 'films'}", "synthetic": "synthetic:1"}
    return root, made


def place_of(kind, places):
    root, made = places
    if kind == "pai" and kind not in made:
        pytest.importorskip("physical_ai_av")
        from benchmarks.pai_tree import write_tree

        write_tree(root / "pai", source=SyntheticSource(1, cameras=CAMERAS, size=SIZE), cameras=CAMERAS, fps=FPS)
        made[kind] = f"pai:{root / 'pai'}"
    if kind == "prepared" and kind not in made:
        pytest.importorskip("datasets")
        from alpacache.sources.prepared_writer import prepare

        source = open_source(made["films"])
        refs, _ = select(source, t0="every:0.35", samples=6)
        prepare(source, refs, root / "prepared", cameras=list(CAMERAS), frames=4)
        made[kind] = str(root / "prepared")
    return made[kind]


def preparation(place, model, *, frames=4, cameras=CAMERAS):
    names = {"camera_names": None, "frame_numbers": None}
    settings = PreparationSettings(
        source=place, model=str(model), cameras=cameras, frames=frames, seed=3, vlm_dtype="fp32", **names
    )
    return Preparation.open(settings)


def outcome(prepare, ref):
    """All values of a prepared sample, or why there is none."""
    try:
        made = prepare(ref)
    except BadClipError as error:
        return error.kind, str(error)
    values = dataclasses.asdict(made.inputs) | made.arrays
    return {
        name: value.tobytes() if isinstance(value, np.ndarray) else value.numpy().tobytes()
        if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("t0", EVERY)
@pytest.mark.parametrize("kind", ["pictures", "films", "pai", "synthetic", "prepared"])
def test_values_are_those_of_each_sample_alone(kind, t0, places, tiny_checkpoint):
    place = place_of(kind, places)
    prepare = preparation(place, tiny_checkpoint)
    every = {} if kind == "prepared" else {"t0": t0}
    refs, _ = select(prepare._source, samples=None if kind == "prepared" else 300, views=2, **every)
    refs = [ref for ref in refs if kind == "prepared" or ref.t0_us < 2_800_000][-24:]
    refs = [ref for number, ref in enumerate(refs) if number % 5 != 3]  # what a resumed run has left is ragged
    alone = [outcome(prepare, ref) for ref in refs]
    assert all(isinstance(each, dict) for each in alone)
    found = {}
    for stretch in stretches(refs, prepare._source, workers=1):
        with prepare.one_pass(stretch) as one:
            found |= {ref: outcome(one, ref) for ref in stretch}
    assert [found[ref] for ref in refs] == alone


def test_each_picture_is_read_and_resized_once(places, tiny_checkpoint, monkeypatch):
    from alpacache.driving import resizing
    from alpacache.sources import folder

    prepare = preparation(places[1]["pictures"], tiny_checkpoint)
    read, resized = [], []
    plain, resize = folder.read_image, resizing.resized
    monkeypatch.setattr(
        folder, "read_image", lambda file, *args, **named: read.append(file) or plain(file, *args, **named)
    )
    monkeypatch.setattr(resizing, "resized", lambda *args: resized.append(1) or resize(*args))
    refs, _ = select(prepare._source, t0="every:0.1", samples=12, views=1)
    with prepare.one_pass(refs) as one:
        for ref in refs:
            one(ref)
    wanted = len(CAMERAS) * (12 + 3)
    assert len(read) == len(set(read)) == len(resized) == wanted


def copied(kind, places, folder):
    """A copy of a source that may be changed, and its name."""
    place_of(kind, places)
    root = shutil.copytree(places[0] / kind, folder / kind)
    return root, f"{'pai' if kind == 'pai' else 'folder'}:{root}"


def change_film(root, change):
    """Change the bytes of the front camera's film, be it a file or the member of an archive."""
    for file in root.rglob(f"{CAMERAS[1]}.mp4"):
        file.write_bytes(change(file.read_bytes()))
    for archive in root.rglob(f"{CAMERAS[1]}.chunk_0000.zip"):
        with zipfile.ZipFile(archive) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(archive, "w") as new:
            for name, data in members.items():
                new.writestr(name, change(data) if name.endswith(".mp4") else data)


def broken(data, number):
    """A film with zeros in most of the packet at this place in it."""
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    first, after = packet.pos + packet.size // 10, packet.pos + packet.size
    return data[:first] + bytes(after - first) + data[after:]


def refreshed(data):
    """A film as long, whose key frames but the first lack most of their picture, and which is read in many pieces."""
    av = pytest.importorskip("av")
    rng, file = np.random.default_rng(0), io.BytesIO()
    params = "intra-refresh=1:keyint=20:bframes=2:b-adapt=0:b-pyramid=none"
    with av.open(io.BytesIO(data)) as old, av.open(file, "w", format="mp4") as new:
        stream = new.add_stream("libx264", rate=FPS, options={"x264-params": params, "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for frame in old.decode(video=0):
            image = frame.to_ndarray(format="rgb24")
            image = image // 2 + rng.integers(0, 40, image.shape, np.uint8)
            new.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        new.mux(stream.encode())
    return file.getvalue()


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["pictures", "films", "pai"])
def test_a_damaged_picture_costs_the_samples_that_want_it(kind, places, tiny_checkpoint, tmp_path):
    root, place = copied(kind, places, tmp_path)
    if kind == "pictures":
        next(root.rglob(f"{CAMERAS[1]}/000089.jpg")).write_bytes(b"no picture")  # the last one before 3 s
    else:
        change_film(root, lambda data: broken(data, 89))
    prepare = preparation(place, tiny_checkpoint)
    refs, _ = select(prepare._source, t0="every:0.1", samples=24, views=2)
    alone = [outcome(prepare, ref) for ref in refs]
    with prepare.one_pass(refs) as one:
        assert [outcome(one, ref) for ref in refs] == alone
    bad = [ref for ref, each in zip(refs, alone, strict=True) if not isinstance(each, dict)]
    assert 0 < len(bad) < len(refs) / 2
    if kind == "pictures":
        assert bad == [ref for ref in refs if ref.t0_us in range(3_000_000, 3_400_000, 100_000)]


@pytest.mark.ci
@pytest.mark.parametrize("damage", [False, True], ids=["sound", "damaged"])
@pytest.mark.parametrize("kind", ["films", "pai"])
def test_films_that_are_read_from_their_start(kind, damage, places, tiny_checkpoint, tmp_path):
    root, place = copied(kind, places, tmp_path)
    change_film(root, refreshed)
    if damage:
        change_film(root, lambda data: broken(data, 87))  # four samples want it, and no other frame needs it
    prepare = preparation(place, tiny_checkpoint, cameras=CAMERAS[1:])
    refs, _ = select(prepare._source, t0="every:0.1", samples=24, views=1)
    alone = [outcome(prepare, ref) for ref in refs]
    assert sum(isinstance(each, tuple) for each in alone) == 4 * damage
    with prepare.one_pass(refs) as one:
        assert [outcome(one, ref) for ref in refs] == alone


def test_a_moment_outside_the_film_costs_itself_alone(places, tiny_checkpoint):
    prepare = preparation(places[1]["films"], tiny_checkpoint)
    clip = prepare._source.clip_ids[0]
    refs = [SampleRef(clip_id=clip, t0_us=time) for time in (100_000, 2_000_000, 2_100_000, 13_000_000)]
    with prepare.one_pass(refs) as one:
        found = [outcome(one, ref) for ref in refs]
    assert [isinstance(each, dict) for each in found] == [False, True, True, False]
    assert found == [outcome(prepare, ref) for ref in refs]


@pytest.mark.ci
def test_a_store_does_not_depend_on_how_samples_were_read(places, tiny_checkpoint, tmp_path, monkeypatch):
    root, place = copied("films", places, tmp_path)
    change_film(root, lambda data: broken(data, 150))
    settings = {"source": place, "model": str(tiny_checkpoint), "device": "cpu", "t0": "every:0.4"}
    settings |= {"frames": 2, "views": 2, "cameras": CAMERAS[1:]}
    together = alpacache.extract(ExtractConfig(**settings, store=str(tmp_path / "one"), workers=1))
    for worker in range(2):
        alpacache.extract(ExtractConfig(**settings, store=str(tmp_path / "two"), workers=3, shard=(worker, 2)))
    monkeypatch.setattr("alpacache.extraction.extract.stretches", lambda refs, *_, **__: [[ref] for ref in refs[::-1]])
    alone = alpacache.extract(ExtractConfig(**settings, store=str(tmp_path / "alone"), workers=2))
    assert together.quarantined == alone.quarantined
    assert 0 < len(together.quarantined) < together.selected / 2
    one, *others = (CacheReader(tmp_path / name) for name in ("one", "two", "alone"))
    for other in others:
        assert set(other.sample_ids) == set(one.sample_ids)
        for sample_id in one.sample_ids:
            first, second = one.read(sample_id), other.read(sample_id)
            assert first.keys() == second.keys()
            for name in first:
                np.testing.assert_array_equal(first[name], second[name])
