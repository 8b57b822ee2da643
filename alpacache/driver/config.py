"""Settings of `drive`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from alpacache.config import Config, Name, Place, Repeats, Seed, expect
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.planning.config import MemoryBudget, Route
from alpacache.sources.config import Cameras, Frames

_Seconds = Annotated[float, Ge(0), Le(1e6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveConfig(Config):
    """Settings of `drive`."""

    source: Place
    """`folder:DIR`, `pai`, `pai:DIR` or `synthetic:N`: recordings with pictures and poses."""
    model: Place
    """Hub id or directory of an Alpamayo checkpoint."""
    out: Place
    """File of the film, `FILM.mp4`; a film of `drive` that is there is replaced, no other file is."""
    checkpoint: Place | None = None
    """Run directory or checkpoint to show beside the base model. Default: the base model alone."""
    ema: bool = False
    """Use the average of the weights that a run with `--ema` kept."""
    clip: Name | None = None
    """The recording to play. Default: the source's first."""
    begin: _Seconds = 0.0
    """Seconds into the recording at which the film begins, or when there is history enough."""
    seconds: Annotated[float, Ge(0.1), Le(1e6)] | None = None
    """Length of the film. Default: to the end of the recording."""
    every: Annotated[float, Ge(0.1), Le(0.5)] = 0.2
    """Seconds from one picture of the film, with new paths, to the next: 0.1 to 0.5."""
    cameras: Cameras = (FRONT_CAMERA,)
    """Cameras that the model sees, by full or short names; the front camera, or else the first, is shown."""
    frames: Frames | None = None
    """Images per camera that the model sees. Default: as many as the run's stores have, else 4."""
    route: Route = "none"
    """`source` puts the source's routes into the prompt, any other text is the route throughout."""
    paths: Repeats = 6
    """Paths of each model at a time."""
    flow_steps: Repeats = 10
    """Euler steps from noise to action."""
    seed: Seed = 0
    """Seed of the noise, which both models share."""
    vlm: Place | None = None
    """Directory or hub id whose VLM weights take the place of the model's own."""
    memory_budget: MemoryBudget | None = None
    """Size of the card to stay within, such as `12GB`; where the VLM's weights do not fit, they come from RAM or from
    the files for each picture. Default: what is free."""
    device: Name | None = None
    """`cuda`, `cuda:1` or `cpu`. Default: a GPU if there is one."""

    def _check_together(self) -> None:
        expect(self.out.lower().endswith(".mp4"), "out", self.out, "the name of a film, FILM.mp4")
        expect(not self.ema or self.checkpoint is not None, "ema", "true", "off, as no --checkpoint is given")
