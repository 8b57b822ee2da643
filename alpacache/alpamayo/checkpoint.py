"""A checkpoint in the public layout: a directory, or a hub id whose files are fetched only as they are needed.

Stage two must not pay for the VLM, neither in memory nor in download: tensors are listed from the safetensors headers,
and only the shards that hold wanted names are opened (or fetched).
"""

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor

from alpacache.alpamayo.checkpoint_files import files_below, is_snapshot
from alpacache.alpamayo.families import read_config
from alpacache.alpamayo.family import OWN_PARTS, AlpamayoConfig
from alpacache.alpamayo.foreign_files import (
    Schema,
    TensorInfo,
    check_header,
    conform,
    opened,
    read_header,
    read_json,
)
from alpacache.errors import CheckpointError
from alpacache.hub import MODEL_ID, absent, why_unreachable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ORIGIN = "alpacache"
"""Key in the index's metadata under which `alpacache export` says what a checkpoint was made from."""
FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of weights that a module can take as they are; others have scales beside them."""
_SHOWN = 20
_FINGERPRINT_TENSORS = 64
_FINGERPRINT_BYTES = 4096
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")


class MissingFileError(CheckpointError):
    """A file that an existing checkpoint does not have."""


class _Index(Schema):
    """The index of a checkpoint in several files."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]
    metadata: dict[str, Any] | None = None


class _Model(Schema):
    """A model by its name; how else it is known is compared key by key."""

    model_config = ConfigDict(extra="allow")
    id: str
    revision: str | None = None


class _Origin(Schema):
    vlm: _Model
    base: _Model
    trained: dict[str, Any]


