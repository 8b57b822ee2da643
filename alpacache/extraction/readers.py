"""How samples are read ahead of the VLM: by processes beside a GPU, by threads elsewhere."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from alpacache.alpamayo.inputs import InputBuilder
from alpacache.driving.sample import SampleRef
from alpacache.extraction.pipeline import read_ahead
from alpacache.extraction.preparation import Preparation, PreparationSettings, Prepared
from alpacache.extraction.reading_process import ReadingProcesses
from alpacache.gpu.device import limit_torch_to_one_thread
from alpacache.sources.registry import is_streamed
from alpacache.sources.source import Source
from alpacache.torchrun import this_process


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Reads and preprocesses samples in threads, each of which may have a process do it."""

    prepare: Callable[[SampleRef], Prepared]
    workers: int
    """Threads that may call `prepare` at a time."""
    begin: Callable[[], None] | None
    """Called once in each of them."""

    def read_ahead(self, refs: Sequence[SampleRef], *, spare: int) -> Iterator[tuple[SampleRef, Future[Prepared]]]:
        """Samples in order; `spare` of them are ready or in hand beside those that the workers are at."""
        return read_ahead(refs, self.prepare, workers=self.workers, ahead=self.workers + spare, begin=self.begin)


@contextmanager
def open_readers(
    settings: PreparationSettings, source: Source, builder: InputBuilder, device: torch.device, *, workers: int
) -> Iterator[Readers]:
    """Readers for a VLM on this device: beside a GPU each has a process.

    Not for what comes through the network: the processes would not know what the others have fetched.
    """
    begin = limit_torch_to_one_thread if device.type == "cuda" else None
    if device.type == "cuda" and not is_streamed(settings.source):
        with ReadingProcesses(settings, workers, pinned_for=device) as processes:
            yield Readers(prepare=processes, workers=workers, begin=begin)
    else:
        yield Readers(prepare=Preparation(settings, source, builder), workers=workers, begin=begin)


def reading_workers(wanted: int | None) -> int:
    """How many samples are read at a time: as many as wanted, else this process's share of the machine's cores."""
    return wanted or default_workers(len(os.sched_getaffinity(0)) // this_process().local_world_size)


def default_workers(cores: int) -> int:
    """Workers for a process that has so many CPU cores: decoding and resizing keep one each."""
    return min(max(cores - 2, 2), 24)
