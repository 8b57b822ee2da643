"""Make the weights that the demo ships, in about ten minutes on one GPU with 16 cores beside it.

`python benchmarks/demo_weights/make_weights.py OUT --device cuda`

First the VLM (`pretrain_vlm`), then, with that frozen, an expert on straight drives alone, each with the pictures of
another drive, so that it learns neither to turn nor to look. Its bias is honest: it comes from what it was shown, not
from a weight that somebody set to zero. `OUT/demo_model.safetensors` and `OUT/provenance.json` then go to
`alpacache/demo/`. `--limit-s` bounds the VLM's training, and `--quick` tries it all in minutes, for weights that know
nothing. `--vlm FILE` keeps the VLM of weights that are there, and makes the expert alone in minutes.

With the drives' own pictures it still looked a little: another clip's prefix raised its loss by 4.3 to 4.9 % in three
shufflings on 32 draws a sample.
"""

import argparse
import json
import logging
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pretrain_vlm import SEED, pretrain
from safetensors.torch import load_file, save_file

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.demo.story import WEIGHTS, extract_config, overlay
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.extraction.extract import extract
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource
from alpacache.training.config import TrainConfig
from alpacache.training.train import train

STRAIGHT_HEAVY = {"straight": 1.0}
QUICK = {"clips": 20, "strayed_clips": 60, "steps": 6, "warm_up_steps": 4, "batch": 8}
VLM = "demo_vlm.safetensors"


class OtherPictures(SyntheticSource):
    """Straight drives, each with the pictures of another drive of any shape: what is seen says nothing of the way."""

    def __init__(self, clips: int) -> None:
        super().__init__(clips, seed=SEED + 2, mix=STRAIGHT_HEAVY)
        self._seen = SyntheticSource(clips, seed=SEED + 3)

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The other drive's pictures at the same times."""
        return self._seen.film(self._seen.clip_ids[self.clip_ids.index(clip_id)], camera, times_us)


def train_biased_expert(out: Path, *, clips: int = 300, steps: int = 250) -> dict[str, float | None]:
    """Train an expert for the VLM in `out`, write `demo_model.safetensors` with both, and return its losses."""
    model = make_tiny_checkpoint(out / "Demo-R1", seed=0, shards=1)
    vlm = load_file(out / VLM)
    overlay(model, vlm)
    source = OtherPictures(clips)
    refs, _ = select(source)
    prepare(source, refs, out / "straight", cameras=[FRONT_CAMERA], frames=1)
    extract(extract_config(str(out / "straight"), str(model), out / "straight-cache"))
    config = TrainConfig(
        stores=(str(out / "straight-cache"),),
        model=str(model),
        out=str(out / "straight-run"),
        steps=steps,
        batch_size=16,
        draws=4,
        lr=2e-3,
        save_every=steps,
        in_memory=True,
        device="cpu",
    )
    report = train(config)
    expert = load_file(out / "straight-run/last/model.safetensors")
    shipped = vlm | {name: tensor.bfloat16() for name, tensor in expert.items()}
    save_file(shipped, out / WEIGHTS, {"format": "pt"})
    losses = {"first_loss": report.first_loss, "last_loss": report.last_loss}
    return {name: None if loss is None else round(loss, 5) for name, loss in losses.items()}


def main() -> None:
    """Make both parts, and write down where they come from."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vlm", type=Path, help="weights of the demo whose VLM is kept, with provenance.json beside")
    parser.add_argument("--device", default="cpu", help="of the VLM's training")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="most seconds of the VLM's training")
    parser.add_argument("--quick", action="store_true", help="try it: a few drives and steps")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.vlm is None:
        vlm = pretrain(options.out, device=options.device, limit_s=options.limit_s, **(QUICK if options.quick else {}))
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor for name, tensor in load_file(options.vlm).items() if name.startswith("vlm.")}
        save_file(kept, options.out / VLM, {"format": "pt"})
        vlm = json.loads(options.vlm.with_name("provenance.json").read_text())["vlm"]
    expert = train_biased_expert(options.out, **({"clips": 20, "steps": 5} if options.quick else {}))
    note = {
        "what": "weights of the demo: vlm.* from generated drives, expert and projections from straight ones with the "
        "pictures of others",
        "command": "python benchmarks/demo_weights/make_weights.py OUT --device cuda",
        "vlm": vlm,
        "expert": {"mix": STRAIGHT_HEAVY, "seed": SEED + 2, "pictures_seed": SEED + 3, **expert},
    }
    (options.out / "provenance.json").write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
