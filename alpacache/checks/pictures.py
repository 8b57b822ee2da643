"""Checks of pictures: that they show something, have one size, and are not mirrored against the poses."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.motion import Motion
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Floats, Sample
from alpacache.driving.strata import heading

Picture: TypeAlias = NDArray[np.uint8]
WIDTH_PX = 256
"""Width at which pictures are matched."""
BLOCK_PX = 48
REACH_PX = 36
"""Furthest shift of a block that is looked for."""
ROWS = (0.25, 0.62)
"""Share of the height around the horizon: the far field, above road and bonnet."""
PLACES = (0.12, 0.24, 0.36)
"""Distances of the blocks' middles from the picture's middle, as a share of its width."""
_LEFTS = [round((0.5 + side * place) * WIDTH_PX) - BLOCK_PX // 2 for place in PLACES for side in (-1, 1)]
"""First columns of the blocks, in pairs."""
MIN_LIKENESS = 0.6
MIN_CONTRAST = 2.0
MIN_SHIFT_PX = 0.75
ONE_COLOUR = 1.0
"""Standard deviation below which a picture shows one colour only."""


def sideways_shift_px(earlier: Picture, later: Picture) -> float | None:
    """Pixels, of 256 across, by which the far field of `[3, H, W]` pictures moved right; None if that is not clear."""
    return shift_px(far_field(earlier), far_field(later))


def shift_px(before: Floats, after: Floats, *, quick: bool = False) -> float | None:
    """Pixels by which a far field moved right; None if that is not clear. `quick`: one band of rows, not three."""
    if quick:
        bands = [_matches(before, after)]
    else:
        middle = len(before) // 2
        upper, lower = _matches(before[:middle], after[:middle]), _matches(before[middle:], after[middle:])
        bands = [upper, lower, [one.joined(other) for one, other in zip(upper, lower, strict=True)]]
    shifts = []
    for band in bands:
        each = [_block_shift(match, left) for match, left in zip(band, _LEFTS, strict=True)]
        for left, right in zip(each[::2], each[1::2], strict=True):
            if left is not None and right is not None:
                shifts.append((left + right) / 2)
    return float(np.median(shifts)) if len(shifts) >= 2 else None


def far_field(picture: Picture) -> Floats:
    """Rows around the horizon of a `[3, H, W]` picture: grey, 256 across, a little blurred."""
    small = _small(picture)
    low, high = (int(share * len(small)) for share in ROWS)
    return small[low:high]


def _small(picture: Picture) -> Floats:
    """Grey `[h, 256]`, a little blurred."""
    from PIL import Image, ImageFilter

    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).convert("L")
    height = max(16, round(image.height * WIDTH_PX / image.width))
    small = image.resize((WIDTH_PX, height), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(1))
    return np.asarray(small, dtype=np.float64)


class _Match(NamedTuple):
    """A block of one picture against each place of another's: sums over rows, so that those of two bands add up."""

    pixels: int
    energy: float
    products: Floats
    """`[places]`, those up to `REACH_PX` to either side within the picture."""
    energies: Floats
    """`[places]`."""

    def joined(self, other: "_Match") -> "_Match":
        """The match of both bands."""
        pixels, energy = self.pixels + other.pixels, self.energy + other.energy
        return _Match(pixels, energy, self.products + other.products, self.energies + other.energies)


def _matches(before: Floats, after: Floats) -> list[_Match]:
    """One for each of `_LEFTS`. Rows differ from sky to road, a shift shows in columns only: means of rows are off."""
    views = np.lib.stride_tricks.sliding_window_view(after, BLOCK_PX, axis=1)
    sums = np.zeros((2, len(after), after.shape[1] + 1))
    np.cumsum(np.stack([after, after**2]), axis=2, out=sums[:, :, 1:])
    within, squares = sums[:, :, BLOCK_PX:] - sums[:, :, :-BLOCK_PX]
    energies = np.maximum(0.0, (squares - within**2 / BLOCK_PX).sum(axis=0))
    found = []
    for left in _LEFTS:
        block = before[:, left : left + BLOCK_PX]
        block = block - block.mean(axis=1, keepdims=True)
        places = slice(max(0, left - REACH_PX), left + REACH_PX + 1)
        products = np.einsum("rc,rsc->s", block, views[:, places])
        found.append(_Match(block.size, float((block**2).sum()), products, energies[places]))
    return found


def _block_shift(match: _Match, left: int) -> float | None:
    """Shift of the block whose first column is `left`, by normalised correlation; None if it is not clear."""
    if match.energy < MIN_CONTRAST**2 * match.pixels:
        return None
    likeness = match.products / np.maximum(1e-9, np.sqrt(match.energy * match.energies))
    best = int(np.argmax(likeness))
    if likeness[best] < MIN_LIKENESS or best in (0, len(likeness) - 1):
        return None
    fine = (likeness[best - 1] - likeness[best + 1]) / 2
    fine /= likeness[best - 1] - 2 * likeness[best] + likeness[best + 1] - 1e-12
    return max(0, left - REACH_PX) + best + float(fine) - left


