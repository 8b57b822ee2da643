"""Files of a data set on the hub, of one commit: in the hub's cache, each when it is first asked for."""

from dataclasses import dataclass
from pathlib import Path

from alpacache.converters.log_files import UnusableError
from alpacache.errors import UsageError
from alpacache.hub import why_unreachable

INFO = "meta/info.json"
"""Name of the file by which a commit is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """Files of a data set on the hub."""

    repo: str
    revision: str
    """Commit; offline that of the cache."""
    root: Path
    """The commit's folder in the cache."""

    @classmethod
    def of(cls, repo: str) -> "HubFiles":
        """The newest commit, with its index; offline, what the cache has. Raises `UsageError`."""
        from huggingface_hub import HfApi, snapshot_download

        here = bool(why_unreachable())
        try:
            revision = None if here else HfApi().dataset_info(repo).sha
            info = _download(repo, INFO, revision)
            patterns = ["meta/*"]
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=here
            )
        except (OSError, ValueError) as error:  # the hub's own errors are among them
            remedy = f"Fetch it where there is a network: hf download {repo} --repo-type dataset"
            why = why_unreachable() or str(error).partition("\n")[0]
            raise UsageError(
                f"{repo} is no folder here, and the hub does not give {INFO} of it ({why}). {remedy}"
            ) from error
        return cls(repo=repo, revision=info.parents[1].name, root=info.parents[1])

    def fetch(self, file: Path) -> None:
        """Put a file below `root` into the cache. Raises `UnusableError` for one that cannot be had."""
        name = file.relative_to(self.root).as_posix()
        try:
            _download(self.repo, name, self.revision)
        except (OSError, ValueError) as error:
            why = why_unreachable() or str(error).partition("\n")[0]
            raise UnusableError(f"the hub does not give {name} of {self.repo} ({why})") from error


def _download(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    here = bool(why_unreachable())
    return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_files_only=here))
