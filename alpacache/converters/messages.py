"""Messages of robots' logs, whichever library reads them: topics, positions to go back to, fields by name.

A message's value is what its decoder made of it, an object with attributes or, of JSON, a dictionary.
"""

import base64
import binascii
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from alpacache.converters.drive import Dropped
from alpacache.errors import BadClipError

Position = tuple[int, int, int]
"""Number of the file, a place in it, a number there: increasing in the order of the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A topic of a log."""

    name: str
    type: str
    """`package/Name`, without `msg`."""
    encoding: str
    count: int
    begin_ns: int
    end_ns: int
    """First and last time of arrival of its messages, or of all messages where the log's own summary knows no more."""

    @property
    def seconds(self) -> float:
        return max(0.0, (self.end_ns - self.begin_ns) / 1e9)


class Message(NamedTuple):
    """A message that is decoded when its value is asked for."""

    topic: str
    log_ns: int
    """Time at which it was written to the log."""
    position: Position
    read: Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReading:
    """Decodes a message when it is called."""

    decode: Callable[[bytes], Any]
    data: bytes
    where: str

    def __call__(self) -> Any:
        try:
            return self.decode(self.data)
        except BadClipError:
            raise
        except Exception as error:  # decoders made of a log's own definitions raise anything
            raise BadClipError("undecodable_video", f"{self.where} cannot be decoded ({error}).") from error


class MessageLog(Protocol):
    """A log of messages, in one or several files."""

    @property
    def topics(self) -> Mapping[str, Topic]: ...

    @property
    def lost(self) -> Sequence[Dropped]:
        """Messages that could not be read, known once all were gone through."""

    def messages(self, topics: Collection[str], *, start: Position | None = None) -> Iterator[Message]:
        """Messages of these topics in the order of the log, from a position on."""


def type_of(text: str) -> str:
    """`sensor_msgs/msg/Image` and `foxglove.CompressedImage` as `sensor_msgs/Image`, `foxglove/CompressedImage`."""
    return text.replace("/msg/", "/").replace("foxglove_msgs/", "foxglove/").replace(".", "/")


def part(value: Any, *names: str) -> Any:
    """A field within fields; None where one is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if value is None:
            return None
    return value


def numbers(value: Any, *names: str) -> list[float]:
    """Fields as floats; one that is not there, or no number, is NaN."""
    found = [part(value, name) for name in names]
    return [float(item) if isinstance(item, (int, float)) else float("nan") for item in found]


def stamp_ns(value: Any) -> int | None:
    """The time that a message itself says, in its header or beside it; None without one. 0 is one that was not set."""
    stamp = part(value, "header", "stamp") or part(value, "timestamp")
    return time_ns(stamp)


def time_ns(stamp: Any) -> int | None:
    """Nanoseconds of a time in seconds and nanoseconds, whatever the latter are called; None for anything else."""
    seconds = part(stamp, "sec") if part(stamp, "sec") is not None else part(stamp, "secs")
    rest = next((found for name in ("nanosec", "nsec", "nsecs") if (found := part(stamp, name)) is not None), None)
    if not isinstance(seconds, int) or not isinstance(rest, int):
        return None
    found = seconds * 1_000_000_000 + rest
    return found if -(2**63) <= found < 2**63 else None


def content_of(value: Any, *, where: str) -> bytes:
    """The field `data` as bytes: JSON has it in base64. Raises `BadClipError`."""
    data = part(value, "data")
    if isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadClipError("undecodable_video", f"{where}: data is no base64 ({error}).") from error
    if data is None:
        raise BadClipError("undecodable_video", f"{where}: a message without data.")
    try:
        if isinstance(data, (int, float)):  # of a number Python makes so many zeros
            raise ValueError("it is a number")
        return bytes(data)
    except (TypeError, ValueError) as error:
        raise BadClipError("undecodable_video", f"{where}: data are no bytes ({error}).") from error


def fetched(log: MessageLog, topic: str, positions: Sequence[Position]) -> Iterator[Any]:
    """Values of the messages at these positions, in the order of the list; one that comes too early waits in memory."""
    if not positions:
        return
    wanted = {position: place for place, position in enumerate(positions)}
    waiting: dict[int, Any] = {}
    due = 0
    for message in log.messages([topic], start=min(positions)):
        place = wanted.get(message.position)
        if place is None:
            continue
        waiting[place] = message.read()
        while due in waiting:
            yield waiting.pop(due)
            due += 1
        if due == len(positions):
            return
