"""Bags of ROS 1 (`.bag`) and of ROS 2 in SQLite (`.db3`), read by rosbags."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from alpacache.converters.drive import Dropped
from alpacache.converters.message_types import full_name, message_types
from alpacache.converters.messages import Message, MessageReading, Position, Topic, type_of
from alpacache.converters.unpacking import unpacked
from alpacache.errors import SourceError


class RosbagLog:
    """The messages of one or several files of a recording, by their time of arrival."""

    def __init__(self, files: Sequence[Path], *, keeps: object = None) -> None:
        """`files`: `.bag` files, `.db3` files, or a folder with `metadata.yaml`; `keeps`: what they live as long as.

        Raises `SourceError`.
        """
        self._files, self._keeps = list(files), keeps
        self.lost: Sequence[Dropped] = []
        with self._opened(is_new=True) as reader:
            self.topics: Mapping[str, Topic] = {
                name: Topic(
                    name=name,
                    type=type_of(info.msgtype or "several types"),
                    encoding="cdr" if reader.is2 else "ros1",
                    count=info.msgcount,
                    begin_ns=reader.start_time,
                    end_ns=reader.end_time,
                )
                for name, info in reader.topics.items()
            }

    def messages(self, topics: Collection[str], *, start: Position | None = None) -> Iterator[Message]:
        """Messages as `MessageLog` has them. A position is a time of arrival and a number among the topic's at it."""
        with self._opened() as reader:
            connections = [connection for connection in reader.connections if connection.topic in topics]
            if not connections:
                return
            seen: dict[str, Position] = {}
            packed = _keep_packed(reader)
            first = None if start is None else start[1]
            for connection, log_ns, data in self._checked(reader.messages(connections, start=first)):
                last = seen.get(connection.topic)
                nth = last[2] + 1 if last is not None and last[1] == log_ns else 0
                seen[connection.topic] = position = (0, log_ns, nth)

                read = MessageReading(
                    decode=partial(_decoded, reader, connection.msgtype, is_packed=packed),
                    data=data,
                    where=f"{connection.topic} at {log_ns} ns",
                )
                yield Message(topic=connection.topic, log_ns=log_ns, position=position, read=read)

    @contextmanager
    def _opened(self, *, is_new: bool = False) -> Iterator[Any]:
        """The library's reader; what it raises of a file is a `SourceError`."""
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore

        try:
            # Bags before ROS 2 Iron hold no definitions.
            reader = AnyReader(self._files, default_typestore=get_typestore(Stores.ROS2_HUMBLE))
            if is_new:
                _check_definitions(reader)
            reader.open()
        except SourceError:
            raise
        except Exception as error:  # of damaged files, SQLite and the library's parsers raise anything
            raise self._unreadable(error) from error
        try:
            yield reader
        finally:
            reader.close()

    def _checked(self, messages: Iterator[Any]) -> Iterator[Any]:
        """What the library's reader gives; what it raises of a damaged file is a `SourceError`."""
        try:
            yield from messages
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> SourceError:
        names = ", ".join(file.name for file in self._files[:3])
        remedy = "Copy it again, or mend it with `ros2 bag reindex`"
        return SourceError(f"{names} cannot be read as a bag ({error}). {remedy}.")


def _decoded(reader: Any, kind: str, data: bytes, *, is_packed: bool) -> Any:
    return reader.deserialize(unpacked(data, "zstd") if is_packed else data, kind)


def _keep_packed(reader: Any) -> bool:
    """Keep the library from unpacking chunks and messages, which it does without a bound.

    Chunks of ROS 1 are unpacked here instead; tells whether messages of ROS 2 are left as they lie in the file.
    """
    if reader.is2:
        (storage, *_) = [one.storage for one in reader.readers]
        is_packed: bool = storage.metadata.compression_mode == "message"
        if is_packed:
            storage.metadata = storage.metadata._replace(compression_mode=None)
        return is_packed
    from rosbags.rosbag1.reader import decompressors

    names = {unpack: name for name, unpack in decompressors.items()}
    for one in reader.readers:
        for place, chunk in one.chunks.items():
            one.chunks[place] = chunk._replace(decompressor=partial(unpacked, compression=names[chunk.decompressor]))
    return False


def _check_definitions(reader: Any) -> None:
    """Look through the definitions of all types in the files, of which `open` makes code. Raises `SourceError`."""
    from rosbags.interfaces import MessageDefinitionFormat as Format

    seen = set()
    for one in reader.readers:
        with one:
            for connection in one.connections:
                written = connection.msgdef
                if written.format != Format.NONE and (connection.msgtype, written.data) not in seen:
                    seen.add((connection.msgtype, written.data))
                    encoding = "ros2idl" if written.format == Format.IDL else "ros2msg"
                    message_types(connection.msgtype, written.data, encoding)


def decoder_of(name: str, definition: str, encoding: str) -> Callable[[bytes], Any]:
    """Decoder of messages of a type with this definition: `ros1msg`, or `ros2idl`. Raises `SourceError`."""
    from rosbags.typesys import Stores, get_typestore

    store, types = get_typestore(Stores.EMPTY), message_types(name, definition, encoding)
    try:
        store.register(types)
    except Exception as error:  # such as two types of one name
        raise SourceError(f"the definition of {name[:120]} cannot be read ({error}).") from error
    if encoding == "ros1msg":
        return lambda data: store.deserialize_ros1(data, full_name(name))
    return lambda data: store.deserialize_cdr(data, name)
