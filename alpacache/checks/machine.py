"""What of this machine will and will not work, in seconds: one check a part, each with its next step.

A check that raises is a check that failed: whoever runs this has a machine where something is broken, and wants the
rest of the list all the same. So everything is imported inside the checks.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alpacache.checks.check import Check

PYTHON = (3, 11)
SHOWN = ("torch", "transformers", "zarr", "numcodecs")
"""Packages whose versions are always shown."""
OPTIONAL = {"peft": ("lora", "train --trainable lora"), "physical_ai_av": ("pai", "the source `pai`")}
"""Package -> extra that brings it, what needs it."""
LOW_RAM_BYTES = 16e9
SLOW_READ_BYTES_S = 0.5e9
"""Below it a step of four cameras waits longer for the disk than four noise draws take."""
HUB_TIMEOUT_S = 10.0
_LOCKED_BYTES = 2**26
_DRIVER = Path("/sys/module/nvidia/version")
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_AT_LEAST = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All checks, in order."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings are not failures."""
        return all(check.status != "fail" for check in self.checks)


def diagnose(*, store: str | None = None, model: str | None = None) -> Report:
    """Run every check. Raises nothing; leaves nothing behind.

    Args:
        store: where the store is or will be; None: the working directory.
        model: hub id or directory; None: only whether the hub could be asked.
    """
    place = store or "."
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("optional packages", check_optional),
        ("gpu", check_gpu),
        ("gpu memory", check_gpu_memory),
        ("compiler", check_compiler),
        ("ram", check_ram),
        ("page-locking", check_page_locking),
        *_place_checks(place),
        ("hub", check_hub),
    ]
    if model is not None:
        checks.append(("model", lambda: check_model(model)))
    return Report(checks=tuple(_guarded(name, check) for name, check in checks))


def _place_checks(place: str) -> list[tuple[str, Callable[[], Check]]]:
    """Of where the store is or will be."""
    from cache_store.storage.storage import is_uri

    if is_uri(place):
        return [("object storage", lambda: check_object_storage(place))]
    return [
        ("disk space", lambda: check_space(place)),
        ("hard links", lambda: check_links(place)),
        ("disk speed", lambda: check_speed(place)),
    ]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever is broken here is what was looked for
        found = f"the check raised {type(error).__name__}: {' '.join(str(error).split())}"
        return Check(name=name, status="fail", found=found, remedy="Mend what the message names, then run this again.")


def check_python() -> Check:
    """The interpreter's version."""
    found = f"Python {platform.python_version()} on {platform.machine()}"
    if sys.version_info >= PYTHON:
        return Check(name="python", status="ok", found=found)
    remedy = f"Install Python {'.'.join(map(str, PYTHON))} or later."
    return Check(name="python", status="fail", found=found, remedy=remedy)


def check_packages() -> Check:
    """Installed versions against what this package asks for."""
    wrong = []
    versions = {name: _version(name) for name in SHOWN}
    for name, least in _requirements().items():
        version = versions.setdefault(name, _version(name))
        if version is None:
            wrong.append(f"{name} is missing")
        elif _numbers(version) < _numbers(least):
            wrong.append(f"{name} is {version}, expected {least} or later")
    found = ", ".join([*wrong, *(f"{name} {versions[name]}" for name in SHOWN if versions[name])])
    if wrong:
        remedy = "pip install --upgrade alpacache (in a checkout: pip install -e .)"
        return Check(name="packages", status="fail", found=found, remedy=remedy)
    return Check(name="packages", status="ok", found=found)


def check_optional() -> Check:
    """Packages that only some commands need."""
    versions = {name: _version(name) for name in OPTIONAL}
    found = ", ".join(f"{name} {version or 'is not installed'}" for name, version in versions.items())
    remedies = [
        f"{use} needs {name}: pip install 'alpacache[{extra}]'."
        for name, (extra, use) in OPTIONAL.items()
        if versions[name] is None
    ]
    return Check(name="optional packages", status="warn" if remedies else "ok", found=found, remedy=" ".join(remedies))


def check_gpu() -> Check:
    """PyTorch's build, the GPU, whether it computes in bfloat16."""
    import torch

    build = f"PyTorch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    if _DRIVER.is_file():
        build += f", driver {_DRIVER.read_text().strip()}"
    if not torch.cuda.is_available():
        remedy = "The released model needs a GPU; only tiny ones run on a CPU. "
        if torch.version.cuda is None:
            remedy += "Install a PyTorch with CUDA (pytorch.org), on a machine with an NVIDIA GPU."
        else:
            remedy += "Check `nvidia-smi`, the driver's age and CUDA_VISIBLE_DEVICES."
        return Check(name="gpu", status="fail", found=f"no GPU; {build}", remedy=remedy)
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}; {build}"
    if major < 8:
        remedy = "It has no bfloat16: use an Ampere GPU (compute capability 8.0) or later."
        return Check(name="gpu", status="fail", found=found, remedy=remedy)
    return Check(name="gpu", status="ok", found=found)


