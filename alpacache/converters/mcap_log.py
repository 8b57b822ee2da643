"""MCAP files, one or the parts of one recording, read chunk by chunk.

Files are read from their beginning on, since one that was cut off has neither footer nor index: what its whole chunks
hold is there, and the rest is said to be lost. So is a chunk whose checksum is wrong.
"""

import io
import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alpacache.converters.drive import Dropped
from alpacache.converters.log_files import MOST_CHUNK_BYTES
from alpacache.converters.messages import Message, MessageReading, Position, Topic, type_of
from alpacache.converters.unpacking import DAMAGED, unpacked
from alpacache.errors import SourceError
from alpacache.regular_file import regular_size

MAGIC = b"\x89MCAP0\r\n"


class McapLog:
    """The messages of MCAP files, in this order."""

    def __init__(self, files: Sequence[Path], *, is_packed: bool = False, keeps: object = None) -> None:
        """`is_packed`: each message is zstd; `keeps`: what the files live as long as.

        Raises `SourceError` for files that are none.
        """
        self._files, self._is_packed, self._keeps = list(files), is_packed, keeps
        self._lost: dict[tuple[int, int], Dropped] = {}
        self._channels: dict[int, tuple[dict[int, Any], dict[int, Any]]] = {}
        self._topics: dict[str, Topic] | None = None
        for file in self._files:
            try:
                regular_size(file)
                with file.open("rb") as opened:
                    head = opened.read(len(MAGIC))
            except OSError as error:
                raise SourceError(f"{file} cannot be read: {error}.") from error
            if head != MAGIC:
                raise SourceError(f"{file} is no MCAP file: it begins with {head.hex() or 'nothing'}.")

    @property
    def lost(self) -> Sequence[Dropped]:
        return [self._lost[place] for place in sorted(self._lost)]

    @property
    def topics(self) -> Mapping[str, Topic]:
        if self._topics is None:
            self._topics = {}
            for file in self._files:
                for topic in _summed_up(file) or self._counted(file):
                    known = self._topics.get(topic.name)
                    self._topics[topic.name] = topic if known is None else _together(known, topic)
        return self._topics

    def messages(self, topics: Collection[str] | None, *, start: Position | None = None) -> Iterator[Message]:
        """Messages as `MessageLog` has them; None for all topics."""
        first, offset = (0, 0) if start is None else start[:2]
        for number in range(first, len(self._files)):
            yield from self._of_file(number, topics, offset if number == first else 0)

    def metadata(self, name: str) -> Mapping[str, str]:
        """The first file's metadata record of this name; empty without one."""
        from mcap.records import Metadata

        for _, record in _records(self._files[0]):
            if isinstance(record, Metadata) and record.name == name:
                return dict(record.metadata)
        return {}

    def _counted(self, file: Path) -> Iterator[Topic]:
        """Topics of a file without summary."""
        number = self._files.index(file)
        found: dict[str, list[int]] = {}
        kinds: dict[str, tuple[str, str]] = {}
        for channel, schema, message, _ in self._raw(number, 0):
            seen = found.setdefault(channel.topic, [0, message.log_time, message.log_time])
            seen[0] += 1
            seen[1], seen[2] = min(seen[1], message.log_time), max(seen[2], message.log_time)
            kinds[channel.topic] = (schema.name if schema else "", channel.message_encoding)
        for name, (count, begin, end) in found.items():
            kind, encoding = kinds[name]
            yield Topic(name=name, type=type_of(kind), encoding=encoding, count=count, begin_ns=begin, end_ns=end)

    def _of_file(self, number: int, topics: Collection[str] | None, offset: int) -> Iterator[Message]:
        decoders: dict[int, Callable[[bytes], Any]] = {}
        for channel, schema, message, position in self._raw(number, offset):
            if topics is not None and channel.topic not in topics:
                continue
            if channel.id not in decoders:
                decoder = _decoder(channel, schema)
                decoders[channel.id] = partial(_unpacking, decoder) if self._is_packed else decoder
            yield Message(
                topic=channel.topic,
                log_ns=message.log_time,
                position=position,
                read=MessageReading(
                    decode=decoders[channel.id], data=message.data, where=f"{channel.topic} at {message.log_time} ns"
                ),
            )

    def _raw(self, number: int, offset: int) -> Iterator[tuple[Any, Any, Any, Position]]:
        """Channel, schema, message and position of each message; notes what is lost."""
        from mcap.records import Channel, Chunk, Schema
        from mcap.records import Message as McapMessage
        from mcap.stream_reader import breakup_chunk

        file = self._files[number]
        schemas: dict[int, Any] = {}
        channels: dict[int, Any] = {}
        end = file.stat().st_size

        def lose(place: int, what: str, why: str) -> None:
            self._lost.setdefault((number, place), Dropped(what=what, count=1, reason=f"{file.name}: {why}"))

        if offset:  # channels may have been said before it, outside of chunks too
            schemas, channels = self._known(number)
        try:
            for place, record in _records(file, offset):
                inside = [record]
                if isinstance(record, Chunk):
                    try:
                        inside = breakup_chunk(_whole(record), validate_crc=True)
                    except _DAMAGED as error:
                        lose(place, "chunks", f"the chunk at byte {place:,} is damaged ({error})")
                        continue
                for nth, item in enumerate(inside):
                    if isinstance(item, Schema):
                        schemas[item.id] = item
                    elif isinstance(item, Channel):
                        channels[item.id] = item
                    elif isinstance(item, McapMessage) and item.channel_id in channels:
                        channel = channels[item.channel_id]
                        yield channel, schemas.get(channel.schema_id), item, (number, place, nth)
        except _Ended as cut:
            why = f"it ends at byte {end:,} without a footer; what follows byte {cut.place:,} is lost"
            lose(cut.place, "ends of files", why)
        self._channels[number] = schemas, channels

    def _known(self, number: int) -> tuple[dict[int, Any], dict[int, Any]]:
        """Schemas and channels of a file that was read to its end once."""
        if number not in self._channels:
            for _ in self._raw(number, 0):
                pass
        schemas, channels = self._channels[number]
        return dict(schemas), dict(channels)


