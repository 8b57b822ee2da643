"""Reading in processes of their own: beside a GPU, a dozen threads would be in the way of the one that feeds it.

Decoding and resizing take a core each. As threads of one process they would also take its interpreter lock, its
allocator and its page tables, all of which the thread that launches the VLM's kernels needs. So reading threads only
move the results of processes. They come through a socket as a JSON header and plain bytes; nothing is unpickled. A
process ends when its input does, so none is left behind whatever ends the run.
"""

import dataclasses
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache import errors
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.driving.sample import SampleRef
from alpacache.extraction.preparation import Preparation, PreparationSettings, Prepared
from alpacache.gpu.device import keep_freed_memory, limit_torch_to_one_thread
from alpacache.interrupt import REQUESTS
from alpacache.sources.registry import is_streamed
from alpacache.sources.source import Source
from alpacache.torchrun import this_process

_LENGTH = struct.Struct("<Q")
_NICENESS = 10
"""Niceness of the processes: the threads around the VLM come first, one of which may hold the interpreter lock."""
_END_S = 10.0
"""Time that a process is given to end on its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Reads and preprocesses samples ahead of the VLM, in threads that may have processes do it."""

    one_pass: Callable[[Sequence[SampleRef]], AbstractContextManager[Callable[[SampleRef], Prepared]]]
    """Opens samples that are read in one pass, as `Preparation.one_pass` does."""
    workers: int
    """Threads that may be in a pass at a time."""
    begin: Callable[[], None] | None
    """Called once in each of them."""


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
            yield Readers(one_pass=processes.one_pass, workers=workers, begin=begin)
    else:
        yield Readers(one_pass=Preparation(settings, source, builder).one_pass, workers=workers, begin=begin)


