"""Fixes of the satellite receiver that a GoPro writes into its films beside pictures, on the film's own clock.

GPMF (github.com/gopro/gpmf-parser) is records of a key, a type and values, nested, about a second in each packet of a
data stream. `GPS5` (HERO5 to 10, MAX) are places and speeds without times of their own: the receiver gives them
evenly, so they lie on a straight line through the times of the packets. `GPS9` (HERO11, 13) has the receiver's time in
each row. A film comes from a stranger: every length is held against what is there.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import Dropped
from alpacache.converters.film_clock import first_shown_s
from alpacache.converters.fixes import COLUMNS, MAX_ROWS, Fixes
from alpacache.converters.log_files import MOST_SECONDS, UnusableError, as_microseconds
from alpacache.converters.remux import opened
from alpacache.driving.sample import Floats
from alpacache.sources.film_index import FORMATS

DEEPEST = 8
"""Deepest nesting of records that is read; cameras have three levels."""
MOST_UNEVEN_S = 0.25
"""Most that a packet may be away from the line through all of them."""
_TYPES = {"b": "i1", "B": "u1", "s": ">i2", "S": ">u2", "l": ">i4", "L": ">u4", "f": ">f4", "d": ">f8", "J": ">u8"}
"""Letter of a type -> numpy's name of it."""


class Record(NamedTuple):
    """A record of GPMF."""

    key: str
    type: str
    """A letter; of records within, the byte 0."""
    size: int
    """Bytes of one row."""
    data: bytes


def records(data: bytes) -> Iterator[Record]:
    """Yield the records that follow one another in `data`. Raises `ValueError` for one that is not whole."""
    at = 0
    while at + 8 <= len(data) and data[at : at + 4] != bytes(4):
        key, kind, size, count = struct.unpack_from(">4scBH", data, at)
        end = at + 8 + size * count
        if end > len(data):
            raise ValueError(f"a record of {size * count:,} bytes, and {len(data) - at - 8:,} are there")
        yield Record(key.decode("latin-1"), kind.decode("latin-1"), size, data[at + 8 : end])
        at = end + -end % 4


def streams(data: bytes, depth: int = 0) -> Iterator[Mapping[str, Record]]:
    """The streams of a packet, each with its records by key."""
    for record in records(data):
        if record.key == "STRM":
            yield {inner.key: inner for inner in records(record.data)}
        elif record.type == "\0" and depth < DEEPEST:
            yield from streams(record.data, depth + 1)


def rows_of(record: Record, stream: Mapping[str, Record]) -> Floats:
    """Values of a record `[N, C]`, scaled as its stream says. Raises `ValueError` for types that are not known."""
    letters = record.type
    if letters == "?":
        letters = stream["TYPE"].data.decode("latin-1").rstrip("\0")
    elif letters in _TYPES:
        letters *= record.size // np.dtype(_TYPES[letters]).itemsize
    if not letters or any(letter not in _TYPES for letter in letters):
        raise ValueError(f"type {letters[:20]!r} is not known")
    kind = np.dtype([(f"f{place}", _TYPES[letter]) for place, letter in enumerate(letters)])
    if kind.itemsize != record.size:
        raise ValueError(f"rows of {record.size} bytes, and {letters} takes {kind.itemsize}")
    table = np.frombuffer(record.data, kind)
    values = np.stack([table[name].astype(np.float64) for name in kind.names or ()], axis=1)
    if "SCAL" in stream and record.key != "SCAL":
        scale = rows_of(stream["SCAL"], {}).ravel()
        if len(scale) not in (1, values.shape[1]) or not scale.all():
            raise ValueError(f"{len(scale)} scales for {values.shape[1]} values")
        values = values / scale
    return values


@dataclass(frozen=True, slots=True)
class _Packet:
    """Fixes of one packet."""

    time_s: float
    rows: Floats
    """`[N, 5]` or `[N, 9]`: degrees, degrees, m, m/s, m/s, and of `GPS9` days since 2000, seconds, dilution, fix."""
    fixed: bool
    """True if the packet itself says that it has a fix, as one of `GPS5` does."""


