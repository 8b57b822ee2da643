"""Settings of stage one."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from alpacache.config import MOST, BatchSize, Name, Place, Seed, Threads, expect, parts, whole_number
from alpacache.driving.cameras import check_blank
from alpacache.planning.config import MemoryBudget, StoredConfig
from alpacache.sources.config import Blank, SamplesConfig

_Share = Annotated[int, Ge(0), Le(MOST)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig(StoredConfig, SamplesConfig):
    """Settings of `extract`."""

    model: Place
    """Hub id or directory of an Alpamayo checkpoint."""
    store: Place
    """Directory or s3://BUCKET/PREFIX of the store; created if absent."""
    blank: Blank = ()
    """Further cameras, recorded or not, each of which a black picture stands in for and keeps the place of."""
    codec_from: Place | None = None
    """Store whose basis and tables `--codec transform:RATE` takes, rather than learning its own."""
    seed: Seed = 0
    """Seed of the changes that views make."""
    vlm: Place | None = None
    """Directory or hub id whose VLM weights take the place of the model's own."""
    vlm_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision that the VLM runs in, whatever its weights are stored in; `fp32` takes twice the memory."""
    camera_names: bool | None = None
    """Name cameras in the prompt. Default: as the model was trained (1.5 yes, R1 no), by what the checkpoint holds."""
    frame_numbers: bool | None = None
    """Number each camera's frames in the prompt. Default: as the model was trained."""
    route_tokens: bool | None = None
    """Write routes between the route tokens, not as they are. Default: as the model was trained (1.5 yes, R1 takes no
    routes)."""
    shard: Annotated[tuple[_Share, _Share], parts(whole_number, "I/N", expected="I/N, as in 0/4", separator="/")] = (
        0,
        1,
    )
    """This worker's number, from 0, and how many there are. Under torchrun its processes divide this share again."""
    deterministic: bool = False
    """Same bytes on every run on one GPU model, a little slower."""
    retry_quarantined: bool = False
    """Try samples again that failed before."""
    force: bool = False
    """Begin even if the disk has no room for all of it."""
    batch_size: BatchSize | None = None
    """Samples that go through the VLM at a time. Default: as many as have 32 images together on a GPU; 1 on a CPU
    and where runs are deterministic."""
    workers: Threads | None = None
    """Samples that are read and preprocessed at a time ahead of the VLM, by processes beside a GPU and by threads
    elsewhere. Default: two fewer than there are CPU cores, 2 to 24, shared by torchrun's processes."""
    writers: Threads = 6
    """Threads that commit samples behind the VLM. Each holds a sample in host memory, beside those that go through the
    VLM at a time, or two at least."""
    memory_budget: MemoryBudget | None = None
    """Size of the card to stay within, such as `12GB`: GPU memory is capped at half a GiB less. Where the VLM's weights
    do not fit, they come from RAM or from the files for each group of samples. Default: what is free."""
    weights: Literal["auto", "gpu", "ram", "files"] = "auto"
    """Home of the weights of the VLM's layers while they do not compute: the GPU, page-locked RAM, or the checkpoint's
    files, which want a fast drive. `auto`: the first of these that fits."""
    compile: bool | None = None
    """On a GPU, let torch.compile fuse the VLM's small operations; rounds differently. Default: where at least a minute
    of prefill is left and runs need not be deterministic."""
    device: Name | None = None
    """`cuda`, `cuda:1` or `cpu`. Default: a GPU if there is one."""

    def _check_together(self) -> None:
        check_blank(self.cameras, self.blank)
        worker, workers = self.shard
        expect(0 <= worker < workers, "shard", f"{worker}/{workers}", "I/N with 0 <= I < N, as in 0/4")
        expect(not (self.compile and self.deterministic), "compile", True, "off, as the run is to be deterministic")
        alone = self.batch_size in (None, 1) or not self.deterministic
        expect(alone, "batch_size", self.batch_size, "1, as the run is to be deterministic")