def check_gpu_memory() -> Check:
    """Free memory against what training the released model takes at the least (one front camera, int8, batch 1)."""
    import torch

    if not torch.cuda.is_available():
        return Check(name="gpu memory", status="warn", found="no GPU", remedy="See gpu.")
    from alpacache.planning.plan import least_training_bytes

    free, total = torch.cuda.mem_get_info()
    everything, adapters = (least_training_bytes(which) for which in ("all", "lora"))
    found = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    if free >= everything:
        return Check(name="gpu memory", status="ok", found=found)
    if free >= adapters:
        remedy = f"Training all parameters takes {everything / 2**30:.1f} GiB at the least; use --trainable lora, or "
        return Check(name="gpu memory", status="warn", found=found, remedy=remedy + "end what else is on the GPU.")
    remedy = f"Training takes {adapters / 2**30:.1f} GiB at the least (--trainable lora); end what else is on the GPU."
    return Check(name="gpu memory", status="fail", found=found, remedy=remedy)


def check_compiler() -> Check:
    """What kernels are made with: Triton, and the C compiler that it and torch.compile call."""
    import torch

    triton = _version("triton") if find_spec("triton") else None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    found = f"triton {triton or 'is missing'}, C compiler {compiler or 'is missing'}"
    if triton and compiler:
        return Check(name="compiler", status="ok", found=found)
    if not torch.cuda.is_available():
        return Check(name="compiler", status="ok", found=f"{found}; a CPU needs neither")
    remedy = "" if triton else "pip install triton. "
    remedy += "" if compiler else "Install gcc (apt-get install gcc), or set CC."
    return Check(name="compiler", status="fail", found=found, remedy=remedy.strip())


def check_ram() -> Check:
    """RAM that could be filled without being killed."""
    from alpacache.gpu.host_memory import available_bytes

    free = available_bytes()
    found = f"{free / 1e9:.1f} GB available"
    if free >= LOW_RAM_BYTES:
        return Check(name="ram", status="ok", found=found)
    remedy = f"The released model wants {LOW_RAM_BYTES / 1e9:.0f} GB; end other programs, raise the container's limit."
    return Check(name="ram", status="warn", found=found, remedy=remedy)


def check_page_locking() -> Check:
    """Whether CUDA may lock host memory, which batches are copied from."""
    import torch

    if not torch.cuda.is_available():
        return Check(name="page-locking", status="ok", found="not needed without a GPU")
    from alpacache.gpu.host_memory import page_aligned, page_lock, page_unlock

    memory = page_aligned(_LOCKED_BYTES)
    page_lock(memory)
    page_unlock(memory)
    return Check(name="page-locking", status="ok", found=f"{_LOCKED_BYTES // 2**20} MiB locked and unlocked")


def check_space(place: str) -> Check:
    """Free space, in samples of the released model."""
    from alpacache.planning.config import PlanConfig
    from alpacache.planning.machine import existing_folder
    from alpacache.planning.plan import plan
    from cache_store.storage.local_files import free_bytes

    folder = existing_folder(place)
    free, size = free_bytes(folder), plan(PlanConfig(samples=1, codec="int8")).bytes_by_codec["int8"]
    found = f"{free / 1e9:.1f} GB at {folder}: {int(free // size)} samples of one front camera in int8"
    if free >= 100 * size:
        return Check(name="disk space", status="ok", found=found)
    remedy = "Free some, or give --store another disk; `alpacache plan` tells what is needed."
    return Check(name="disk space", status="warn", found=found, remedy=remedy)


def check_links(place: str) -> Check:
    """Whether the file system has hard links: a store commits samples by them."""
    from alpacache.planning.machine import existing_folder

    folder = existing_folder(place)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".alpacache-doctor-") as name:
            first = Path(name) / "first"
            first.write_bytes(b"linked")
            (Path(name) / "second").hardlink_to(first)
    except OSError as error:
        remedy = "Keep the store on a file system that you may write to and that has hard links (ext4, XFS, NFS)."
        return Check(name="hard links", status="fail", found=f"refused at {folder}: {error.strerror}", remedy=remedy)
    return Check(name="hard links", status="ok", found=f"work at {folder}")


