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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache import errors
from alpacache.alpamayo.inputs import VLMInputs
from alpacache.driving.sample import SampleRef
from alpacache.extraction.preparation import VLM_DTYPE, Preparation, PreparationSettings, Prepared
from alpacache.gpu.device import keep_freed_memory

_LENGTH = struct.Struct("<Q")
_NICENESS = 10
"""Niceness of the processes: the threads around the VLM come first, one of which may hold the interpreter lock."""
_END_S = 10.0
"""Time that a process is given to end on its own."""


class ReadingProcesses:
    """`Preparation` in `count` processes, called by as many threads. They start when this is entered."""

    def __init__(self, settings: PreparationSettings, count: int, *, pinned_for: torch.device | None) -> None:
        """`pinned_for`: the GPU for which pixels are page-locked."""
        self._settings, self._count, self._pinned_for = settings, count, pinned_for
        self._processes: list[_Process] = []
        self._free: SimpleQueue[_Process] = SimpleQueue()

    def __call__(self, ref: SampleRef) -> Prepared:
        """Raises what `Preparation` does, `DataError` where the process itself has ended."""
        process = self._free.get()
        try:
            return process.prepare(ref, self._pinned_for)
        finally:
            self._free.put(process)

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._processes.append(_Process(self._settings))
            self._free.put(self._processes[-1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.ask_to_end()
        for process in self._processes:
            process.end()


class _Process:
    """A reading process as its parent sees it."""

    def __init__(self, settings: PreparationSettings) -> None:
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
        self._requests = self._popen.stdin
        self._requests.write(_line(dataclasses.asdict(settings)))

    def prepare(self, ref: SampleRef, pinned_for: torch.device | None) -> Prepared:
        try:
            self._requests.write(_line(dataclasses.asdict(ref)))
            head, arrays, pixels = _receive(self._answers, pinned_for)
        except (ConnectionError, EOFError):
            code = self._popen.wait(_END_S)
            raise errors.DataError(
                f"the process that read sample {ref.sample_id} has ended with exit code {code}. If -9, the system ran "
                "out of memory: take fewer --workers. Run the same command again to go on."
            ) from None
        if "error" in head:
            raise _as_error(head)
        return _unpacked(head, arrays, pixels)

    def ask_to_end(self) -> None:
        self._requests.close()

    def end(self) -> None:
        try:
            self._popen.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._answers.close()


def main() -> None:
    """Entry point of the process: its input's first line are the settings, each further line is a sample."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: who started this one decides
    os.nice(_NICENESS)
    keep_freed_memory()
    torch.set_num_threads(1)
    answers = os.fdopen(int(sys.argv[1]), "wb")
    requests = iter(sys.stdin.buffer)
    setup: dict[str, Any] = json.loads(next(requests))
    setup |= {name: tuple(value) for name, value in setup.items() if isinstance(value, list)}
    settings = PreparationSettings(**setup)
    prepare: Callable[[SampleRef], Prepared]
    try:
        prepare = Preparation.open(settings)
    except Exception as error:
        prepare = _refusing(error)
    for request in requests:
        try:
            head, arrays = _packed(prepare(SampleRef(**json.loads(request))))
        except Exception as error:
            head, arrays = _described(error), []
        try:
            _send(answers, head, arrays)
        except BrokenPipeError:
            os._exit(1)  # nobody is there any more


def _refusing(error: Exception) -> Callable[[SampleRef], Prepared]:
    def refuse(ref: SampleRef) -> Prepared:
        raise error

    return refuse


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _send(answers: BinaryIO, head: dict[str, Any], arrays: Sequence[NDArray[Any]]) -> None:
    """Write the length of the header, the header, the arrays."""
    described = {**head, "arrays": [[array.dtype.str, array.shape] for array in arrays]}
    text = json.dumps(described).encode()
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
        array = np.frombuffer(rest, dtype, math.prod(shape), end).reshape(shape).copy()
        arrays.append(array)
        end += array.nbytes
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
        "names": names,
        "values": {name: value for name, value in stored.items() if name not in names},
    }
    pixels = inputs.pixel_values.view(torch.int16).numpy()  # numpy has no bfloat16
    first = [pixels, inputs.image_grid_thw.numpy(), inputs.input_ids, inputs.image_spans]
    return head, [*first, *(stored[name] for name in names)]


def _unpacked(head: dict[str, Any], arrays: Sequence[NDArray[Any]], pixels: Tensor) -> Prepared:
    grid, input_ids, image_spans, *stored = arrays
    inputs = VLMInputs(
        text=head["text"],
        input_ids=input_ids,
        pixel_values=pixels.view(VLM_DTYPE),
        image_grid_thw=torch.from_numpy(grid),
        image_spans=image_spans,
        stem_len=head["stem_len"],
    )
    values = {**dict(zip(head["names"], stored, strict=True)), **head["values"]}
    return Prepared(sample_id=head["sample_id"], inputs=inputs, arrays=values)


def _described(error: Exception) -> dict[str, Any]:
    foreign = isinstance(error, OSError) and not isinstance(error, errors.AlpacacheError)
    return {
        "error": OSError.__name__ if foreign else type(error).__name__,
        "kind": getattr(error, "kind", None),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _as_error(head: dict[str, Any]) -> Exception:
    """The error that the process met, with its traceback as a note."""
    error: Exception
    if head["error"] == errors.BadClipError.__name__:
        error = errors.BadClipError(head["kind"], head["message"])
    elif head["error"] == OSError.__name__:
        error = OSError(head["message"])
    elif issubclass(known := getattr(errors, head["error"], RuntimeError), errors.AlpacacheError):
        error = known(head["message"])
    else:
        error = RuntimeError(f"{head['error']}: {head['message']}")
    error.add_note(head["traceback"])
    return error


if __name__ == "__main__":
    main()
