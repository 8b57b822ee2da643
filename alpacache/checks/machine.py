"""`doctor`: which parts of this machine will work, one check for each in a few seconds, with its next step.

A check that raises is a check that failed: a user runs this where something is broken, and needs the rest of the list
all the same. So everything is imported inside the checks.
"""

import os
import platform
import re
import shutil
import tempfile
import threading
import tomllib
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from alpacache.checks.check import Check, verdict

if TYPE_CHECKING:
    from alpacache.planning.config import ReleasedFamily
    from alpacache.planning.gpus import Gpu
    from alpacache.planning.machine import DiskSpeed

SHOWN = ("torch", "transformers", "zarr", "numcodecs")
"""Packages whose versions are always shown."""
OPTIONAL = {"peft": ("lora", "train --trainable lora"), "physical_ai_av": ("pai", "the source `pai`")}
"""Package -> the extra that installs it, and what needs it."""
LOW_RAM_BYTES = 16e9
SLOW_READ_BYTES_S = 0.5e9
"""Below this a step of four cameras waits longer for the disk than four noise draws take."""
HUB_TIMEOUT_S = 10.0
_LOCKED_BYTES = 2**26
_DRIVER = Path("/sys/module/nvidia/version")
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_AT_LEAST = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)")


def diagnose(*, store: str | None = None, model: str | None = None, gpu: str | None = None) -> tuple[Check, ...]:
    """Run every check, in order. Leaves nothing behind; raises `UsageError` for an unknown `gpu` alone.

    Args:
        store: where the store is or will be; None: the working directory.
        model: hub id or directory.
        gpu: card of `plan`'s table to judge the memory of, in place of this machine's.
    """
    from alpacache.planning.gpus import gpu_named
    from cache_store.storage.storage import is_uri

    place, card = store or ".", None if gpu is None else gpu_named(gpu)
    speed = cache(lambda: _disk_speed(place))
    checks: dict[str, Callable[[], Check]] = {
        "python": check_python,
        "packages": check_packages,
        "optional packages": check_optional,
        "gpu": check_gpu,
        "gpu memory": lambda: check_gpu_memory(model, card, None if is_uri(place) else speed),
        "compiler": check_compiler,
        "ram": check_ram,
        "page-locking": check_page_locking,
    }
    if is_uri(place):
        checks["object storage"] = lambda: check_object_storage(place)
    else:
        checks["disk space"] = lambda: check_space(place, model)
        checks["hard links"] = lambda: check_links(place)
        checks["disk speed"] = lambda: check_speed(place, speed)
    checks["hub"] = check_hub
    if model is not None:
        checks["model"] = lambda: check_model(model)
    answers = []
    for name, check in checks.items():
        try:
            answers.append(check())
        except Exception as error:  # the fault that `doctor` is to find
            finding = f"the check raised {type(error).__name__}: {' '.join(str(error).split())}"
            answers.append(verdict(name, finding, fail="Mend what the message names, then run this again."))
    return tuple(answers)


def check_python() -> Check:
    """The interpreter's version; with one that is too old, nothing here could be imported."""
    return verdict("python", f"Python {platform.python_version()} on {platform.machine()}")


def check_packages() -> Check:
    """Installed versions against the least ones that this package requires."""
    required = _requirements()
    versions = {name: _version(name) for name in (*SHOWN, *required)}
    wrong = []
    for name, least in required.items():
        version = versions[name]
        if version is None:
            wrong.append(f"{name} is missing")
        elif _numbers(version) < _numbers(least):
            wrong.append(f"{name} is {version}, expected {least} or later")
    finding = ", ".join([*wrong, *(f"{name} {versions[name]}" for name in SHOWN if versions[name])])
    remedy = "pip install --upgrade alpacache (in a checkout: pip install -e .)"
    return verdict("packages", finding, fail=remedy if wrong else "")


def check_optional() -> Check:
    """Packages that only some commands need."""
    versions = {name: _version(name) for name in OPTIONAL}
    remedies = [
        f"{use} needs {name}: pip install 'alpacache[{extra}]'."
        for name, (extra, use) in OPTIONAL.items()
        if versions[name] is None
    ]
    finding = ", ".join(f"{name} {version or 'is not installed'}" for name, version in versions.items())
    return verdict("optional packages", finding, warn=" ".join(remedies))


