"""Pictures are read back as pixels: the right colours on the right side, and no global state touched."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from alpacache.evaluation.plots import (
    bias_scatter_png,
    error_over_time_png,
    explained_png,
    loss_curves_png,
)
from alpacache.metrics.bias import Slope
from alpacache.metrics.bootstrap import Interval
from alpacache.pictures.birds_eye import birds_eye_png
from alpacache.pictures.canvas import INK, MODEL_COLOURS

TIMES_S = 0.1 * np.arange(1, 65)
HISTORY = np.stack([8.0 * 0.1 * np.arange(-15, 1), np.zeros(16), np.zeros(16)], axis=-1)
LINE = Slope(slope=0.5, low=0.4, high=0.6, intercept=0.0, n=40)


def path(lateral_m: float) -> np.ndarray:
    return np.stack([8.0 * TIMES_S, lateral_m * (TIMES_S / 6.4) ** 2, 0 * TIMES_S], axis=-1)


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def where(image: np.ndarray, colour: str) -> np.ndarray:
    """Rows and columns `[N, 2]` of pixels near a colour, darker or lighter by what transparency leaves."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return np.argwhere(np.abs(image - wanted).max(axis=-1) < 75)


def test_left_is_left_and_forward_is_up() -> None:
    image = pixels(
        birds_eye_png(
            truth_xyz=path(0.0),
            history_xyz=HISTORY,
            paths={"before": path(-12.0)[None], "after": path(12.0)[None]},
        )
    )

    # The middle third is free of the legend, which is drawn in the same colours.
    middle = image[image.shape[0] // 3 : image.shape[0] * 2 // 3]
    right, left = where(middle, MODEL_COLOURS[0]), where(middle, MODEL_COLOURS[1])
    assert min(len(right), len(left)) > 100
    assert left[:, 1].max() < right[:, 1].min()
    rows = left[:, 0]
    assert left[rows < np.quantile(rows, 0.2), 1].mean() < left[rows > np.quantile(rows, 0.8), 1].mean() - 5


def test_front_frame_is_beside_the_view() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (320, 160), (10, 200, 30)).save(buffer, format="JPEG")

    without = pixels(birds_eye_png(truth_xyz=path(0.0), history_xyz=HISTORY, paths={"after": path(1.0)[None]}))
    beside = pixels(
        birds_eye_png(
            truth_xyz=path(0.0), history_xyz=HISTORY, paths={"after": path(1.0)[None]}, front_jpeg=buffer.getvalue()
        )
    )

    assert beside.shape[1] > 2 * without.shape[1]
    green = np.argwhere(np.abs(beside - np.array([10, 200, 30])).max(axis=-1) < 12)
    assert len(green) > 0.15 * beside.shape[0] * beside.shape[1]
    assert green[:, 1].max() < 0.7 * beside.shape[1]


def test_a_damaged_front_frame_is_named() -> None:
    with pytest.raises(ValueError, match="the front frame of 9 bytes is no image"):
        birds_eye_png(truth_xyz=path(0.0), history_xyz=HISTORY, paths={}, front_jpeg=b"not a jpg")


def test_standstill_and_hostile_labels_can_be_drawn() -> None:
    png = birds_eye_png(
        truth_xyz=np.zeros((64, 3)),
        history_xyz=np.zeros((16, 3)),
        paths={"$\\bad{": np.zeros((6, 64, 3)), "_hidden": np.zeros((6, 64, 3))},
        baselines={"constant velocity": np.zeros((64, 3))},
        title="$x_{<b>@1#0",
    )
    assert pixels(png).shape[2] == 3


def test_scatter_has_a_panel_a_model_and_marks() -> None:
    truth = np.linspace(-0.6, 0.6, 40)
    both = {"before": 0.5 * truth, "after": truth}

    one = pixels(bias_scatter_png(truth, {"before": 0.5 * truth}, {"before": LINE}))
    two = pixels(bias_scatter_png(truth, both, {"before": LINE, "after": None}, marked=truth > 0.3))

    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=2)
    assert len(where(two, MODEL_COLOURS[0])) > 200
    columns = where(two, MODEL_COLOURS[1])[:, 1]
    assert np.median(columns) > two.shape[1] / 2