def check_object_storage(place: str) -> Check:
    """Whether a bucket can be listed, written and removed from, and knows conditional puts; by one small object."""
    from cache_store import CacheStoreError
    from cache_store.storage.storage import open_storage

    try:
        storage = open_storage(place)
        names = list(storage.names(""))
        storage.check_exclusive()
    except CacheStoreError as error:
        remedy = "Do what the message says; docs/how-to/object-storage.md has settings and rights."
        return Check(name="object storage", status="fail", found=str(error), remedy=remedy)
    what = "a store is there" if "zarr.json" in names else "no store there yet"
    found = f"{place} can be listed, written and removed from, conditional puts work; {what}"
    return Check(name="object storage", status="ok", found=found)


def check_speed(place: str) -> Check:
    """Durable writes and cold reads of a temporary file."""
    from alpacache.planning.machine import disk_speed, existing_folder

    folder = existing_folder(place)
    try:
        speed = disk_speed(folder)
    except OSError as error:
        remedy = "Give --store a directory that you may write to, with some hundred MB free."
        return Check(
            name="disk speed", status="fail", found=f"cannot write at {folder}: {error.strerror}", remedy=remedy
        )
    found = f"writes {speed.write_bytes_s / 1e9:.2f} GB/s, reads {speed.read_bytes_s / 1e9:.2f} GB/s"
    if speed.read_bytes_s >= SLOW_READ_BYTES_S:
        return Check(name="disk speed", status="ok", found=found)
    remedy = "Training will wait for this disk: use --draws auto, --in-memory, or a local NVMe drive."
    return Check(name="disk speed", status="warn", found=found, remedy=remedy)


def check_hub() -> Check:
    """Settings of hub access. The token is never shown."""
    from huggingface_hub import constants, get_token

    token = get_token() is not None
    found = f"{'a token' if token else 'no token'}, {'offline' if constants.HF_HUB_OFFLINE else 'online'}"
    remedies = []
    if constants.HF_HUB_OFFLINE:
        remedies.append("HF_HUB_OFFLINE is set: only what is in the cache is found; unset it to download.")
    if not token:
        remedies.append("The released weights are gated: accept their licence on the hub, then `hf auth login`.")
    return Check(name="hub", status="warn" if remedies else "ok", found=found, remedy=" ".join(remedies))


def check_model(model: str) -> Check:
    """Whether the model's configs can be read; of a hub id they are fetched, no weights."""
    from alpacache.alpamayo.backbone import companion_file
    from alpacache.alpamayo.checkpoint import Checkpoint
    from alpacache.errors import CheckpointError

    def read() -> str:
        checkpoint = Checkpoint(model)
        family = checkpoint.config.family.name
        companion_file(checkpoint, "config.json")
        where = checkpoint.directory or "the hub"
        return f"{checkpoint.full_name} ({family}) from {where}, VLM of {checkpoint.config.vlm_name_or_path}"

    try:
        found = _within(HUB_TIMEOUT_S, read)
    except TimeoutError:
        remedy = "Check the network and its proxy; or pass a local directory."
        found = f"{model}: no answer within {HUB_TIMEOUT_S:.0f} s"
        return Check(name="model", status="fail", found=found, remedy=remedy)
    except CheckpointError as error:
        return Check(name="model", status="fail", found=str(error), remedy=_next_step(error))
    return Check(name="model", status="ok", found=found)


def _next_step(error: Exception) -> str:
    """By what the hub answered."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    steps: dict[type[Exception], str] = {
        GatedRepoError: "Accept the licence on the model's page, then `hf auth login`.",
        RepositoryNotFoundError: "Check the name; a private model needs `hf auth login`.",
        LocalEntryNotFoundError: "Unset HF_HUB_OFFLINE or mend the network; or pass a local directory.",
    }
    for kind, step in steps.items():
        if isinstance(error.__cause__, kind):
            return step
    return "Pass a hub id or a directory with a complete checkpoint."


def _within(limit_s: float, work: Callable[[], str]) -> str:
    """The result, or `TimeoutError`; the thread is left behind then, and ends with the program."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # raised again below, in the caller's thread
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not done:
        raise TimeoutError
    if isinstance(done[0], Exception):
        raise done[0]
    return str(done[0])


def _requirements() -> dict[str, str]:
    """Package -> least version, of what is not optional."""
    try:
        lines = metadata.requires("alpacache") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = tomllib.loads(_PYPROJECT.read_text())["project"]["dependencies"]
    found = {}
    for line in lines:
        if "extra ==" not in line and (match := _AT_LEAST.match(line)):
            found[match[1]] = match[2]
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