def check_gpu() -> Check:
    """PyTorch's build, the GPU, and whether that computes in bfloat16."""
    import torch

    build = f"PyTorch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    if _DRIVER.is_file():
        build += f", driver {_DRIVER.read_text().strip()}"
    if not torch.cuda.is_available():
        remedy = "Check `nvidia-smi`, the driver's age and CUDA_VISIBLE_DEVICES."
        if torch.version.cuda is None:
            remedy = "Install a PyTorch with CUDA (pytorch.org), on a machine with an NVIDIA GPU."
        remedy = f"The released model needs a GPU; only tiny ones run on a CPU. {remedy}"
        return verdict("gpu", f"no GPU; {build}", fail=remedy)
    major, minor = torch.cuda.get_device_capability()
    finding = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}; {build}"
    remedy = "It has no bfloat16: use an Ampere GPU (compute capability 8.0) or later."
    return verdict("gpu", finding, fail=remedy if major < 8 else "")


def check_gpu_memory(
    model: str | None = None, card: "Gpu | None" = None, speed: "Callable[[], DiskSpeed] | None" = None
) -> Check:
    """Free memory against the least that training the released model takes (one front camera, int8, batch 1), and where
    its stage one would have its weights, with its hours on a card that `plan` knows.

    Args:
        model: hub id or directory; its family's released sizes count, those of R1 where neither its config nor its name
            tells the family.
        card: the one to judge, empty and in this machine, in place of the one that is there.
        speed: measures the disk that weights in files are read from; None: an assumed one.
    """
    import torch

    if card is None and not torch.cuda.is_available():
        return verdict("gpu memory", "no GPU", warn="See gpu; of a card that you think of, --gpu 4070 tells.")
    from alpacache.alpamayo.families import HUB_IDS
    from alpacache.gpu.host_memory import available_bytes
    from alpacache.planning.config import allowed_bytes
    from alpacache.planning.gpus import card_of
    from alpacache.planning.plan import READ_BYTES_S, least_training_bytes, stage_one

    if card is None:
        free, total = torch.cuda.mem_get_info()
        room, card = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}", card_of(torch.cuda.get_device_name())
    else:
        free = allowed_bytes(card.memory_gb)
        room = f"{card.name}, {free / 2**30:.1f} GiB beside its context"
    family = _family_of(model)
    read_bytes_s, rate = READ_BYTES_S, "an assumed"
    with suppress(OSError):  # `disk speed` tells
        if speed is not None:
            read_bytes_s, rate = speed().read_bytes_s, "the disk's"
    home, hours = stage_one(free, available_bytes(), family, card, read_bytes_s=read_bytes_s)
    released_model = f"the released {HUB_IDS[family or 'r1']}"
    told = f"no room for extract of {released_model}"
    if home is not None:
        where = {"gpu": "on the GPU", "ram": "in RAM", "files": "in its files"}[home]
        told = f"extract of {released_model} with its weights {where}"
    if hours is not None:
        told += f", about {hours:.2g} h for 1,000 samples of one camera, by data sheets"
        told += f" and {rate} {read_bytes_s / 1e9:.2f} GB/s" if home == "files" else ""
    everything, adapters = (least_training_bytes(which, family) for which in ("all", "lora"))
    finding = f"{room}: {told}"
    remedy = "end what else is on the GPU."
    if free < adapters:
        remedy = f"Training takes {adapters / 2**30:.1f} GiB at the least (--trainable lora); {remedy}"
        return verdict("gpu memory", finding, fail=remedy)
    remedy = (
        f"Training all parameters takes {everything / 2**30:.1f} GiB at the least, with the optimizer's state in RAM; "
        f"use --trainable lora, or {remedy}"
    )
    return verdict("gpu memory", finding, warn=remedy if free < everything else "")


def _family_of(model: str | None) -> "ReleasedFamily | None":
    """The family of a model by its config, if that is on this machine, or by a public checkpoint's name.

    None where neither tells it: the released sizes are then R1's.
    """
    from alpacache.alpamayo.checkpoint import Checkpoint
    from alpacache.alpamayo.families import HUB_IDS
    from alpacache.errors import CheckpointError
    from alpacache.planning.config import ReleasedFamily

    if model is None:
        return None
    try:
        checkpoint = Checkpoint(model)
        if checkpoint.file_here("config.json") is None:
            return next((name for name in get_args(ReleasedFamily) if model.startswith(HUB_IDS[name])), None)
        return next((name for name in get_args(ReleasedFamily) if name == checkpoint.config.family.name), None)
    except CheckpointError:  # `model` tells
        return None