def film_fixes(film: Path) -> Fixes | None:
    """Fixes in a film, timed from its first frame on; None for a film without such a stream.

    Raises `BadClipError` for one that cannot be read, and where it holds none that can be used.
    """
    packets, said, damaged = _packets(film)
    if packets is None:
        return None
    packets = packets if any(len(packet.rows) for packet in packets) else []
    dropped = [Dropped(what="packets", count=damaged[0], reason=damaged[1])] if damaged[0] else []
    if sum(len(packet.rows) for packet in packets) > MAX_ROWS:
        raise UnusableError(f"{film.name} holds more than {MAX_ROWS:,} fixes")
    if not packets:
        why = "the camera has no receiver, or it was off"
        raise UnusableError(f"{film.name} has the telemetry of a GoPro without fixes ({why}); put a log beside it")
    if len({packet.rows.shape[1] for packet in packets if len(packet.rows)}) > 1:
        raise UnusableError(f"{film.name} holds fixes of two kinds, GPS5 and GPS9")
    rows = np.concatenate([packet.rows for packet in packets if len(packet.rows)])
    fixed = np.repeat([packet.fixed for packet in packets], [len(packet.rows) for packet in packets])
    times_s = _even_times_s(packets, film)
    if rows.shape[1] == 9:
        fixed &= rows[:, 8] >= 2
    fixed &= np.isfinite(rows).all(axis=1) & (np.abs(rows[:, 0]) <= 90) & (np.abs(rows[:, 1]) <= 180)
    fixed &= (rows[:, 0] != 0) | (rows[:, 1] != 0)
    clock = "the film's; fixes lie evenly between the packets' times"
    if rows.shape[1] == 9 and fixed.any():
        told_s = rows[:, 5] * 86_400 + rows[:, 6]
        times_s = told_s + float(np.median((times_s - told_s)[fixed]))
        clock = "the receiver's own from fix to fix, laid on the film's by the packets' times (median)"
    fixed &= np.abs(times_s) < MOST_SECONDS
    if lost := int((~fixed).sum()):
        dropped.append(Dropped(what="rows", count=lost, reason=f"{film.name}: without a fix"))
    times_us = as_microseconds(np.where(fixed, times_s, 0.0), where=film.name)
    forth = np.flatnonzero(fixed)
    forth = forth[np.diff(times_us[forth], prepend=np.iinfo(np.int64).min // 2) > 0]
    if len(forth) < 2:
        raise UnusableError(f"{film.name} has {len(forth)} fixes of a satellite receiver, of {len(rows)} rows")
    values = {name: np.full(len(forth), np.nan) for name in COLUMNS}
    for place, name in enumerate(("latitude", "longitude", "height", "speed")):
        values[name] = rows[forth, place]
    facts = {"format": f"GPMF of {said or 'a GoPro'}, GPS{rows.shape[1]}", "clock": clock, "speed": "m/s, level"}
    return Fixes(times_us=times_us[forth], absolute=False, values=values, dropped=dropped, facts=facts)


def _packets(film: Path) -> tuple[list[_Packet] | None, str, tuple[int, str]]:
    """Fixes by packet, the camera's name, and how many packets are damaged with the first reason."""
    found: list[_Packet] | None = None
    said, damaged, first_why = "", 0, ""
    begin_s = first_shown_s(film)
    with opened(film, formats=FORMATS) as (container, _):
        for number in range(len(container.streams.data)):
            container.seek(0)
            stream = container.streams.data[number]
            for packet in container.demux(stream):
                data = bytes(packet)
                if not data:
                    continue
                if found is None and not data.startswith(b"DEVC"):
                    break  # another kind of stream, such as the time code
                found = [] if found is None else found
                if packet.pts is None:
                    damaged += 1
                    first_why = first_why or f"{film.name}: telemetry without a time"
                    continue
                rows, fixed = np.empty((0, 5)), False
                try:
                    said = said or _name(data)
                    rows, fixed = _fixes_in(data)
                except (ValueError, LookupError, TypeError, struct.error) as error:
                    damaged += 1
                    first_why = first_why or f"{film.name}: telemetry that cannot be read ({error})"
                found.append(_Packet(float(packet.pts * stream.time_base) - begin_s, rows, fixed))
            if found is not None:
                break
    return found, said, (damaged, first_why)


def _fixes_in(data: bytes) -> tuple[Floats, bool]:
    """Rows of a packet, `GPS9` before `GPS5`, and whether there is a fix."""
    by_key: dict[str, tuple[Floats, bool]] = {}
    for stream in streams(data):
        for key, columns in (("GPS9", 9), ("GPS5", 5)):
            if key in stream:
                rows = rows_of(stream[key], stream)
                if rows.shape[1] != columns:
                    raise ValueError(f"{rows.shape[1]} values in a row of {key}")
                fix = rows_of(stream["GPSF"], {}) if "GPSF" in stream else np.full((1, 1), 3.0)
                by_key[key] = rows, bool(fix[0, 0] >= 2)
    return by_key.get("GPS9") or by_key.get("GPS5") or (np.empty((0, 5)), False)


def _name(data: bytes) -> str:
    for record in records(data):
        if record.key == "DEVC":
            inner = next((one for one in records(record.data) if one.key == "DVNM"), None)
            return "" if inner is None else inner.data.decode("latin-1").rstrip("\0")[:40]
    return ""


def _even_times_s(packets: list[_Packet], film: Path) -> NDArray[Any]:
    """Times of all rows, if they lie evenly: the straight line through where each packet begins.

    A packet that is damaged is taken to have had as many as most.
    """
    own = np.array([len(packet.rows) for packet in packets])
    counts = np.where(own > 0, own, int(np.median(own[own > 0])))
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    told_s = np.array([packet.time_s for packet in packets])
    if len(packets) < 3:
        raise UnusableError(f"{film.name} holds {len(packets)} s of fixes")
    slope, at_s = np.polyfit(begins, told_s, 1)
    uneven_s = float(np.abs(at_s + slope * begins - told_s).max())
    if uneven_s > MOST_UNEVEN_S or slope <= 0:
        raise UnusableError(
            f"{film.name}: its fixes do not come evenly ({uneven_s:.2f} s off at most {MOST_UNEVEN_S:g} s)"
        )
    numbers = np.concatenate([begin + np.arange(count) for begin, count in zip(begins, own, strict=True)])
    times_s: NDArray[np.float64] = at_s + slope * numbers
    return times_s