def test_scatter_of_nothing_is_an_empty_frame() -> None:
    assert pixels(bias_scatter_png(np.zeros(0), {"after": np.zeros(0)}, {"after": None})).size


def test_larger_error_is_drawn_higher() -> None:
    error = np.linspace(0.0, 1.0, 64)[None] * np.array([[1.0], [1.2]])
    panels = {"all": {"before": 4 * error, "after": error}}
    image = pixels(error_over_time_png(panels, dashed={"all": {"constant velocity": 3 * error}}))
    right_half = image[:, image.shape[1] * 3 // 4 :]
    assert where(right_half, MODEL_COLOURS[0])[:, 0].mean() < where(right_half, MODEL_COLOURS[1])[:, 0].mean()


def test_every_stratum_has_a_panel() -> None:
    error = {"after": np.linspace(0.0, 1.0, 64)[None]}
    one, three = (pixels(error_over_time_png({str(n): error for n in range(count)})) for count in (1, 3))
    assert three.shape[0] > 1.8 * one.shape[0]
    assert three.shape[1] > 1.8 * one.shape[1]
    half = np.array(three.shape[:2]) // 2
    for rows in (slice(0, half[0]), slice(half[0], None)):
        assert len(where(three[rows, : half[1]], MODEL_COLOURS[0]))
    assert not len(where(three[half[0] :, half[1] :], MODEL_COLOURS[0]))


def test_loss_curves_fall_where_the_loss_does() -> None:
    rows: list[dict[str, float | None]] = [{"step": step, "loss": 3.0 - step / 100} for step in range(1, 201)]
    rows[50]["loss"] = None
    rows[99]["val_loss"], rows[199]["val_loss"] = 2.0, 2.9
    image = pixels(loss_curves_png({"run": rows}))
    plot = image[image.shape[0] // 4 : image.shape[0] * 4 // 5, image.shape[1] // 6 :]
    ink = where(plot, INK)
    third = plot.shape[1] // 3
    assert ink[ink[:, 1] < third][:, 0].mean() < ink[ink[:, 1] > 2 * third][:, 0].mean()
    assert len(where(plot, MODEL_COLOURS[1]))
    assert loss_curves_png({})


def test_threads_draw_the_same_bytes_without_pyplot() -> None:
    def draw(_: int) -> bytes:
        return error_over_time_png({"all": {"after": np.ones((3, 64))}})

    loaded = "matplotlib.pyplot" in sys.modules
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(draw, range(4)))

    assert len(set(drawn)) == 1
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_bars_grow_with_what_is_explained() -> None:
    def bars(share: float) -> bytes:
        one = Interval(estimate=share, low=share - 0.1, high=share + 0.1, n=40, clips=20)
        panels = {"heading change": {"history": {"ridge": None, "mlp": None}, "both": {"ridge": one, "mlp": one}}}
        return explained_png(panels, {"by layer": {"layer 0": one, "layer 1": None}}, columns=1)

    # Above the second row of panels and beside the legend there is nothing blue but bars.
    low, high = (pixels(bars(share)) for share in (0.2, 0.8))
    counts = [
        len(where(image[: image.shape[0] // 2, image.shape[1] // 2 :], MODEL_COLOURS[1])) for image in (low, high)
    ]
    assert 3 < counts[1] / counts[0] < 5


@pytest.mark.parametrize("models", [1, 3, 5])
def test_nothing_of_the_bias_figure_is_cut_off(models, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr("alpacache.evaluation.plots.png_bytes", lambda figure, **_: drawn.append(figure) or b"")
    turns = np.linspace(-1, 1, 30)
    bias_scatter_png(turns, {f"model {number}": 0.5 * turns for number in range(models)}, {"model 0": LINE})
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in (axes._left_title, axes.xaxis.label, axes.yaxis.label):
            box = text.get_window_extent()
            assert not text.get_text() or ((box.min >= 0).all() and (box.max <= figure.bbox.max).all()), text
