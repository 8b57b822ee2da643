"""The targets of a batch's new samples, solved while their prefixes are still being read.

A solve is a hundred small operations, each of which lets go of the interpreter lock and then, beside a dozen reading
threads, waits to get it back. So it is done for a whole batch at once and, on a GPU, by the thread that has read the
last of its paths: the training loop, which the GPU waits for, finds it done.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.strata import Turn, turns_ahead
from alpacache.errors import DataError
from alpacache.gpu.device import limit_torch_to_one_thread, restored_torch_threads

PoseArrays: TypeAlias = Sequence[NDArray[Any]]
"""One array for each of `features.POSE_FIELDS`, of one sample or of several stacked."""
Solve: TypeAlias = Callable[[Sequence[int], PoseArrays], tuple[Tensor, list[Turn]]]
"""From the indices of n samples and their poses to actions `[n, 64, 2]` and turns."""


class BatchTargets:
    """Collects the paths of a batch's new samples, and solves them together once all are there."""

    def __init__(self, count: int, solve: Solve, *, ahead: bool) -> None:
        """`ahead`: whoever adds the last path solves; otherwise whoever asks for the result."""
        self._count, self._solve, self._ahead = count, solve, ahead
        self._lock, self._solved = threading.Lock(), Future[tuple[Tensor, list[Turn]]]()
        self._added: dict[int, tuple[int, PoseArrays]] = {}

    def add(self, place: int, index: int, poses: PoseArrays) -> None:
        """Note the path of the sample with that index; may be called in any thread."""
        with self._lock:
            self._added[place] = index, poses
            complete = len(self._added) == self._count
        if complete and self._ahead:
            limit_torch_to_one_thread()
            self._run()

    def result(self) -> tuple[Tensor, list[Turn]]:
        """Actions `[n, 64, 2]` and turns in the order of places, once all are added. Raises what solving has raised."""
        if not self._ahead:
            with restored_torch_threads():
                limit_torch_to_one_thread()  # a team of helpers would crowd out the reading threads
                self._run()
        return self._solved.result()

    def _run(self) -> None:
        try:
            indices, poses = zip(*(self._added[place] for place in sorted(self._added)), strict=True)
            self._solved.set_result(self._solve(indices, [np.stack(arrays) for arrays in zip(*poses, strict=True)]))
        except Exception as error:
            self._solved.set_exception(error)


def solver(dataset: CachedDataset, space: UnicycleActionSpace) -> Solve:
    """A function that solves targets; it raises `DataError` with the first sample whose path has no action."""

    def actions(indices: Sequence[int], poses: PoseArrays) -> Tensor:
        try:
            return space.to_action(*map(torch.from_numpy, poses))
        except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            if len(indices) == 1:
                sample_id = dataset.sample_id(indices[0])
                raise DataError(f"sample {sample_id!r}: its path cannot be turned into actions; {error}") from error
            return torch.cat([actions([index], [a[i : i + 1] for a in poses]) for i, index in enumerate(indices)])

    return lambda indices, poses: (actions(indices, poses), turns_ahead(*poses[1:]))
