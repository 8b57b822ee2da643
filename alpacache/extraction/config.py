"""What stage one is told."""

from dataclasses import dataclass
from typing import Literal

from alpacache.config_file import check_value
from alpacache.driving.sample import FRONT_CAMERA
from cache_store import CodecName


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """Stage one."""

    source: str
    """`folder:DIR`, `pai`, `pai:DIR`, `hf:PATH`, `synthetic:N`, or a directory that `prepare` wrote."""
    model: str
    """Hub id or directory of an Alpamayo checkpoint."""
    store: str
    split: Literal["train", "val", "all"] = "all"
    samples: int | None = None
    """At most this many; 10 is the pilot run."""
    cameras: tuple[str, ...] = (FRONT_CAMERA,)
    frames: int = 4
    """Images a camera, 0.1 s apart, the last at t0."""
    t0: str = "5.1"
    """Seconds into the clip, `every:S`, or `events`."""
    views: int = 1
    """Times that each sample is extracted: once as it is, then with seeded changes of its pictures."""
    seed: int = 0
    """Of these changes."""
    vlm: str | None = None
    """Directory or hub id whose VLM weights take the place of the model's own."""
    camera_names: bool | None = None
    """Whether the prompt names cameras; None: as the model was trained (1.5 yes, R1 no)."""
    frame_numbers: bool | None = None
    """Whether it numbers the frames of each; None: as the model was trained."""
    codec: CodecName = "bf16"
    """How KV is stored: lossless, or quantised by one of `cache_store.CODECS`."""
    hidden_states: Literal["last", "none"] = "last"
    reasoning: Literal["none", "rollout"] = "none"
    """`rollout`: beside the direct prompt's KV, that of sampled reasoning texts."""
    rollouts: int = 6
    """Texts a sample, with `rollout`."""
    shard: tuple[int, int] = (0, 1)
    """This worker's number and how many there are. Under torchrun its processes divide this share again."""
    deterministic: bool = False
    retry_quarantined: bool = False
    force: bool = False
    """Begin even if the disk has no room for all of it."""
    batch_size: int | None = None
    """Samples that go through the VLM at a time; None: `prefill_batch` on a GPU, 1 on a CPU and where runs must be
    deterministic."""
    workers: int | None = None
    """How many samples are read and preprocessed at a time ahead of the VLM, by processes beside a GPU and by threads
    elsewhere; None: as many as there are CPU cores less two, 2 to 24, shared by torchrun's processes."""
    writers: int = 6
    """Threads that commit samples behind it; host memory holds more samples than that by what goes through the VLM at a
    time, and by two at least."""
    device: str | None = None

    def __post_init__(self) -> None:
        check_value(self.samples is None or self.samples >= 1, "samples", self.samples, "at least 1")
        check_value(1 <= self.frames <= 4, "frames", self.frames, "1 to 4")
        check_value(self.views >= 1, "views", self.views, "at least 1")
        check_value(0 <= self.shard[0] < self.shard[1], "shard", self.shard, "I/N with 0 <= I < N")
        check_value(self.workers is None or self.workers >= 1, "workers", self.workers, "at least 1")
        check_value(self.writers >= 1, "writers", self.writers, "at least 1")
        check_value(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        alone = self.batch_size in (None, 1)
        check_value(
            alone or not self.deterministic, "batch_size", self.batch_size, "1, as the run is to be deterministic"
        )
        check_value(self.rollouts >= 1, "rollouts", self.rollouts, "at least 1")

    @property
    def tails(self) -> int:
        """Reasoning rollouts that each sample is stored with."""
        return self.rollouts if self.reasoning == "rollout" else 0
