"""Samples prepared in processes of their own: the same values, the same errors, and none left behind."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

import alpacache
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, DataError, SourceError
from alpacache.extraction import extract as extraction
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.prefill import Prefiller
from alpacache.extraction.preparation import Preparation, PreparationSettings
from alpacache.extraction.reading_process import Readers, ReadingProcesses
from cache_store import CacheReader

pytestmark = pytest.mark.system  # processes of their own

REFS = [SampleRef(clip_id=f"synthetic-0-{number:06d}", t0_us=5_100_000, view=number % 2) for number in range(4)]


@pytest.fixture
def config(tiny_checkpoint, tmp_path):
    settings = {"frames": 2, "views": 2, "workers": 2, "device": "cpu"}
    return ExtractConfig(source="synthetic:4", model=str(tiny_checkpoint), store=str(tmp_path / "store"), **settings)


@pytest.fixture
def settings(config):
    return PreparationSettings(
        source=config.source,
        model=config.model,
        cameras=config.cameras,
        frames=config.frames,
        seed=config.seed,
        camera_names=None,
        frame_numbers=None,
    )


def alive(process_id):
    """Whether it runs; one that only waits for its parent to notice does not."""
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process_ids):
    deadline = time.monotonic() + 30
    while any(map(alive, process_ids)):
        assert time.monotonic() < deadline, process_ids
        time.sleep(0.05)
    return True


@pytest.mark.ci
def test_float32_pixels_are_those_of_this_process(settings):
    settings = dataclasses.replace(settings, vlm_dtype="fp32", blank=(CAMERAS[0],))
    with ReadingProcesses(settings, 1, pinned_for=None) as read:
        pixels = read(REFS[0]).inputs.pixel_values
    assert (pixels[: len(pixels) // 2] == -1).all()
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, Preparation.open(settings)(REFS[0]).inputs.pixel_values)


def test_values_are_those_of_this_process(settings):
    here = Preparation.open(settings)
    with ReadingProcesses(settings, 2, pinned_for=None) as read:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(read, REFS))
        processes = [process.pid for process in read._processes]
    assert len(processes) == 2
    assert gone(processes)
    for one, ref in zip(found, REFS, strict=True):
        expected = here(ref)
        assert one.sample_id == expected.sample_id == ref.sample_id
        assert one.inputs.pixel_values.dtype == torch.bfloat16
        assert torch.equal(one.inputs.pixel_values, expected.inputs.pixel_values)
        assert torch.equal(one.inputs.image_grid_thw, expected.inputs.image_grid_thw)
        for name in ("text", "stem_len"):
            assert getattr(one.inputs, name) == getattr(expected.inputs, name)
        for name in ("input_ids", "image_spans"):
            np.testing.assert_array_equal(getattr(one.inputs, name), getattr(expected.inputs, name), strict=True)
        assert one.arrays.keys() == expected.arrays.keys()
        for name, value in expected.arrays.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(one.arrays[name], value, strict=True)
            else:
                assert one.arrays[name] == value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pixels_are_page_locked_for_a_gpu(settings):
    with ReadingProcesses(settings, 1, pinned_for=torch.device("cuda", 0)) as read:
        pixels = read(REFS[0]).inputs.pixel_values
    assert pixels.is_pinned()
    assert torch.equal(pixels, Preparation.open(settings)(REFS[0]).inputs.pixel_values)


def test_a_pass_that_is_given_up_ends_its_process_at_once(settings):
    """What is left of it must not be taken for the answers of another."""
    refs = [SampleRef(clip_id="synthetic-0-000000", t0_us=2_000_000 + 300_000 * number) for number in range(30)]
    here = Preparation.open(settings)
    with ReadingProcesses(settings, 2, pinned_for=None) as read:
        with read.one_pass(refs) as prepare:
            for ref in refs[:2]:
                assert torch.equal(prepare(ref).inputs.pixel_values, here(ref).inputs.pixel_values)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert sum(alive(process.pid) for process in read._processes) == 1
        assert torch.equal(read(REFS[1]).inputs.pixel_values, here(REFS[1]).inputs.pixel_values)


@pytest.mark.ci
def test_errors_are_those_of_this_process_with_the_traceback_as_a_note(settings):
    bad = SampleRef(clip_id="synthetic-0-000001", t0_us=900_000_000)
    with pytest.raises(BadClipError) as here:
        Preparation.open(settings)(bad)
    with ReadingProcesses(settings, 2, pinned_for=None) as read:
        with pytest.raises(BadClipError) as there:
            read(bad)
        assert read(REFS[0]).sample_id == REFS[0].sample_id  # it goes on
    assert (there.value.kind, str(there.value)) == (here.value.kind, str(here.value))
    assert "Traceback" in there.value.__notes__[0]


def test_a_source_that_cannot_be_opened_is_refused_as_here(settings, tmp_path):
    gone_source = dataclasses.replace(settings, source=f"folder:{tmp_path / 'gone'}")
    with ReadingProcesses(gone_source, 1, pinned_for=None) as read, pytest.raises(SourceError, match="gone"):
        read(REFS[0])


def test_a_process_that_was_killed_is_named_with_what_helps(settings):
    with ReadingProcesses(settings, 1, pinned_for=None) as read:
        read(REFS[0])
        os.kill(read._processes[0].pid, signal.SIGKILL)
        with pytest.raises(DataError, match=re.escape(REFS[1].sample_id) + r".* exit code -9\..* fewer --workers"):
            read(REFS[1])


@pytest.mark.ci
def test_what_is_printed_while_libraries_are_imported_is_no_answer(settings, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this cluster', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with ReadingProcesses(settings, 1, pinned_for=None) as read:
        assert read(REFS[0]).sample_id == REFS[0].sample_id


def test_a_terminal_interrupts_the_process_that_decides_alone(settings):
    with ReadingProcesses(settings, 1, pinned_for=None) as read:
        assert os.getpgid(read._processes[0].pid) != os.getpgid(0)


@pytest.mark.ci
def test_processes_end_with_their_parent(settings):
    program = f"""
