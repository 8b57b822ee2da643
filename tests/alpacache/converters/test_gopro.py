"""Films with the telemetry of a GoPro in them."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from alpacache.converters.drive import LoggedDrive
from alpacache.converters.gopro import film_fixes, records, rows_of, streams
from alpacache.converters.gps import drives
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.errors import BadClipError

PLACE = (48.137, 11.575)
SPEED_MPS, RATE = 10.0, 0.1
SECONDS, RATE_HZ = 20, 18
LATE_S = 0.04
"""By how much the first fix is behind the first frame."""


def record(key, kind, size, data):
    count, rest = divmod(len(data), size)
    assert rest == 0
    return key.encode() + struct.pack(">cBH", kind.encode(), size, count) + data + bytes(-len(data) % 4)


def nested(key, *inner):
    data = b"".join(inner)
    return record(key, "\0", 1, data) if len(data) < 65_536 else record(key, "\0", 4, data)


def driven(times_s):
    """Latitude, longitude of a circle, by the ellipsoid's radii; good to a millimetre within 200 m."""
    yaw = RATE * times_s
    east, north = SPEED_MPS / RATE * np.sin(yaw), SPEED_MPS / RATE * (1 - np.cos(yaw))
    latitude, squared = np.deg2rad(PLACE[0]), 0.00669437999014
    bent = 1 - squared * np.sin(latitude) ** 2
    meridian, normal = 6378137 * (1 - squared) / bent**1.5, 6378137 / np.sqrt(bent)
    there = latitude + (north - east**2 * np.tan(latitude) / (2 * normal)) / meridian
    across = east / (normal * np.cos(latitude)) * (1 + north / normal * np.tan(latitude))
    return np.rad2deg(there), PLACE[1] + np.rad2deg(across), yaw


def payload(first, count, *, nine, fix=3):
    """A packet of `count` fixes from number `first` on, as the camera writes it."""
    times_s = LATE_S + (first + np.arange(count)) / RATE_HZ
    latitude, longitude, _ = driven(times_s)
    whole = [np.rint(1e7 * latitude), np.rint(1e7 * longitude), np.full(count, 520_123), np.full(count, 10_000)]
    whole.append(np.full(count, 1_000))
    acceleration = nested("STRM", record("SCAL", "s", 2, struct.pack(">h", 417)), record("ACCL", "s", 6, bytes(600)))
    if nine:
        day_s = 36_000 + 3 + times_s  # the receiver's clock
        whole += [np.full(count, 9_617), np.rint(1000 * day_s), np.full(count, 120), np.full(count, fix)]
        rows = b"".join(struct.pack(">lllllllHH", *map(int, row)) for row in zip(*whole, strict=True))
        scales = (10**7, 10**7, 1000, 1000, 100, 1, 1000, 100, 1)
        fixes = nested(
            "STRM",
            record("TYPE", "c", 1, b"lllllllSS"),
            record("SCAL", "l", 4, struct.pack(">9l", *scales)),
            record("GPS9", "?", 32, rows),
        )
    else:
        rows = b"".join(struct.pack(">5l", *map(int, row)) for row in zip(*whole, strict=True))
        fixes = nested(
            "STRM",
            record("GPSF", "L", 4, fix if isinstance(fix, bytes) else struct.pack(">L", fix)),
            record("SCAL", "l", 4, struct.pack(">5l", 10**7, 10**7, 1000, 1000, 100)),
            record("GPS5", "l", 20, rows),
        )
    return nested("DEVC", record("DVID", "L", 4, bytes(4)), record("DVNM", "c", 1, b"Hero9 Black"), acceleration, fixes)


def write(file, payloads, *, begins_s=0.0):
    """A film of `SECONDS` at 10 Hz with a packet of telemetry each second."""
    with av.open(str(file), "w", format="mp4") as movie:
        pictures = movie.add_stream("mpeg4", rate=10, width=64, height=32, pix_fmt="yuv420p")
        telemetry = movie.add_data_stream("bin_data")
        telemetry.time_base = Fraction(1, 1000)
        packets = []
        for number in range(SECONDS * 10):
            frame = np.full((32, 64, 3), 5 * (number % 50), np.uint8)
            packets += pictures.encode(av.VideoFrame.from_ndarray(frame))
        packets += pictures.encode(None)
        for second, data in enumerate(payloads):
            packet = av.Packet(data)
            packet.stream, packet.time_base = telemetry, telemetry.time_base
            packet.pts = packet.dts = round(1000 * (begins_s + second))
            packet.duration = 1000
            packets.append(packet)
        for packet in packets:
            movie.mux(packet)
    return file


def counts():
    """17 to 19 fixes a packet, as a camera puts what has come in that second."""
    edges = np.rint(RATE_HZ * np.arange(SECONDS + 1) + 0.9 * np.sin(3 * np.arange(SECONDS + 1)))
    edges -= edges[0]
    return edges[:-1].astype(int), np.diff(edges).astype(int)


