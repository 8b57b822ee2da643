"""The lag curve as a picture: how well pictures fit the poses, the more one clock is shifted against the other."""

import numpy as np
from matplotlib.figure import Figure

from alpacache.checks.clocks import APART_S, LagCurve
from alpacache.pictures.canvas import DPI, GRID, INK, MODEL_COLOURS, png_bytes, style_axes


def lag_curve_png(curve: LagCurve, *, title: str) -> bytes:
    """Likeness over lag; grey is what counts as one clock, the line is the lag that fits best if that is clear."""
    figure = Figure(figsize=(6.4, 3.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-APART_S, APART_S, color=GRID, lw=0)
    likeness = np.array([np.nan if value is None else value for value in curve.likeness])
    axes.plot(curve.lags_s, likeness, color=MODEL_COLOURS[1], lw=1.8)
    if curve.best_s is not None:
        axes.axvline(curve.best_s, color=MODEL_COLOURS[0], lw=1.2)
        axes.annotate(
            f"{curve.best_s:+.2f} s" + (f", {100 * curve.drift:+.1f} %" if curve.drift is not None else ""),
            (curve.best_s, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color=MODEL_COLOURS[0],
        )
    x = "lag (s): right of 0, pictures are stamped late or poses early"
    style_axes(axes, title=title, x=x, y="likeness of both movements")
    axes.title.set_color(INK)
    return png_bytes(figure, palette=True)
