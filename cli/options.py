"""Options that several commands share, and how their text becomes config values."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from alpacache.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Device = Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; a GPU if there is one.")]
Ema = Annotated[bool, typer.Option("--ema", help="Use the average of the weights that the run kept.")]
Model = Annotated[str, typer.Option(help="Hub id or directory of an Alpamayo checkpoint.")]
Source = Annotated[
    str,
    typer.Argument(
        help="`folder:DIR`, `pai`, `pai:DIR`, `hf:PATH`, `synthetic:N`, or a directory that `prepare` wrote."
    ),
]
Split = Annotated[str, typer.Option(help="`train`, `val` or `all`; by md5 of the clip id, 90 to 10.")]
Samples = Annotated[int | None, typer.Option(help="At most this many samples; 10 is the pilot run.")]
Cameras = Annotated[
    str | None, typer.Option(help="Comma-separated, such as `front_wide,front_tele`. Default: front_wide.")
]
Frames = Annotated[int, typer.Option(help="Images a camera, 0.1 s apart, ending at t0 (1 to 4).")]
T0 = Annotated[str, typer.Option(help="Seconds into the clip (`5.1`), `every:2.0`, or `events`.")]

Views = Annotated[
    int, typer.Option(help="Times each sample is extracted: as it is, then with small seeded changes of its pictures.")
]


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were really given, so that config files and defaults fill the rest."""
    return {key: value for key, value in values.items() if value is not None}


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Check a choice and name the alternatives."""
    if value not in allowed:
        raise UsageError(f"--{name} is {value!r}; expected {', '.join(allowed)}.")
    return value


def camera_names(text: str | None) -> tuple[str, ...]:
    """Full camera names from comma-separated full or short ones (`front_wide` is `camera_front_wide_120fov`)."""
    from alpacache.driving.sample import FRONT_CAMERA, full_camera_name

    return (FRONT_CAMERA,) if text is None else tuple(full_camera_name(part.strip()) for part in text.split(","))


def height_and_width(text: str) -> tuple[int, int]:
    """`1080x1920`."""
    try:
        height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise UsageError(f"--picture is {text!r}; expected HEIGHTxWIDTH, such as 1080x1920.") from None
    if min(height, width) < 1:
        raise UsageError(f"--picture is {text!r}; expected at least one pixel each way.")
    return height, width


def shard(text: str) -> tuple[int, int]:
    """`I/N`, counted from 0."""
    try:
        worker, workers = (int(part) for part in text.split("/"))
    except ValueError:
        raise UsageError(f"--shard is {text!r}; expected I/N counted from 0, such as 0/8.") from None
    return worker, workers


def count_or_auto(name: str, text: str) -> int | str:
    """A number, or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--{name} is {text!r}; expected a number or auto.") from None


def labelled(items: list[str]) -> dict[str, str]:
    """`LABEL=RUN` pairs."""
    pairs = {}
    for item in items:
        label, separator, run = item.partition("=")
        if not (label and separator and run):
            raise UsageError(f"--compare {item!r}: expected LABEL=RUN.")
        pairs[label] = run
    return pairs