class _Ended(Exception):  # noqa: N818
    """A file ends before its footer; `place` is where its last whole record ends."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


_DAMAGED: tuple[type[Exception], ...] = (*DAMAGED, struct.error)
"""Errors that the library and its decompressors raise for bytes that are not theirs."""


def _records(file: Path, offset: int = 0) -> Iterator[tuple[int, Any]]:
    """Offset and record of a file's schemas, channels, messages, metadata and chunks, up to its footer.

    Raises `_Ended` where the file ends before: the library would read the part of a record as if it were whole.
    """
    from mcap.data_stream import ReadDataStream
    from mcap.exceptions import McapError
    from mcap.opcode import Opcode
    from mcap.records import Channel, Chunk, Message, Metadata, Schema

    wanted = {
        Opcode.SCHEMA: lambda stream, _: Schema.read(stream),
        Opcode.CHANNEL: lambda stream, _: Channel.read(stream),
        Opcode.MESSAGE: Message.read,
        Opcode.CHUNK: lambda stream, _: Chunk.read(stream),
        Opcode.METADATA: lambda stream, _: Metadata.read(stream),
    }
    place = offset or len(MAGIC)
    size = file.stat().st_size
    with file.open("rb") as opened:
        while True:
            opened.seek(place)
            head = opened.read(9)
            length = int.from_bytes(head[1:], "little")
            if len(head) < 9 or place + 9 + length > size:
                raise _Ended(place)
            if head[0] == Opcode.FOOTER:
                return
            if (read := wanted.get(head[0])) is not None:
                if length > MOST_CHUNK_BYTES:
                    raise SourceError(f"{file}: a record of {length:,} bytes at byte {place:,}; it may be damaged.")
                try:
                    record = read(ReadDataStream(io.BytesIO(opened.read(length))), length)
                except (McapError, *_DAMAGED) as error:
                    raise _Ended(place) from error
                yield place, record
            place += 9 + length


def _whole(chunk: Any) -> Any:
    """A chunk decompressed, within bounds. Raises one of `_DAMAGED`."""
    return replace(chunk, compression="", data=unpacked(chunk.data, chunk.compression, chunk.uncompressed_size))


def _unpacking(decode: Callable[[bytes], Any], data: bytes) -> Any:
    return decode(unpacked(data, "zstd"))


def _summed_up(file: Path) -> list[Topic]:
    """Topics by the file's own summary; empty if it has none that can be read."""
    from mcap.exceptions import McapError
    from mcap.reader import SeekingReader

    try:
        with file.open("rb") as opened:
            summary = SeekingReader(opened, record_size_limit=MOST_CHUNK_BYTES).get_summary()
    except (McapError, *_DAMAGED):
        return []
    if summary is None or summary.statistics is None:
        return []
    statistics, topics = summary.statistics, []
    for channel in summary.channels.values():
        schema = summary.schemas.get(channel.schema_id)
        topics.append(
            Topic(
                name=channel.topic,
                type=type_of(schema.name if schema else ""),
                encoding=channel.message_encoding,
                count=statistics.channel_message_counts.get(channel.id, 0),
                begin_ns=statistics.message_start_time,
                end_ns=statistics.message_end_time,
            )
        )
    return topics


def _together(one: Topic, other: Topic) -> Topic:
    """A topic of two files, or of two channels of one."""
    begin, end = min(one.begin_ns, other.begin_ns), max(one.end_ns, other.end_ns)
    return replace(one, count=one.count + other.count, begin_ns=begin, end_ns=end)


def _decoder(channel: Any, schema: Any) -> Callable[[bytes], Any]:
    """Decoder of a channel's messages. Raises `SourceError` for an encoding that is not read."""
    encoding, schema_encoding = channel.message_encoding, "" if schema is None else schema.encoding
    if encoding == "json":
        return json.loads
    if encoding == "cdr" and schema_encoding == "ros2msg":
        from mcap_ros2.decoder import DecoderFactory

        return DecoderFactory().decoder_for(encoding, schema) or _unread(channel, schema_encoding)
    if (encoding, schema_encoding) in (("ros1", "ros1msg"), ("cdr", "ros2idl")):
        from alpacache.converters.rosbag_log import decoder_of

        return decoder_of(schema.name, schema.data.decode("utf-8", "replace"), schema_encoding)
    return _unread(channel, schema_encoding)


def _unread(channel: Any, schema_encoding: str) -> Callable[[bytes], Any]:
    raise SourceError(
        f"{channel.topic} is encoded as {channel.message_encoding or 'nothing'} with {schema_encoding or 'no'} "
        "definitions; CDR, ROS 1 and JSON are read."
    )
