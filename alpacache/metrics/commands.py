"""Measures whether paths do what their routes command, and whether they change sides when the command does.

A path obeys `left` if it ends to the left of the straight corridor at 6.4 s, `right` likewise, `straight` if inside. A
command may be for later than that ("turn left in 300 m"), so recall is over samples whose driven path obeys it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.route import Command
from alpacache.driving.sample import Floats
from alpacache.driving.strata import side_of
from alpacache.metrics.bootstrap import Interval, mean_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Obedience:
    """One model's paths under one command; all are mean shares of a sample's K paths."""

    obeyed: float
    """Over all samples of the command."""
    recall: float | None
    """Over the samples whose driven path obeys, None without any: 1 is right, 0 never obeys."""
    recall_interval: Interval | None
    """None without such samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSummary:
    """All samples of one command."""

    samples: int
    driven: int
    """Number of those whose driven path obeys."""
    models: dict[str, Obedience]
    """Measures by the model's label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSummary:
    """One model on samples that command left or right, given as they are and with left for right; means of samples."""

    samples: int
    given: float
    """Share of the paths that obey the command as it was given."""
    swapped: float
    """Share of the paths that obey the opposite one when that is given."""
    follows: float
    """Share of samples of which most paths obey, with either command."""
    follows_interval: Interval | None
    shift_m: float
    """Move of the mean path's end towards the commanded side, from the opposite command to the given one."""


def share_obeying(pred_xyz: ArrayLike, command: Command) -> float:
    """Share of K paths `[K, 64, 3]` (m, ego frame at t0, y left) that obey a command; 0 for `none`."""
    return float(np.mean([side_of(end) == command for end in _ends(pred_xyz)]))


def summarise_command(
    command: Command,
    truth_xyz: Sequence[ArrayLike],
    pred_xyz: Mapping[str, Sequence[ArrayLike]],
    clips: Sequence[str],
    *,
    weights: Floats | None = None,
    seed: int = 0,
) -> CommandSummary:
    """Aggregate the samples of one command, at least one: driven paths `[64, 3]`, and by model the K predicted ones.

    Samples count by `weights` `[N]`, alike without.
    """
    by = np.ones(len(truth_xyz)) if weights is None else weights
    driven = [share_obeying(np.asarray(xyz)[None], command) == 1.0 for xyz in truth_xyz]
    models = {}
    for label, paths in pred_xyz.items():
        shares = [share_obeying(each, command) for each in paths]
        kept = [share for share, obeys in zip(shares, driven, strict=True) if obeys]
        kept_by = by[np.array(driven)]
        kept_clips = [clip for clip, obeys in zip(clips, driven, strict=True) if obeys]
        models[label] = Obedience(
            obeyed=float(np.average(shares, weights=by)),
            recall=float(np.average(kept, weights=kept_by)) if kept else None,
            recall_interval=mean_share(kept, kept_clips, weights=kept_by, seed=seed) if kept else None,
        )
    return CommandSummary(samples=len(driven), driven=sum(driven), models=models)


def summarise_swap(
    commands: Sequence[Command],
    given_xyz: Sequence[ArrayLike],
    swapped_xyz: Sequence[ArrayLike],
    clips: Sequence[str],
    *,
    weights: Floats | None = None,
    seed: int = 0,
) -> SwapSummary:
    """Compare one model's paths `[K, 64, 3]` of samples that command left or right with those for the opposite.

    Samples count by `weights` `[N]`, alike without.
    """
    opposite: dict[Command, Command] = {"left": "right", "right": "left"}
    given = [share_obeying(xyz, command) for xyz, command in zip(given_xyz, commands, strict=True)]
    other = [share_obeying(xyz, opposite[command]) for xyz, command in zip(swapped_xyz, commands, strict=True)]
    follows = [float(one > 0.5 and two > 0.5) for one, two in zip(given, other, strict=True)]
    moved = [_ends(one).mean() - _ends(two).mean() for one, two in zip(given_xyz, swapped_xyz, strict=True)]
    signs = [1.0 if command == "left" else -1.0 for command in commands]
    return SwapSummary(
        samples=len(given),
        given=float(np.average(given, weights=weights)),
        swapped=float(np.average(other, weights=weights)),
        follows=float(np.average(follows, weights=weights)),
        follows_interval=mean_share(follows, clips, weights=weights, seed=seed),
        shift_m=float(np.average(np.multiply(signs, moved), weights=weights)),
    )


def _ends(pred_xyz: ArrayLike) -> Floats:
    ends: Floats = np.asarray(pred_xyz, dtype=np.float64)[:, -1, 1]
    return ends
