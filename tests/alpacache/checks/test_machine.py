"""The checks where something is broken: what they say, and that one that raises does not hide the others."""

import json
import re
import time
import types
from importlib import metadata

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.checks import machine as doctor
from alpacache.checks.check import worst
from alpacache.checks.machine import diagnose
from alpacache.gpu import host_memory
from alpacache.planning import machine as machine_speed
from alpacache.planning.gpus import GPUS, card_of
from alpacache.planning.machine import DiskSpeed

GIB = 2**30


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine_speed, "_FILE_BYTES", 2**22)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 with 80 GiB, of which attributes can be changed."""
    found = types.SimpleNamespace(capability=(9, 0), memory=(79 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: found.memory)
    monkeypatch.setattr(host_memory, "page_lock", lambda memory: None)
    monkeypatch.setattr(host_memory, "page_unlock", lambda memory: None)
    return found


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def checks(**options):
    return {check.name: check for check in diagnose(**options)}


@pytest.mark.system
def test_a_sound_machine(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 64 * 10**9)
    monkeypatch.setattr(doctor, "_version", lambda name: "99.0")
    monkeypatch.setattr(doctor, "SLOW_READ_BYTES_S", 0)
    report = diagnose(store=str(tmp_path / "store"))
    assert worst(report) != "fail"
    named = {check.name: check for check in report}
    assert {check.status for name, check in named.items() if name != "disk space"} == {"ok"}
    assert all(bool(check.remedy) == (check.status != "ok") for check in report)
    assert "Test GPU, compute capability 9.0" in named["gpu"].found
    assert "hf_secret" not in str(report)
    assert "a token" in named["hub"].found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.system
def test_no_gpu_fails_and_says_why(no_gpu, tmp_path):
    report = diagnose(store=str(tmp_path))
    found = {check.name: check for check in report}
    assert worst(report) == "fail"
    assert found["gpu"].status == "fail"
    assert "only tiny ones run on a CPU" in found["gpu"].remedy
    assert found["gpu memory"].status == "warn"
    assert found["page-locking"].status == found["compiler"].status == "ok"


@pytest.mark.parametrize(("free_gib", "status", "says"), [(8, "ok", ""), (5, "warn", "lora"), (3, "fail", "end what")])
def test_gpu_memory_against_what_training_takes(gpu, free_gib, status, says):
    gpu.memory = (free_gib * GIB, 80 * GIB)
    found = doctor.check_gpu_memory()
    assert found.status == status
    assert says in found.remedy
    assert f"{free_gib}.0 GiB free of 80.0" in found.found


@pytest.mark.parametrize(
    ("free_gib", "ram_gib", "says"),
    [
        (79, 8, "its weights on the GPU"),
        (8, 64, "its weights in RAM"),
        (8, 9, "its weights in its files"),
        (1, 64, "no room"),
    ],
)
def test_gpu_memory_says_where_stage_one_has_its_weights(gpu, free_gib, ram_gib, says, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: ram_gib * GIB)
    gpu.memory = (free_gib * GIB, 80 * GIB)
    assert says in doctor.check_gpu_memory().found


def test_hours_of_a_known_card(gpu, monkeypatch):
    """A card that is not here is judged as an empty one in this machine."""
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 64 * GIB)
    one, other = (doctor.check_gpu_memory(card=GPUS[name]).found for name in ("4070", "4060"))
    assert (
        "RTX 4070, 11.5 GiB beside its context: extract of the released nvidia/Alpamayo-R1 with its weights in RAM"
        in one
    )
    hours = [float(re.search(r"about ([0-9.]+) h for 1,000", found)[1]) for found in (one, other)]
    assert 0.1 < hours[0] < hours[1] < 1
    assert "h for 1,000" not in doctor.check_gpu_memory().found  # a GPU of another name


def test_weights_in_files_come_at_the_rate_of_the_disk(no_gpu, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 9 * GIB)
    speed = DiskSpeed(write_bytes_s=1e9, read_bytes_s=1e8, probe_bytes=2**29)

    def full():
        raise OSError(28, "No space left on device")

    slow, assumed, failed = (
        doctor.check_gpu_memory(card=GPUS["4070"], speed=how).found for how in (lambda: speed, None, full)
    )
    assert "weights in its files" in slow
    assert slow.endswith("by data sheets and the disk's 0.10 GB/s")
    assert assumed == failed
    assert assumed.endswith("by data sheets and an assumed 1.50 GB/s")
    hours = [float(re.search(r"about ([0-9.]+) h for 1,000", found)[1]) for found in (slow, assumed)]
    assert hours[0] > 3 * hours[1]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nvidia/Alpamayo2-Super-36B", "the released nvidia/Alpamayo2-Super "),
        ("nvidia/Alpamayo-1.5-10B", "the released nvidia/Alpamayo-1.5 "),
        ("owner/of-another-name", "the released nvidia/Alpamayo-R1 "),
    ],
)
def test_a_model_that_is_not_here_is_judged_by_its_name_and_the_sizes_are_named(no_gpu, model, says):
    assert says in doctor.check_gpu_memory(model, GPUS["4090"]).found


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", None),
    ],
)
def test_cards_by_a_device_s_own_name(device, card):
    assert card_of(device) is GPUS.get(card)


def test_a_gpu_without_bfloat16(gpu):
    gpu.capability = (7, 5)
    assert doctor.check_gpu().status == "fail"
    assert "Ampere" in doctor.check_gpu().remedy


def test_a_gpu_without_a_compiler(gpu, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = doctor.check_compiler()
    assert found.status == "fail"
    assert "gcc" in found.remedy


def test_packages_that_are_missing_or_old(monkeypatch):
    versions = {"zarr": "2.18.0", "numcodecs": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "99.0"))
    found = doctor.check_packages()
    assert found.status == "fail"
    assert "zarr is 2.18.0, expected 3.1.6 or later" in found.found
    assert "numcodecs is missing" in found.found


def test_versions_compare_as_numbers(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: {"torch": "2.9"})
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cpu")
    assert doctor.check_packages().status == "ok"


def test_requirements_of_a_checkout_that_is_not_installed(monkeypatch):
    assert doctor._requirements()["zarr"] == "3.1.6"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    found = doctor._requirements()
    assert (found["zarr"], found["torch"]) == ("3.1.6", "2.11")
    assert "peft" not in found


def test_optional_packages_warn(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = doctor.check_optional()
    assert found.status == "warn"
    assert "alpacache[lora]" in found.remedy


def test_a_place_that_cannot_be_written(no_gpu):
    found = checks(store="/proc")
    assert found["hard links"].status == found["disk speed"].status == "fail"
    assert "write to" in found["hard links"].remedy
    assert "/proc" in found["disk speed"].found


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(doctor.Path, "hardlink_to", refuse)
    found = doctor.check_links(str(tmp_path))
    assert (found.status, found.found) == ("fail", f"refused at {tmp_path}: Operation not supported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.system
def test_a_slow_disk_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SLOW_READ_BYTES_S", 1e15)
    assert checks(store=str(tmp_path))["disk speed"].status == "warn"


def test_little_ram_warns(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2 * 10**9)
    assert doctor.check_ram().status == "warn"


@pytest.mark.system
def test_a_check_that_raises_is_a_failed_check(no_gpu, tmp_path, monkeypatch):
    def broken():
        raise ValueError("no line\n'MemAvailable:'")

    monkeypatch.setattr(host_memory, "available_bytes", broken)
    found = checks(store=str(tmp_path))
    assert found["ram"].status == "fail"
    assert found["ram"].found == "the check raised ValueError: no line 'MemAvailable:'"
    assert found["hard links"].status == "ok"


def test_offline_and_without_a_token(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    found = doctor.check_hub()
    assert (found.status, found.found) == ("warn", "no token, offline")
    assert "HF_HUB_OFFLINE" in found.remedy
    assert "hf auth login" in found.remedy


def test_a_local_model_of_2_super(tmp_path):
    """Its config is one file, and the licence is what its own files say."""
    model = make_tiny_checkpoint(tmp_path / "Tiny-2", family="2")
    found = doctor.check_model(str(model))
    assert (found.status, found.found) == ("ok", f"Tiny-2 (2) from {model}; no licence in its files")
    (model / "LICENSE").write_text("OpenMDW License Agreement, version 1.1\n")
    assert "OpenMDW" in doctor.check_model(str(model)).found
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"model_type": "alpamayo3_hyper"}))
    refused = doctor.check_model(str(model))
    assert refused.status == "fail"
    assert "alpamayo3_hyper" in refused.found
    assert "alpamayo2_super" in refused.found


def test_a_local_model(tiny_checkpoint, tmp_path):
    found = doctor.check_model(str(tiny_checkpoint))
    assert (found.status, found.found.split(" from ")[0]) == ("ok", "Tiny-R1 (r1)")
    assert found.found.endswith("; no licence in its files")
    assert doctor.check_model(str(tmp_path)).status == "fail"
    assert "neither a directory nor a hub id" in doctor.check_model("./nowhere").found


def hub_error(kind, status=403):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(huggingface_hub.errors, kind)("Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "says", "step"),
    [
        (lambda: hub_error("GatedRepoError"), "is gated", "Accept the licence"),
        (lambda: hub_error("RepositoryNotFoundError", 401), "has no owner/model", "Check the name"),
        (lambda: huggingface_hub.errors.LocalEntryNotFoundError("offline"), "cannot be reached", "Mend the network"),
    ],
)
def test_gated_unknown_and_offline_are_told_apart(error, says, step, monkeypatch):
    def refuse(*arguments, **options):
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found = doctor.check_model("owner/model")
    assert found.status == "fail"
    assert says in found.found
    assert step in found.remedy
    assert "HF_HUB_OFFLINE" not in found.remedy


def test_a_model_that_is_not_in_the_cache_by_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert doctor.check_model("no/such").remedy == "Unset HF_HUB_OFFLINE, which is set; or pass a local directory."


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 0.05)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: time.sleep(5))
    started = time.monotonic()
    found = doctor.check_model("owner/model")
    assert time.monotonic() - started < 3
    assert "no answer" in found.found


@pytest.mark.system
def test_a_bucket_in_the_place_of_a_disk(s3, no_gpu):
    found = checks(store=s3.uri())
    assert not {"disk space", "hard links", "disk speed"} & found.keys()
    assert found["object storage"].status == "ok"
    assert "conditional puts work; no store there yet" in found["object storage"].found
    assert s3.objects() == {}
    s3.server.ignore_conditions = True
    assert "ignores If-None-Match" in checks(store=s3.uri())["object storage"].found
    missing = checks(store="s3://nobucket/x")["object storage"]
    assert (missing.status, "no bucket 'nobucket'" in missing.found) == ("fail", True)