def check_compiler() -> Check:
    """The tools that make kernels: Triton, and the C compiler that it and torch.compile call."""
    import torch

    triton = _version("triton") if find_spec("triton") else None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    finding = f"triton {triton or 'is missing'}, C compiler {compiler or 'is missing'}"
    remedies = [] if triton else ["pip install triton."]
    remedies += [] if compiler else ["Install gcc (apt-get install gcc), or set CC."]
    if remedies and not torch.cuda.is_available():
        return verdict("compiler", f"{finding}; a CPU needs neither")
    return verdict("compiler", finding, fail=" ".join(remedies))


def check_ram() -> Check:
    """RAM that a process can fill without being killed."""
    from alpacache.gpu.host_memory import available_bytes

    free = available_bytes()
    remedy = f"The released model wants {LOW_RAM_BYTES / 1e9:.0f} GB; end other programs, raise the container's limit."
    return verdict("ram", f"{free / 1e9:.1f} GB available", warn=remedy if free < LOW_RAM_BYTES else "")


def check_page_locking() -> Check:
    """Check that CUDA may lock the host memory that batches are copied from."""
    import torch

    if not torch.cuda.is_available():
        return verdict("page-locking", "not needed without a GPU")
    from alpacache.gpu.host_memory import page_aligned, page_lock, page_unlock

    memory = page_aligned(_LOCKED_BYTES)
    page_lock(memory)
    page_unlock(memory)
    return verdict("page-locking", f"{_LOCKED_BYTES // 2**20} MiB locked and unlocked")


def check_space(place: str, model: str | None = None) -> Check:
    """Free space, in samples of the released model."""
    from alpacache.planning.config import PlanConfig
    from alpacache.planning.machine import existing_folder
    from alpacache.planning.plan import plan
    from cache_store.storage.local_files import free_bytes

    folder = existing_folder(place)
    one = plan(PlanConfig(samples=1, codec="int8", family=_family_of(model)))
    free, size = free_bytes(folder), one.bytes_by_codec["int8"]
    finding = f"{free / 1e9:.1f} GB at {folder}: {int(free // size)} samples of one front camera in int8"
    remedy = "Free some, or give --store another disk; `alpacache plan` tells what is needed."
    return verdict("disk space", finding, warn=remedy if free < 100 * size else "")


def check_links(place: str) -> Check:
    """Check that the file system has hard links, by which a store commits samples."""
    from alpacache.planning.machine import existing_folder

    folder = existing_folder(place)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".alpacache-doctor-") as name:
            first = Path(name) / "first"
            first.write_bytes(b"linked")
            (Path(name) / "second").hardlink_to(first)
    except OSError as error:
        remedy = "Keep the store on a file system that you may write to and that has hard links (ext4, XFS, NFS)."
        return verdict("hard links", f"refused at {folder}: {error.strerror}", fail=remedy)
    return verdict("hard links", f"work at {folder}")


def check_object_storage(place: str) -> Check:
    """Check with a small object that a bucket can be listed, written, removed from, and takes conditional puts."""
    from cache_store import CacheStoreError
    from cache_store.storage.storage import open_storage

    try:
        storage = open_storage(place)
        what = "a store is there" if "zarr.json" in list(storage.names("")) else "no store there yet"
        storage.check_exclusive()
    except CacheStoreError as error:
        remedy = "Do what the message says; docs/how-to/object-storage.md has settings and rights."
        return verdict("object storage", str(error), fail=remedy)
    finding = f"{place} can be listed, written and removed from, conditional puts work; {what}"
    return verdict("object storage", finding)


def _disk_speed(place: str) -> "DiskSpeed":
    from alpacache.planning.machine import disk_speed

    return disk_speed(place)


