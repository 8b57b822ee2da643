"""`alpacache prepare`: samples into a self-contained dataset."""

from typing import Annotated

import typer

from cli import options

QUARANTINED = 3


def prepare(
    source: options.Source,
    out: Annotated[str, typer.Option(help="Directory for the Hugging Face dataset; must not exist.")],
    split: options.Split = "all",
    samples: options.Samples = None,
    cameras: options.Cameras = None,
    frames: options.Frames = 4,
    t0: options.T0 = "5.1",
    json: options.Json = False,
) -> None:
    """Choose samples and write them, one self-contained row each, for `extract` on another machine.

    Example: `alpacache prepare folder:my_drives --out samples/train --split train --t0 every:2.0`
    """
    raise NotImplementedError