APART_US = 200_000
MIN_TURN_RADPS = 0.06
"""Turn rate below which lane changes and noise move the picture as much as the turn does."""
MIN_TURNED_RAD = 0.01
PAIRS = 96
"""Most pairs of frames to look at, all clips together."""
MOST_A_CLIP, LEAST_A_CLIP = 8, 4
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it lie evenly in 0 to 1, however many there are."""
MIN_MOMENTS = 10
OPPOSITE = 0.8


class Turn(NamedTuple):
    """One moment of turning at which the picture clearly moved sideways."""

    clip_id: str
    agrees: bool
    """Tell whether the picture moved as the change of heading makes it move."""


def turning_pairs(stamps_us: NDArray[np.int64], motion: Motion, *, number: int, clips: int) -> NDArray[np.int64]:
    """`[N, 2]` times of the pairs of frames to look at, evenly spread over the turns; the fewer, the more `clips` there
    are, of which this is the one with that number."""
    turning = motion.times_us[motion.moving & (np.abs(motion.turn_rate_radps) > MIN_TURN_RADPS)]
    turning = turning[(turning - APART_US > stamps_us[0]) & (turning + APART_US < stamps_us[-1])]
    count = min(len(turning), max(1, min(MOST_A_CLIP, PAIRS // clips)))
    if not count:
        return np.zeros((0, 2), dtype=np.int64)
    # Spread like the steps of a ruler that begins elsewhere in each clip: with one pair a clip, all of a film is seen.
    places = np.unique(((np.arange(count) + (number * _GOLDEN) % 1) / count * len(turning)).astype(int))
    around = turning[places, None] + np.array([-APART_US // 2, APART_US // 2])
    pairs: NDArray[np.int64] = stamps_us[np.searchsorted(stamps_us, around)]
    return pairs


def turn_of_pair(clip_id: str, pair_us: NDArray[np.int64], frames: NDArray[np.uint8], motion: Motion) -> list[Turn]:
    """The moment between these two times, if the vehicle turned and `frames` `[2, 3, H, W]` clearly moved."""
    turned = float(np.diff(np.interp(pair_us, motion.times_us, motion.heading_rad))[0])
    return _turn(clip_id, frames[0], frames[1], turned) if abs(turned) >= MIN_TURNED_RAD else []


def turns_of_sample(sample: Sample) -> list[Turn]:
    """The moment before t0, if the vehicle turns in it; for sources that have samples only."""
    if FRONT_CAMERA not in sample.cameras:
        return []
    place = sample.cameras.index(FRONT_CAMERA)
    frames, stamps = sample.frames[place], sample.frame_timestamps_us[place]
    steps = round((stamps[-1] - stamps[0]) / 1e5)
    headings = heading(sample.history_rot)
    turned = float(headings[-1] - headings[max(0, len(headings) - 1 - steps)])
    if abs(turned) < max(MIN_TURNED_RAD, MIN_TURN_RADPS * steps / 10):
        return []
    return _turn(sample.ref.clip_id, frames[0], frames[-1], turned)


def _turn(clip_id: str, earlier: Picture, later: Picture, turned_rad: float) -> list[Turn]:
    """This moment, unless it is not clear whether the picture moved; `turned_rad`: change of heading, left positive."""
    shift_px = sideways_shift_px(earlier, later)
    if shift_px is None or abs(shift_px) < MIN_SHIFT_PX:
        return []
    return [Turn(clip_id, bool((shift_px > 0) == (turned_rad > 0)))]


def alike(turns: Sequence[Turn], *, clips: int) -> list[Turn]:
    """Turns of clips that are compared in full, so few of each that they do not outnumber those of other `clips`."""
    most, kept = max(LEAST_A_CLIP, PAIRS // max(1, clips)), []
    for clip_id in dict.fromkeys(turn.clip_id for turn in turns):
        each = [turn for turn in turns if turn.clip_id == clip_id]
        kept += [each[place] for place in np.linspace(0, len(each) - 1, min(most, len(each))).round().astype(int)]
    return kept


def judge_mirrored(turns: Sequence[Turn]) -> Check:
    """Check that pictures move as the poses turn, over all moments."""
    count, against = len(turns), sum(not turn.agrees for turn in turns)
    if count < MIN_MOMENTS:
        return not_judged("mirrored", f"not enough turns to tell: {count} moments, {MIN_MOMENTS} are needed")
    finding = f"pictures and poses turn the same way at {count - against} of {count} moments"
    if against >= OPPOSITE * count:
        remedy = (
            "Either the pictures are mirrored (signs are unreadable) or the poses are: left turns must have a positive "
            "yaw rate (y left, z up; not y right, z down). The contact sheet tells which."
        )
        return verdict("mirrored", finding, fail=remedy)
    clips = sorted({turn.clip_id for turn in turns if not turn.agrees})
    remedy = f"Look at clips such as {', '.join(clips[:3])}: mirrored, another camera, or clocks that are apart?"
    return verdict("mirrored", finding, warn=remedy if against > (1 - OPPOSITE) * count else "")


def judge_pictures(sizes: Mapping[tuple[int, int], Sequence[str]], blank: Mapping[str, int], seen: int) -> Check:
    """Check that all samples have one size and no picture has one colour; `sizes`: (width, height) -> samples.

    `blank`: clip -> how many of its pictures show one colour only, of `seen` pictures of all clips.
    """
    if not sizes:
        return not_judged("pictures", "no usable sample")
    listed = sorted(sizes, key=lambda size: -len(sizes[size]))
    finding = ", ".join(f"{width} x {height}" for width, height in listed[:4])
    remedy = ""
    count = sum(blank.values())
    if count:
        example = max(blank, key=lambda clip_id: blank[clip_id])
        finding += (
            f"; {count} of {seen} pictures ({100 * count / seen:.0f} %) show one colour only, such as in {example}"
        )
        remedy = "Open such a frame: black or grey frames teach the model that the picture says nothing."
    elif len(listed) > 1:
        remedy = (
            f"Different cameras in one set, such as {sizes[listed[-1]][0]}? "
            "Samples differ in their number of tokens; split the set or leave them out."
        )
    return verdict("pictures", finding, warn=remedy)
