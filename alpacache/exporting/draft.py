"""The directory of a new checkpoint: it appears under its name after all was written and checked."""

import errno
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.checkpoint import INDEX, ORIGIN, SINGLE
from alpacache.alpamayo.family import OWN_PARTS
from alpacache.alpamayo.foreign_files import TensorInfo, read_header
from alpacache.durable import appearing
from alpacache.errors import AlpacacheError, DataError
from alpacache.finite import not_finite
from alpacache.progress import OnProgress, Progress
from alpacache.training.trainable import changed_tensors, merge
from cache_store.storage.local_files import FULL

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


class MergedTensors:
    """The base's tensors with the run's in their place, read one at a time."""

    def __init__(
        self, base: Checkpoint, infos: Mapping[str, TensorInfo], trained: Mapping[str, Tensor], *, where: Path
    ) -> None:
        """`infos` are all tensors to export; `where` is what errors call the run."""
        self.base, self.infos, self._trained = base, infos, trained
        trainable = {name: info.shape for name, info in infos.items() if name.startswith(OWN_PARTS)}
        self.changed = changed_tensors(trained, trainable, where=where)
        self.changed_shards = {infos[name].shard for name in self.changed}

    @property
    def stored_infos(self) -> dict[str, TensorInfo]:
        """`infos` by the names in the base's files, which the new files keep."""
        return {self.base.stored_name(name): info for name, info in self.infos.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in the base's dtype, changed ones merged. Raises `DataError` where that is not finite."""
        for name, tensor in self.base.read({name: self.infos[name].shard for name in names}):
            merged = merge(name, tensor, self._trained) if name in self.changed else tensor
            if not_finite({name: merged}):
                raise DataError(
                    f"{name} of the exported model would not be finite (NaN or infinity in {merged.dtype}); export an "
                    "earlier checkpoint of the run."
                )
            yield name, merged


@dataclass(slots=True, kw_only=True)
class Draft:
    """Files of the new directory, by path inside it, each with the file of the base that it comes from."""

    linked: dict[str, Path] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    patched: dict[str, Path] = field(default_factory=dict)
    """Shards with a trained tensor: copied, then written into."""
    texts: dict[str, str] = field(default_factory=dict)
    new_bytes: int = 0
    """Size of the tensors that go into a file of their own, 0 without such a file."""

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes on disk."""
        files = sum(file.stat().st_size for part in (self.copied, self.patched) for file in part.values())
        return self.new_bytes + files + sum(len(text.encode()) for text in self.texts.values())

    @property
    def written_files(self) -> int:
        """Number of files that are not links."""
        return len(self.copied) + len(self.patched) + len(self.texts) + bool(self.new_bytes)

    def write(self, directory: Path, tensors: MergedTensors, on_progress: OnProgress) -> None:
        """Write everything, one tensor at a time where a shard is patched; what cannot be linked is copied."""
        for name in (*self.linked, *self.copied):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        for name, file in list(self.linked.items()):
            try:
                os.link(file, directory / name)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                self.copied[name] = self.linked.pop(name)
        free = shutil.disk_usage(directory).free
        if free < self.size_bytes:
            raise DataError(
                f"{directory.parent.parent} needs {self.size_bytes} bytes, {free} are free; nothing was written. Free "
                "space, or choose an --out on the base model's file system, where shards can be linked."
            )
        started, total = time.monotonic(), self.written_files - len(self.texts)
        for done, _ in enumerate(self._written(directory, tensors), start=1):
            rate = done / max(time.monotonic() - started, 1e-6)
            on_progress(Progress(done=done, total=total, unit="files", rate=rate, notes={}))
        for name, text in self.texts.items():
            (directory / name).write_text(text)
        if self.new_bytes:
            with suppress(PermissionError):  # a file system without modes
                (directory / SINGLE).chmod((directory / INDEX).stat().st_mode)  # safetensors knows no umask

    def is_in(self, directory: Path, tensors: MergedTensors) -> bool:
        """Tell whether all of it lies in a directory already: the same index but for the version, files and tensors."""
        try:
            index, note = json.loads((directory / INDEX).read_bytes()), json.loads(self.texts[INDEX])
            for document in (index, note):
                del document["metadata"][ORIGIN]["version"]
            files = {**self.linked, **self.copied, **self.patched}
            sizes = [(directory / name).stat().st_size == file.stat().st_size for name, file in files.items()]
            if index != note or not all(sizes):
                return False
            self.check(directory, tensors)
            written = Checkpoint(str(directory))
            homes = {name: written.names[name] for name in tensors.changed}
            return all(
                torch.equal(tensor, dict(written.read({name: homes[name]}))[name])
                for name, tensor in tensors.read(tensors.changed)
            )
        except (AlpacacheError, OSError, ValueError, LookupError, TypeError):
            return False

    def check(self, directory: Path, tensors: MergedTensors) -> None:
        """Read the headers of what was written and compare them with the base's."""
        written, base = Checkpoint(str(directory)), tensors.base
        wrong = misplaced(tensors.stored_infos, directory.glob("*.safetensors"))
        wrong = wrong or sorted(written.names.keys() ^ tensors.infos.keys())
        if wrong or written.config.sha256 != base.config.sha256:
            raise DataError(
                f"what was written to {directory} does not read as the base ({wrong[:3] or 'config.json'}); try again."
            )
        written.infos(written.names)  # raises where the index names the wrong shard

    def _written(self, directory: Path, tensors: MergedTensors) -> Iterator[str]:
        """Write all files except links and text files; yield each one's name afterwards."""
        for name, file in self.copied.items():
            shutil.copyfile(file, directory / name)
            yield name
        for shard, file in self.patched.items():
            shutil.copyfile(file, directory / shard)
            mine = [name for name in tensors.changed if tensors.infos[name].shard == shard]
            with (directory / shard).open("r+b") as target:
                for name, tensor in tensors.read(mine):
                    target.seek(tensors.infos[name].offset)
                    target.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            yield shard
        if self.new_bytes:
            stored = {tensors.base.stored_name(name): tensor for name, tensor in tensors.read(tensors.infos)}
            save_file(stored, directory / SINGLE, {"format": "pt"})
            yield SINGLE


@contextmanager
def writing(out: Path, draft: Draft) -> Iterator[Path]:
    """A directory whose files appear in `out` together when the body succeeds; errors of writing become `DataError`.

    Where they are moved one by one, the config comes last: without it the rest is no checkpoint.
    """
    try:
        with appearing(out, last=("config.json",)) as directory:
            yield directory
    except (OSError, SafetensorError) as error:
        if isinstance(error, AlpacacheError):
            raise
        full = isinstance(error, SafetensorError) or error.errno in FULL
        reason = error.strerror if isinstance(error, OSError) and error.filename == str(out) else error
        raise DataError(
            f"the checkpoint could not be written to {out} ({reason}); it needs {draft.size_bytes} bytes there. "
            f"Nothing was left; {'free space' if full else 'see to the cause'} and export again."
        ) from error


def misplaced(infos: Mapping[str, TensorInfo], shards: Iterable[Path]) -> list[str]:
    """Sorted names of tensors that are not exactly once in the shards with the expected dtype and shape."""
    stored = defaultdict(list)
    for shard in shards:
        for name, info in read_header(shard).items():
            stored[name].append((info.dtype, info.shape))
    expected = {name: [(info.dtype, info.shape)] for name, info in infos.items()}
    return sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