def reading_workers(wanted: int | None) -> int:
    """Number of samples read at a time: as many as wanted, else this process's share of the machine's cores."""
    return wanted or default_workers(len(os.sched_getaffinity(0)) // this_process().local_world_size)


def default_workers(cores: int) -> int:
    """Workers for a process that has so many CPU cores: decoding and resizing keep one each."""
    return min(max(cores - 2, 2), 24)


class ReadingProcesses:
    """`Preparation` in `count` processes, called by as many threads. They start when this is entered."""

    def __init__(self, settings: PreparationSettings, count: int, *, pinned_for: torch.device | None) -> None:
        """`pinned_for`: the GPU for which pixels are page-locked."""
        self._settings, self._count, self._pinned_for = settings, count, pinned_for
        self._processes: list[_Process] = []
        self._free: SimpleQueue[_Process] = SimpleQueue()

    def __call__(self, ref: SampleRef) -> Prepared:
        """Raises what `Preparation` does, `DataError` where the process itself has ended."""
        with self.one_pass([ref]) as prepare:
            return prepare(ref)

    @contextmanager
    def one_pass(self, refs: Sequence[SampleRef]) -> Iterator[Callable[[SampleRef], Prepared]]:
        """`Preparation.one_pass` in one of the processes, which is a sample ahead of the calls."""
        process = self._free.get()
        process.ask(refs)
        try:
            yield lambda ref: process.answer(ref, self._pinned_for)
        finally:
            if process.owes:  # a pass that was given up; what is left of it must not answer another
                process.end()
            else:
                self._free.put(process)

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._processes.append(_Process(self._settings))
            self._free.put(self._processes[-1])
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.requests.close()
        for process in self._processes:
            process.end()


class _Process:
    """A reading process as its parent sees it."""

    def __init__(self, settings: PreparationSettings) -> None:
        self._dtype = settings.dtype
        home = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        # Without a GPU: a context of CUDA on it would take half a gigabyte.
        environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._answers, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "alpacache.extraction.reading_process", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=2,  # what libraries print must not get among the answers
                pass_fds=[theirs.fileno()],
                bufsize=0,
                env=environment,
                process_group=0,  # a terminal's Ctrl-C is for the process that decides
            )
        self.pid = self._popen.pid
        assert self._popen.stdin is not None
        self.requests = self._popen.stdin
        """Closed, it asks the process to end."""
        self.requests.write(_line(dataclasses.asdict(settings)))
        self.owes = 0
        """Answers that are still to come."""

    def ask(self, refs: Sequence[SampleRef]) -> None:
        """Have the process prepare these samples; if it has ended, `answer` says so."""
        with suppress(ConnectionError):
            self.requests.write(_line([dataclasses.asdict(ref) for ref in refs]))
        self.owes = len(refs)

    def answer(self, ref: SampleRef, pinned_for: torch.device | None) -> Prepared:
        """The next sample, which is this one. Raises what the process met."""
        self.owes -= 1
        try:
            head, arrays, pixels = _receive(self._answers, pinned_for)
        except (ConnectionError, EOFError):
            code = self._popen.wait(_END_S)
            raise errors.DataError(
                f"the process that read sample {ref.sample_id} has ended with exit code {code}. If -9, the system ran "
                "out of memory: take fewer --workers. Run the same command again to go on."
            ) from None
        if "error" in head:
            raise _as_error(head)
        return _unpacked(head, arrays, pixels, self._dtype)

    def end(self) -> None:
        """Wait until the process has ended. One that still answers finds nobody there."""
        self.requests.close()
        self._answers.close()
        try:
            self._popen.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def main() -> None:
    """Entry point of the process: its input's first line are the settings, each further line are samples of one clip.

    Samples are answered one by one. The next is made while the last one is taken, or waits to be.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: who started this one decides
    os.nice(_NICENESS)
    keep_freed_memory()
    torch.set_num_threads(1)
    answers = os.fdopen(int(sys.argv[1]), "wb")
    requests = iter(sys.stdin.buffer)
    setup: dict[str, Any] = json.loads(next(requests))
    setup |= {name: tuple(value) for name, value in setup.items() if isinstance(value, list)}
    settings = PreparationSettings(**setup)
    prepare: Preparation | Exception
    try:
        prepare = Preparation.open(settings)
    except Exception as error:
        prepare = error
    for request in requests:
        for head, arrays in _answers(prepare, [SampleRef(**ref) for ref in json.loads(request)]):
            try:
                _send(answers, head, arrays)
            except BrokenPipeError:
                os._exit(1)  # nobody is there any more


def _answers(
    prepare: Preparation | Exception, refs: Sequence[SampleRef]
) -> Iterator[tuple[dict[str, Any], list[NDArray[Any]]]]:
    """Header and arrays of each sample, or the header of what was wrong with it."""
    if isinstance(prepare, Exception):
        yield from ((_described(prepare), []) for _ in refs)
        return
    with prepare.one_pass(refs) as one:
        for ref in refs:
            try:
                packed = _packed(one(ref))
            except Exception as error:
                packed = _described(error), []
            yield packed


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _send(answers: BinaryIO, head: dict[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
    """Write the length of the header, the header, the arrays."""
    text = json.dumps({**head, "arrays": [[array.dtype.str, array.shape] for array in arrays]}).encode()
    answers.write(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        answers.write(_bytes(np.ascontiguousarray(array)))
    answers.flush()


def _receive(
    answers: socket.socket, pinned_for: torch.device | None
) -> tuple[dict[str, Any], list[NDArray[Any]], Tensor]:
    """Read header and arrays; the first array as a page-locked int16 tensor. Raises `EOFError`."""
    size = bytearray(_LENGTH.size)
    _fill(answers, size)
    text = bytearray(*_LENGTH.unpack(size))
    _fill(answers, text)
    head: dict[str, Any] = json.loads(text)
    (_, shape), *others = head["arrays"] or [(None, (0,))]
    with nullcontext() if pinned_for is None else torch.cuda.device(pinned_for):  # a thread begins on the first GPU
        pixels = torch.empty(shape, dtype=torch.int16, pin_memory=pinned_for is not None)
    _fill(answers, _bytes(pixels.numpy()))
    rest = bytearray(sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in others))
    _fill(answers, rest)
    arrays, end = [], 0
    for dtype, shape in others:
        arrays.append(np.frombuffer(rest, dtype, math.prod(shape), end).reshape(shape).copy())
        end += arrays[-1].nbytes
    return head, arrays, pixels


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fill(answers: socket.socket, place: bytearray | memoryview) -> None:
    """Receive in one system call: after each of several the thread would have to wait for the interpreter lock."""
    rest = memoryview(place)
    while len(rest):
        received = answers.recv_into(rest, 0, socket.MSG_WAITALL)
        if not received:
            raise EOFError
        rest = rest[received:]


def _packed(prepared: Prepared) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Header and arrays of a sample, the pixels first."""
    inputs, stored = prepared.inputs, prepared.arrays
    names = [name for name, value in stored.items() if isinstance(value, np.ndarray)]
    head = {
        "sample_id": prepared.sample_id,
        "text": inputs.text,
        "stem_len": inputs.stem_len,
        "route": inputs.route,
        "names": names,
        "values": {name: value for name, value in stored.items() if name not in names},
    }
    pixels = inputs.pixel_values.view(torch.int16).numpy()  # bits of either type; numpy has no bfloat16
    first = [pixels, inputs.image_grid_thw.numpy(), inputs.input_ids, inputs.image_spans]
    return head, [*first, *(stored[name] for name in names)]


def _unpacked(head: dict[str, Any], arrays: Sequence[NDArray[Any]], pixels: Tensor, dtype: torch.dtype) -> Prepared:
    grid, input_ids, image_spans, *stored = arrays
    inputs = VLMInputs(
        text=head["text"],
        input_ids=input_ids,
        pixel_values=pixels.view(dtype),
        image_grid_thw=torch.from_numpy(grid),
        image_spans=image_spans,
        stem_len=head["stem_len"],
        route=head["route"],
    )
    values = {**dict(zip(head["names"], stored, strict=True)), **head["values"]}
    return Prepared(sample_id=head["sample_id"], inputs=inputs, arrays=values)


def _described(error: Exception) -> dict[str, Any]:
    known = isinstance(error, errors.AlpacacheError)
    return {
        "error": "OSError" if isinstance(error, OSError) and not known else type(error).__name__,
        "kind": getattr(error, "kind", None),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _as_error(head: dict[str, Any]) -> Exception:
    """The error that the process met, with its traceback as a note."""
    name, message = head["error"], head["message"]
    error: Exception
    if name == "BadClipError":
        error = errors.BadClipError(head["kind"], message)
    elif name == "OSError":
        error = OSError(message)
    elif issubclass(known := getattr(errors, name, RuntimeError), errors.AlpacacheError):
        error = known(message)
    else:
        error = RuntimeError(f"{name}: {message}")
    error.add_note(head["traceback"])
    return error


if __name__ == "__main__":
    main()