@pytest.mark.parametrize("nine", [False, True])
def test_fixes_are_on_the_films_clock(tmp_path, nine):
    payloads = [payload(first, count, nine=nine) for first, count in zip(*counts(), strict=True)]
    film = write(tmp_path / "GX010001.MP4", payloads, begins_s=LATE_S)
    fixes = film_fixes(film)
    wanted_s = LATE_S + np.arange(len(fixes.times_us)) / RATE_HZ
    assert np.abs(fixes.times_us / 1e6 - wanted_s).max() < 0.06  # packets tell it to a fix
    assert np.abs(np.diff(fixes.times_us) / 1e6 - 1 / RATE_HZ).max() < 2e-3
    latitude, longitude, _ = driven(wanted_s)
    assert np.abs(fixes.values["latitude"] - latitude).max() < 1e-7
    assert np.abs(fixes.values["longitude"] - longitude).max() < 1e-7
    assert (fixes.values["height"][0], fixes.values["speed"][0]) == (520.123, 10.0)
    assert fixes.facts["format"] == f"GPMF of Hero9 Black, GPS{9 if nine else 5}"
    (drive,) = [item for item in drives(tmp_path) if isinstance(item, LoggedDrive)]
    assert drive.cameras[FRONT_CAMERA].times_us[0] >= drive.track.timestamps_us[0]
    assert len(drive.cameras[FRONT_CAMERA].times_us) >= 10 * SECONDS - 12
    yaw = 2 * np.arctan2(*drive.track.quaternion_xyzw[:, 2:].T)
    middle = slice(40, -40)
    told = RATE * drive.track.timestamps_us / 1e6
    assert np.rad2deg(np.abs(yaw - told)[middle].max()) < 1.0


def test_rows_without_a_fix_and_damaged_packets_are_counted(tmp_path):
    payloads = [payload(18 * second, 18, nine=False, fix=0 if second == 3 else 3) for second in range(SECONDS)]
    payloads[7] = payloads[7][:200]
    fixes = film_fixes(write(tmp_path / "a.mp4", payloads))
    assert len(fixes.times_us) == 18 * 18
    assert sorted((drop.what, drop.count) for drop in fixes.dropped) == [("packets", 1), ("rows", 18)]
    with pytest.raises(BadClipError, match="has 0 fixes of a satellite receiver, of 360 rows"):
        film_fixes(
            write(tmp_path / "b.mp4", [payload(18 * second, 18, nine=False, fix=0) for second in range(SECONDS)])
        )
    with pytest.raises(BadClipError, match="without fixes"):
        film_fixes(write(tmp_path / "c.mp4", [nested("DEVC", record("DVNM", "c", 1, b"Hero12 Black"))] * 5))


def test_records_without_rows_and_times_of_no_clock_are_counted(tmp_path):
    payloads = [payload(18 * second, 18, nine=False, fix=b"" if second == 5 else 3) for second in range(SECONDS)]
    fixes = film_fixes(write(tmp_path / "a.mp4", payloads))
    assert [(drop.what, drop.count) for drop in fixes.dropped] == [("packets", 1)]
    payloads = [payload(18 * second, 18, nine=True) for second in range(SECONDS)]
    payloads[4] = payloads[4].replace(struct.pack(">l", 9_617), struct.pack(">l", 2**31 - 1))
    fixes = film_fixes(write(tmp_path / "b.mp4", payloads))
    assert [(drop.what, drop.count) for drop in fixes.dropped] == [("rows", 18)]
    assert len(fixes.times_us) == 18 * (SECONDS - 1)


def test_a_log_beside_the_film_is_taken_and_a_film_without_either_is_named(tmp_path):
    write(tmp_path / "a.mp4", [b"not telemetry"] * 3)
    assert film_fixes(tmp_path / "a.mp4") is None
    (dropped,) = drives(tmp_path)
    assert "it has no telemetry of a GoPro" in dropped.reason


def test_lengths_of_a_stranger_are_held_against_what_is_there():
    deep = b""
    for _ in range(5000):
        deep = nested("DEVC", deep[:60_000])
    assert list(streams(deep)) == []
    with pytest.raises(ValueError, match=r"a record of 65,535 bytes, and 0 are there"):
        list(records(b"GPS5l" + struct.pack(">BH", 1, 65_535)))
    (wrong,) = records(record("GPS5", "?", 3, bytes(6)))
    for kind in (b"", b"ll", b"xyz"):
        with pytest.raises(ValueError, match=r"type .* is not known|rows of 3 bytes"):
            rows_of(wrong, {"TYPE": next(records(record("TYPE", "c", 1, kind)))} if kind else {"TYPE": wrong})