def check_speed(place: str, measure: "Callable[[], DiskSpeed]") -> Check:
    """Speed of durable writes and cold reads of a temporary file at a place, as measured there."""
    from alpacache.planning.machine import existing_folder

    folder = existing_folder(place)
    try:
        speed = measure()
    except OSError as error:
        remedy = "Give --store a directory that you may write to, with some hundred MB free."
        return verdict("disk speed", f"cannot write at {folder}: {error.strerror}", fail=remedy)
    finding = f"writes {speed.write_bytes_s / 1e9:.2f} GB/s, reads {speed.read_bytes_s / 1e9:.2f} GB/s"
    remedy = "Training will wait for this disk: use --draws auto, --in-memory, or a local NVMe drive."
    return verdict("disk speed", finding, warn=remedy if speed.read_bytes_s < SLOW_READ_BYTES_S else "")


_MEND = "Mend the network, its proxy (HTTPS_PROXY) or HF_ENDPOINT"


def check_hub() -> Check:
    """Access to the hub: its settings, and whether it is within reach. The token is never shown."""
    from huggingface_hub import constants, get_token

    from alpacache.hub import why_unreachable

    token, offline, why = get_token() is not None, constants.HF_HUB_OFFLINE, why_unreachable()
    remedies = []
    if why and not offline:
        remedies.append(f"{_MEND}; local directories need none of them.")
    if offline:
        remedies.append("HF_HUB_OFFLINE is set: only what is in the cache is found; unset it to download.")
    if not token:
        remedies.append("The released weights are gated: accept their licence on the hub, then `hf auth login`.")
    reach = "offline" if offline else f"out of reach ({why})" if why else "online"
    finding = f"{'a token' if token else 'no token'}, {reach}"
    return verdict("hub", finding, warn=" ".join(remedies))


def check_model(model: str) -> Check:
    """Check that the model's configs can be read; from the hub they are fetched, weights are not."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    from alpacache.alpamayo.backbone import companion_file
    from alpacache.alpamayo.checkpoint import Checkpoint
    from alpacache.alpamayo.families import RENAMED
    from alpacache.alpamayo.licence import told_licence
    from alpacache.alpamayo.recognition import recognise_family
    from alpacache.errors import CheckpointError

    answer: Future[Check] = Future()

    def read() -> None:
        try:
            checkpoint = Checkpoint(model)
            config, where = checkpoint.config, checkpoint.directory or "the hub"
            companion_file(checkpoint, "config.json")
            found = recognise_family(checkpoint)
            family = " or ".join(sorted(RENAMED)) if found.family is None else found.family.name
            vlm = "" if config.vlm_name_or_path is None else f", VLM of {config.vlm_name_or_path}"
            finding = f"{checkpoint.full_name} ({family}) from {where}{vlm}"
            finding += f"; {told_licence(checkpoint) or 'no licence in its files'}"
            doubt = f"Its prompt is not told by what it holds: {found.text}. `extract` asks for --camera-names."
            answer.set_result(verdict("model", finding, warn="" if found.family else doubt))
        except Exception as error:  # raised in the caller's thread
            answer.set_exception(error)

    threading.Thread(target=read, daemon=True).start()  # if it hangs, it ends with the program
    try:
        return answer.result(HUB_TIMEOUT_S)
    except TimeoutError:
        finding = f"{model}: no answer within {HUB_TIMEOUT_S:.0f} s"
        return verdict("model", finding, fail="Check the network and its proxy; or pass a local directory.")
    except CheckpointError as error:
        mend = "Unset HF_HUB_OFFLINE, which is set" if constants.HF_HUB_OFFLINE else _MEND
        steps: dict[type[Exception], str] = {
            GatedRepoError: "Accept the licence on the model's page, then `hf auth login`.",
            RepositoryNotFoundError: "Check the name; a private model needs `hf auth login`.",
            LocalEntryNotFoundError: f"{mend}; or pass a local directory.",
        }
        fitting = (step for kind, step in steps.items() if isinstance(error.__cause__, kind))
        remedy = next(fitting, "Pass a hub id or a directory with a complete checkpoint.")
        return verdict("model", str(error), fail=remedy)


def _requirements() -> dict[str, str]:
    """Package -> least version, without optional ones."""
    try:
        lines = metadata.requires("alpacache") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = tomllib.loads(_PYPROJECT.read_text())["project"]["dependencies"]
    matches = (_AT_LEAST.match(line) for line in lines if "extra ==" not in line)
    return {match[1]: match[2] for match in matches if match}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
