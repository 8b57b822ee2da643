"""Bags of ROS 1 without their index, as a recording that was cut off leaves them: whole chunks one after the other.

rosbags reads those that are whole. The format (http://wiki.ros.org/Bags/Format/2.0) is a list of records, each a header
of named fields and data; messages and what connects them lie in chunks.
"""

import io
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alpacache.converters.drive import Dropped
from alpacache.converters.log_files import MOST_CHUNK_BYTES
from alpacache.converters.messages import Message, MessageReading, Position, Topic, type_of
from alpacache.converters.rosbag_log import decoder_of
from alpacache.converters.unpacking import DAMAGED, unpacked

MAGIC = b"#ROSBAG V2.0\n"
_MESSAGE, _CHUNK, _CONNECTION = 2, 5, 7
_DAMAGED: tuple[type[Exception], ...] = (*DAMAGED, struct.error, KeyError)


class _Connection(NamedTuple):
    topic: str
    type: str
    definition: str


class CutBagLog:
    """The messages of `.bag` files in the order of the files, as far as their chunks are whole."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._lost: dict[tuple[int, int], Dropped] = {}
        self._topics: dict[str, Topic] | None = None
        self._connections: dict[int, dict[int, _Connection]] = {}

    @property
    def lost(self) -> Sequence[Dropped]:
        return [self._lost[place] for place in sorted(self._lost)]

    @property
    def topics(self) -> Mapping[str, Topic]:
        if self._topics is None:
            found: dict[str, Topic] = {}
            for number in range(len(self._files)):
                for connection, log_ns, _, _ in self._raw(number, 0):
                    seen = found.get(connection.topic)
                    found[connection.topic] = Topic(
                        name=connection.topic,
                        type=type_of(connection.type),
                        encoding="ros1",
                        count=1 if seen is None else seen.count + 1,
                        begin_ns=log_ns if seen is None else min(seen.begin_ns, log_ns),
                        end_ns=log_ns if seen is None else max(seen.end_ns, log_ns),
                    )
            self._topics = found
        return self._topics

    def messages(self, topics: Collection[str], *, start: Position | None = None) -> Iterator[Message]:
        """Messages as `MessageLog` has them. A position is the place of a chunk and a number in it."""
        first, offset = (0, 0) if start is None else start[:2]
        decoders: dict[_Connection, Callable[[bytes], Any]] = {}
        for number in range(first, len(self._files)):
            for connection, log_ns, data, position in self._raw(number, offset if number == first else 0):
                if connection.topic not in topics:
                    continue
                if connection not in decoders:
                    decoders[connection] = decoder_of(connection.type, connection.definition, "ros1msg")
                where = f"{connection.topic} at {log_ns} ns"
                read = MessageReading(decode=decoders[connection], data=data, where=where)
                yield Message(topic=connection.topic, log_ns=log_ns, position=position, read=read)

    def _raw(self, number: int, offset: int) -> Iterator[tuple[_Connection, int, bytes, Position]]:
        """Connection, time of arrival, data and position of each message; notes what is lost."""
        file = self._files[number]
        connections = self._connections.setdefault(number, {})
        size, place = file.stat().st_size, offset or len(MAGIC)
        with file.open("rb") as opened:
            while place < size:
                opened.seek(place)
                record = _read(opened.read, size - place)
                if record is None:
                    why = f"{file.name}: it ends without its index; what follows byte {place:,} of {size:,} is lost"
                    self._lost.setdefault((number, place), Dropped(what="ends of files", count=1, reason=why))
                    return
                fields, data, length = record
                if fields.get("op") == bytes([_CHUNK]):
                    try:
                        inside = _unpacked(fields, data)
                        found = list(_messages(inside, connections))
                    except _DAMAGED as error:
                        why = f"{file.name}: the chunk at byte {place:,} is damaged ({error})"
                        self._lost.setdefault((number, place), Dropped(what="chunks", count=1, reason=why))
                        found = []
                    for nth, (conn, log_ns, content) in enumerate(found):
                        if conn in connections:
                            yield connections[conn], log_ns, content, (number, place, nth)
                place += length


def _read(read: Callable[[int], bytes], left: int) -> tuple[dict[str, bytes], bytes, int] | None:
    """Fields, data and length of the next record; None if it is not whole."""
    head = read(4)
    if len(head) < 4 or (header_length := int.from_bytes(head, "little")) > left - 8:
        return None
    header, size = read(header_length), read(4)
    length = int.from_bytes(size, "little")
    if len(size) < 4 or length > min(left - 8 - header_length, MOST_CHUNK_BYTES):
        return None
    return _fields(header), read(length), 8 + header_length + length


def _fields(header: bytes) -> dict[str, bytes]:
    found, at = {}, 0
    while at + 4 <= len(header):
        length = int.from_bytes(header[at : at + 4], "little")
        name, equals, value = header[at + 4 : at + 4 + length].partition(b"=")
        if not equals:
            break
        found[name.decode("ascii", "replace")] = value
        at += 4 + length
    return found


def _unpacked(fields: Mapping[str, bytes], data: bytes) -> bytes:
    """A chunk's content within bounds. Raises one of `DAMAGED`."""
    compression = fields.get("compression", b"none").decode("ascii", "replace")
    return unpacked(data, compression, int.from_bytes(fields["size"], "little"))


def _messages(chunk: bytes, connections: dict[int, _Connection]) -> Iterator[tuple[int, int, bytes]]:
    """Connection's number, time of arrival (ns) and data of a chunk's messages; adds to `connections`."""
    stream, at = io.BytesIO(chunk), 0
    while at < len(chunk):
        record = _read(stream.read, len(chunk) - at)
        if record is None:
            raise ValueError("a record in it is not whole")
        fields, data, length = record
        conn = int.from_bytes(fields.get("conn", b""), "little")
        if fields.get("op") == bytes([_CONNECTION]):
            said = _fields(data)
            texts = (fields["topic"], said["type"], said["message_definition"])
            connections.setdefault(conn, _Connection(*(text.decode("utf-8", "replace") for text in texts)))
        elif fields.get("op") == bytes([_MESSAGE]):
            seconds, nanoseconds = struct.unpack("<II", fields["time"])
            yield conn, seconds * 1_000_000_000 + nanoseconds, data
        at += length