class Checkpoint:
    """One checkpoint. `model` is a directory or a hub id such as `nvidia/Alpamayo-R1-10B`.

    With `vlm`, the VLM's weights are taken from that directory or hub id instead: an Alpamayo checkpoint (`vlm.*`) or a
    Qwen3-VL one as transformers saves it (`model.*`, `lm_head.*`). Everything else stays the model's.
    """

    def __init__(self, model: str, *, revision: str | None = None, vlm: str | None = None) -> None:
        self.model, self._other_vlm, self._wanted_revision = model, vlm, revision
        path = Path(os.path.expanduser(model))  # noqa: PTH111  # `~` of an unknown user stays as it is
        self.directory = path if model and os.path.isdir(path) else None  # noqa: PTH112  # `Path.is_dir` raises for too long a name
        if self.directory is None and (why := _no_hub_id(model)):
            raise CheckpointError(f"{model!r} is neither a directory nor a hub id (OWNER/NAME): {why}.")

    @property
    def full_name(self) -> str:
        """OWNER/NAME for a hub id and for a snapshot in the hub's cache, else the directory's name."""
        if self.directory is None:
            return self.model
        directory = self.directory.resolve()
        if is_snapshot(directory):
            return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
        return directory.name or self.model

    @property
    def model_id(self) -> str:
        """`full_name` without the owner, the same wherever the checkpoint lies."""
        return self.full_name.rsplit("/", 1)[-1] or self.model

    @cached_property
    def config(self) -> AlpamayoConfig:
        return read_config(self.file("config.json"))

    @cached_property
    def revision(self) -> str | None:
        """Commit of the hub repository the files came from; None for a directory that does not say."""
        directory = (self.directory or self.file("config.json").parent).resolve()
        if is_snapshot(directory):
            return directory.name
        note = directory / ".cache/huggingface/download/config.json.metadata"
        if not note.is_file():
            return None
        with opened(note) as (file, _):
            commit = re.fullmatch(rb"([0-9a-f]{40})\s*", file.readline(64))
        return commit[1].decode() if commit else None

    def file(self, name: str) -> Path:
        """Local path of one file of the checkpoint, fetched from the hub if need be."""
        if self.directory is not None:
            if (path := self.directory / name).is_file():
                return path
            if os.path.lexists(path):
                raise CheckpointError(
                    f"{path} is no regular file; expected a complete checkpoint in the public layout."
                )
            raise MissingFileError(f"{path} does not exist; expected a complete checkpoint in the public layout.")
        return hub_file(self.model, name, revision=self._wanted_revision)

    def files(self, *patterns: str) -> dict[str, Path]:
        """Files of the checkpoint: path inside it, such as `vlm/config.json`, to the real path of its bytes.

        Args:
            patterns: only paths that match one of them, such as `*.json`; of a hub id only those are fetched.

        Links are followed as `files_below` says. Raises `CheckpointError` for any other, and for special files.
        """
        directory = self.directory
        if directory is None:
            from huggingface_hub import snapshot_download

            with _hub_errors(self.model, "the snapshot", self.revision):
                wanted = list(patterns) or None
                here = bool(why_unreachable())
                directory = Path(
                    snapshot_download(self.model, revision=self.revision, allow_patterns=wanted, local_files_only=here)
                )
        shards = frozenset(self.names.values() if self._index else (SINGLE,))  # no weights are fetched to know it
        return files_below(directory.resolve(), shards, patterns)

    @cached_property
    def _index(self) -> _Index | None:
        """The index; None for a checkpoint of a single file."""
        try:
            path = self.file(INDEX)
        except MissingFileError:
            return None
        return conform(_Index, read_json(path), path)

    @property
    def index_metadata(self) -> dict[str, Any]:
        """The index's metadata; empty without an index."""
        return dict((self._index and self._index.metadata) or {})

    @property
    def origin(self) -> dict[str, Any] | None:
        """The note of `alpacache export` in a checkpoint it wrote (`vlm`, `base`, `trained`); None in any other."""
        note = self.index_metadata.get(ORIGIN)
        return None if note is None else conform(_Origin, note, f"{INDEX} of {self.model}: {ORIGIN}").model_dump()

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor name to shard file name. Those of expert and projections are R1's, whatever the family."""
        names = {self._known_as(name): shard for name, shard in self._stored.items()}
        if len(names) < len(self._stored):
            twice = Counter(map(self._known_as, self._stored))
            found = listed(name for name in self._stored if twice[self._known_as(name)] > 1)
            raise CheckpointError(f"{self.model} has tensors under two names: {found}. Fetch it again.")
        return names

    def stored_name(self, name: str) -> str:
        """Name in the checkpoint's files of a tensor of `names`, or that it should have there."""
        expected = f"{self._expert_prefix}{name}" if name.startswith(OWN_PARTS) else name
        return name if name in self._stored and expected not in self._stored else expected

    def _known_as(self, stored: str) -> str:
        """Name in `names` of a tensor of the checkpoint's files."""
        inner = stored.removeprefix(self._expert_prefix)
        return inner if inner.startswith(OWN_PARTS) and stored.startswith(self._expert_prefix) else stored

    @cached_property
    def _expert_prefix(self) -> str:
        """What the files put before the names of expert and projections; a plain VLM has no config that tells."""
        own = any(name.startswith(OWN_PARTS) for name in self._stored)
        return self.config.family.expert_prefix if own else ""

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Tensor name in the files to shard file name, from the index or the single file's header."""
        if self._index is None:
            return dict.fromkeys(read_header(self.file(SINGLE)), SINGLE)
        weight_map = self._index.weight_map
        if foreign := {shard for shard in weight_map.values() if not _SHARD.fullmatch(shard)}:
            raise CheckpointError(f"{INDEX} of {self.model} names a file outside the checkpoint: {listed(foreign)}.")
        return dict(weight_map)

    def infos(self, names: Mapping[str, str]) -> dict[str, TensorInfo]:
        """Header entries of the given tensors; reads only the shards they lie in."""
        infos = {
            name: info
            for shard in sorted(set(names.values()))
            for stored, info in read_header(self.file(shard)).items()
            if names.get(name := self._known_as(stored)) == shard
        }
        if lost := names.keys() - infos.keys():
            raise CheckpointError(f"{self.model}: the index names tensors that no shard holds: {listed(lost)}.")
        return infos

    def shapes(self, *prefixes: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors under the prefixes, from headers alone: no shard is downloaded."""
        names = self.with_prefix(*prefixes)
        if self.directory is not None:
            return {name: info.shape for name, info in self.infos(names).items()}
        shards = (_hub_shapes(self.model, shard, revision=self.revision) for shard in sorted(set(names.values())))
        found = ((self._known_as(stored), shape) for shapes in shards for stored, shape in shapes.items())
        return {name: shape for name, shape in found if name in names}

    def with_prefix(self, *prefixes: str) -> dict[str, str]:
        """Names (and shards) of the tensors under the given prefixes."""
        return {name: shard for name, shard in self.names.items() if name.startswith(prefixes)}

    def read(self, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yields tensors one at a time, shard by shard, on the CPU; nothing else of a shard is read."""
        from safetensors import SafetensorError, safe_open

        for shard in sorted(set(names.values())):
            path = self.file(shard)
            read_header(path)
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in sorted(name for name, home in names.items() if home == shard):
                        yield name, file.get_tensor(self.stored_name(name))
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be read ({error}); fetch it again.") from error

    @cached_property
    def vlm_home(self) -> tuple["Checkpoint", str]:
        """The checkpoint that holds the VLM's weights, and the prefix of their names there."""
        if self._other_vlm is None:
            return self, "vlm."
        other = Checkpoint(self._other_vlm)
        return other, "vlm." if other.with_prefix("vlm.") else ""

    def vlm_fingerprint(self) -> str:
        """`fingerprint` of the VLM's weights, equal for equal weights in either layout."""
        home, prefix = self.vlm_home
        return home.fingerprint("vlm.") if prefix else home.fingerprint("model.", "lm_head.", under="vlm.")

    @cached_property
    def vlm_fingerprint_here(self) -> str | None:
        """`vlm_fingerprint` where all of the VLM's files are on this machine as they should be, else None."""
        home, prefix = self.vlm_home
        try:
            shards = set(home.with_prefix(prefix or "").values())
            return self.vlm_fingerprint() if all(map(home.file_here, shards)) else None
        except CheckpointError:  # stage two needs none of these files
            return None

    def file_here(self, name: str) -> Path | None:
        """Local path of one file of the checkpoint if it need not be fetched."""
        if self.directory is not None:
            return path if (path := self.directory / name).is_file() else None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.model, name, revision=self._wanted_revision)
        return Path(cached) if isinstance(cached, str) else None

    def fingerprint(self, *prefixes: str, under: str = "") -> str:
        """sha256 over names, dtypes, shapes and sampled bytes of the tensors under the prefixes.

        Reads 4 KiB from the start and middle of at most 64 tensors, spread over the list: enough to tell training runs
        apart without reading 16 GB. Shard boundaries do not matter. `under` is put before each name. Raises
        `CheckpointError` if there is no such tensor.
        """
        infos = self.infos(self.with_prefix(*prefixes))
        if not infos:
            raise CheckpointError(
                f"{self.model} has no tensor under {', '.join(prefixes)}; an export with --expert-only lacks "
                "the VLM. Pass a complete one."
            )
        digest = hashlib.sha256()
        names = sorted(infos)
        for name in names:
            digest.update(f"{under}{name}|{infos[name].dtype}|{infos[name].shape}\n".encode())
        for name in names[:: max(1, len(names) // _FINGERPRINT_TENSORS)]:
            info = infos[name]
            with self.file(info.shard).open("rb") as file:
                for start in (0, info.nbytes // 2):
                    file.seek(info.offset + start)
                    digest.update(file.read(min(_FINGERPRINT_BYTES, info.nbytes - start)))
        return digest.hexdigest()

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], prefix: str, *, described_by: str) -> None:
        """Refuse tensors under `prefix` that are not those expected; all that is off is listed in one error.

        Args:
            expected: shapes by the names behind the prefix.
            described_by: the files that they come from.
        """
        names, wanted = self.with_prefix(prefix), {prefix + name: shape for name, shape in expected.items()}
        stored = self.stored_name
        problems = [f"missing {stored(name)}" for name in sorted(wanted.keys() - names.keys())]
        problems += [f"unexpected {stored(name)}" for name in sorted(names.keys() - wanted.keys())]
        infos = sorted(self.infos({name: names[name] for name in names.keys() & wanted.keys()}).items())
        problems += [
            f"misshapen {stored(name)}: {list(info.shape)}, expected {list(wanted[name])}"
            for name, info in infos
            if info.shape != wanted[name]
        ]
        problems += [
            f"quantised {stored(name)}: {info.dtype}, expected {' or '.join(FLOATS)}"
            for name, info in infos
            if info.dtype not in FLOATS
        ]
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise CheckpointError(
                f"{self.model} does not fit {described_by} ({len(problems)} tensors):\n  "
                + "\n  ".join([*problems[:_SHOWN], *more])
            )


def listed(names: Iterable[str]) -> str:
    """The first eight names, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")


def _no_hub_id(model: str) -> str:
    """Why this cannot be the id of a repository on the hub, or is likelier a mistyped path; empty if it may be one."""
    if not MODEL_ID.fullmatch(model):
        is_relative = model and not model.startswith(("/", "~")) and "://" not in model
        return "check the path" + (", which is relative to the current directory" if is_relative else "")
    owner, name = model.split("/")
    if not Path(owner).is_dir():
        return ""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return ""
    near = difflib.get_close_matches(name, [path.name for path in Path(owner).iterdir()], n=1)
    hint = f"did you mean {owner}/{near[0]}" if near else "check the path"
    return f"{owner} is a directory here, without {name}; {hint}, or `hf download {model}` first if you mean the hub's"


def hub_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """A file of a hub repository, from the local cache or downloaded; errors say which command fetches it."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, name, revision):
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=bool(why_unreachable())))


def _hub_shapes(repo: str, shard: str, *, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a safetensors file on the hub, from its cached copy or else from its first bytes."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, shard, revision=revision)
    if isinstance(cached, str):
        return {name: info.shape for name, info in read_header(Path(cached)).items()}
    with _hub_errors(repo, f"the header of {shard}", revision):
        if why := why_unreachable():
            raise errors.LocalEntryNotFoundError(why)
        try:
            remote = HfApi().parse_safetensors_file_metadata(repo, shard, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except Exception as error:  # of whichever HTTP library this version of the hub's client uses
            raise OSError(str(error)) from error
    entries = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in remote.tensors.items()
    }
    return {name: info.shape for name, info in check_header(entries, f"{shard} of {repo}").items()}


@contextmanager
def _hub_errors(repo: str, name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its licence on https://huggingface.co/{repo}, then `hf auth login` and `{fetch}`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no {repo} that you may see, and it is no local directory: check the name, or `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise absent(name, repo, revision=revision) from error
    except errors.EntryNotFoundError as error:
        message = f"{repo} on the hub has no file {name}; is it a checkpoint in the public layout?"
        raise MissingFileError(message) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"fetching {name} of {repo} failed ({error}); try `{fetch}`.") from error
