"""Files of a checkpoint on the hub, from the local cache or downloaded, and errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alpacache.alpamayo.foreign_files import check_header, read_header
from alpacache.errors import CheckpointError


class MissingFileError(CheckpointError):
    """A file that an existing checkpoint does not have."""


def hub_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """A file of a hub repository, from the local cache or downloaded; errors say which command fetches it."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, name, revision):
        return Path(hf_hub_download(repo, name, revision=revision))


def hub_shapes(repo: str, shard: str, *, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a safetensors file on the hub, from its cached copy or else from its first bytes."""
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, shard, revision=revision)
    if isinstance(cached, str):
        return {name: info.shape for name, info in read_header(Path(cached)).items()}
    with _hub_errors(repo, f"the header of {shard}", revision):
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


def hub_snapshot(repo: str, *, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The snapshot's directory with all files that match; missing ones are downloaded."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, "the snapshot", revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns) or None))


def is_snapshot(directory: Path) -> bool:
    """Whether this is `models--OWNER--NAME/snapshots/REVISION` of the hub's cache, whose files are links to `blobs`."""
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")


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
        raise CheckpointError(
            f"{name} of {repo} is not in the local hub cache and the hub cannot be reached. On a machine with network: "
            f"`{fetch}`; then copy the cache (HF_HOME) here, or pass the directory of the checkpoint instead of the id."
        ) from error
    except errors.EntryNotFoundError as error:
        message = f"{repo} on the hub has no file {name}; is it a checkpoint in the public layout?"
        raise MissingFileError(message) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"fetching {name} of {repo} failed ({error}); try `{fetch}`.") from error
