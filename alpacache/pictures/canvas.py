"""Colours and sizes that all pictures share, plain text in matplotlib, and figures as PNG bytes.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; truth and baselines differ in line style too.
"""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

MODEL_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colours by order of models: before is vermilion, after is blue."""
BASELINE_STYLES = (("#8a6d00", (0, (5, 3))), ("#7b68c8", (0, (1, 2))))
TRUTH_COLOUR = "#1a1a1a"
HISTORY_COLOUR = "#9a9a9a"
INK = "#333333"
GRID = "#e6e6e6"
EGO_M = (4.6, 1.9)
"""Length and width of the vehicle drawn at t0."""
MIN_LENGTH_M = 24.0
"""Least length of road shown, or the noise of a standing vehicle would look like a drive."""
LONGEST_LABEL = 60
"""Characters; longer ones leave no room for the axes."""
DPI = 110


def style_axes(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Draw a pale grid behind the data, small labels, no frame, and these texts as they are."""
    if title:
        axes.set_title(literal(title), loc="left", fontsize=10, color=INK)
    if x:
        axes.set_xlabel(x, fontsize=9, color=INK)
    if y:
        axes.set_ylabel(y, fontsize=9, color=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def literal(text: str) -> str:
    """Shorten a long label in its middle, for which a picture has no room, and escape it.

    matplotlib would read `$` as mathematics and hide a label that begins with an underscore.
    """
    if len(text) > LONGEST_LABEL:
        text = f"{text[: LONGEST_LABEL // 2]}…{text[1 - LONGEST_LABEL // 2 :]}"
    plain = text.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def png_bytes(figure: Figure, *, palette: bool) -> bytes:
    """Encode a figure; a palette makes drawings (not photographs) a third of the size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if palette:
        image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=palette)
    return out.getvalue()
