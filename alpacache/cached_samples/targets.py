"""The targets of a batch's new samples, solved while their prefixes are still being read.

A solve is a hundred small operations, each of which lets go of the interpreter lock, and beside a dozen reading threads
each has to wait until it comes back. So it is done for a whole batch at once and, on a GPU, by the thread that has read
the last of its paths: the loop, which the GPU waits for, finds it done.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.strata import Turn, turns_ahead
from alpacache.errors import DataError
from alpacache.gpu.device import keeping_threads, one_thread_each

Poses: TypeAlias = Sequence[NDArray[Any]]
"""Of a sample, or of several stacked, as `features.POSE_FIELDS` names them."""
Solve: TypeAlias = Callable[[Sequence[int], Poses], tuple[Tensor, list[Turn]]]
"""From the indices of n samples and their poses: actions `[n, 64, 2]` and turn strata."""


class BatchTargets:
    """Of the new samples of one batch, by their places in it."""

    def __init__(self, count: int, solve: Solve, *, ahead: bool) -> None:
        """`ahead`: whoever adds the last path solves, else whoever asks for the result."""
        self._count, self._solve, self._ahead = count, solve, ahead
        self._lock, self._solved = threading.Lock(), threading.Event()
        self._added: dict[int, tuple[int, Poses]] = {}
        self._found: tuple[list[int], Tensor, list[Turn]] | None = None
        self._error: Exception | None = None

    def add(self, place: int, index: int, poses: Poses) -> None:
        """The sample of that index has been read; may be called in any thread."""
        with self._lock:
            self._added[place] = index, poses
            complete = len(self._added) == self._count
        if complete and self._ahead:
            one_thread_each()
            self._run()

    def result(self) -> tuple[list[int], Tensor, list[Turn]]:
        """Places, actions `[n, 64, 2]` and turn strata; all must have been added. Raises what solving has raised."""
        if self._ahead:
            self._solved.wait()
        else:
            with keeping_threads():
                torch.set_num_threads(1)  # a team of helpers would crowd out the reading threads
                self._run()
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found

    def _run(self) -> None:
        try:
            places = sorted(self._added)
            indices, poses = zip(*(self._added[place] for place in places), strict=True)
            together = [np.stack(arrays) for arrays in zip(*poses, strict=True)]
            self._found = places, *self._solve(indices, together)
        except Exception as error:
            self._error = error
        finally:
            self._solved.set()


def solver(dataset: CachedDataset, space: UnicycleActionSpace) -> Solve:
    """What raises `DataError` that names the first sample whose path has no action."""

    def actions(indices: Sequence[int], poses: Poses) -> Tensor:
        try:
            return space.to_action(*map(torch.from_numpy, poses))
        except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            if len(indices) == 1:
                sample_id = dataset.sample_id(indices[0])
                raise DataError(f"sample {sample_id!r}: its path cannot be turned into actions; {error}") from error
            return torch.cat([actions([index], [a[i : i + 1] for a in poses]) for i, index in enumerate(indices)])

    return lambda indices, poses: (actions(indices, poses), turns_ahead(*poses[1:]))