import time
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.extraction.preparation import PreparationSettings
from alpacache.extraction.reading_process import ReadingProcesses
read = ReadingProcesses({settings!r}, 1, pinned_for=None).__enter__()
read({REFS[0]!r})
print(read._processes[0].pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    assert alive(child)  # signals to the whole group are its parent's business
    parent.kill()
    parent.communicate()
    assert gone([child])


@pytest.fixture
def in_processes(monkeypatch):
    """`extract` reads as it does beside a GPU."""
    begun = []

    class Noted(ReadingProcesses):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            begun.append(self)

    @contextmanager
    def open_readers(settings, source, builder, device, *, workers):
        with Noted(settings, workers, pinned_for=None) as processes:
            yield Readers(one_pass=processes.one_pass, workers=workers, begin=None)

    monkeypatch.setattr(extraction, "open_readers", open_readers)
    return begun


@pytest.mark.ci
def test_extract_writes_the_same_store(config, in_processes, tmp_path, monkeypatch):
    report = alpacache.extract(config)
    assert report.extracted == report.selected > 4
    assert len(in_processes) == 1
    assert len(in_processes[0]._processes) == 2
    more = dataclasses.replace(config, store=str(tmp_path / "few"), samples=1, views=1, workers=5)
    assert alpacache.extract(more).extracted == len(in_processes[1]._processes) == 1  # no more than there are samples
    monkeypatch.undo()
    alpacache.extract(dataclasses.replace(config, store=str(tmp_path / "other")))
    one, other = CacheReader(config.store), CacheReader(tmp_path / "other")
    assert set(one.sample_ids) == set(other.sample_ids)
    for sample_id in one.sample_ids:
        first, second = one.read(sample_id), other.read(sample_id)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.ci
def test_extract_ends_when_a_process_was_killed_and_keeps_what_was_committed(config, in_processes, monkeypatch):
    good = Prefiller.features

    def features(self, *arguments):
        found = good(self, *arguments)
        for process in in_processes[0]._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Prefiller, "features", features)
        with pytest.raises(DataError, match=r"exit code -9.*\n?.*intact"):
            alpacache.extract(config)
    there = len(CacheReader(config.store))
    assert there >= 1
    report = alpacache.extract(config)
    assert (report.already_there, report.extracted) == (there, report.selected - there)
