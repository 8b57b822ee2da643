"""Logs of satellite receivers: their formats and units."""

import numpy as np
import pytest

from alpacache.converters.fixes import read_fixes
from alpacache.converters.log_files import UnusableError


def written(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def sentence(body):
    total = 0
    for byte in body.encode():
        total ^= byte
    return f"${body}*{total:02X}\r\n"


def test_gpx_has_places_utc_and_what_extensions_say(tmp_path):
    points = [
        '<trkpt lat="45.1" lon="13.7"><ele>100.5</ele><time>2026-05-01T10:00:00.200Z</time>'
        '<extensions><x:TrackPointExtension xmlns:x="a"><x:speed>12.5</x:speed><x:course>271</x:course>'
        "</x:TrackPointExtension></extensions></trkpt>",
        '<trkpt lat="45.2" lon="13.8"><time>2026-05-01T12:00:01+02:00</time></trkpt>',
        '<trkpt lat="45.3" lon="13.8"></trkpt>',
        '<trkpt lat="0.0" lon="0.0"><time>2026-05-01T10:00:02Z</time></trkpt>',
        '<trkpt lat="45.3" lon="13.8"><time>2026-05-01T10:00:03Z</time><fix>none</fix></trkpt>',
    ]
    text = f'<gpx xmlns="http://www.topografix.com/GPX/1/1"><trk><trkseg>{"".join(points)}</trkseg></trk></gpx>'
    fixes = read_fixes(written(tmp_path, "a.gpx", text))
    assert fixes.times_us.tolist() == [1777629600_200_000, 1777629601_000_000]
    assert fixes.values["latitude"].tolist() == [45.1, 45.2]
    assert fixes.values["height"][0] == 100.5
    assert (fixes.values["speed"][0], fixes.values["course"][0]) == (12.5, 271)
    assert np.isnan(fixes.values["speed"][1])
    assert [(drop.what, drop.count) for drop in fixes.dropped] == [("points", 1), ("points", 1), ("rows", 1)]
    with pytest.raises(UnusableError, match="well-formed"):
        read_fixes(written(tmp_path, "b.gpx", text[:-20]))
    with pytest.raises(UnusableError, match="entities"):
        read_fixes(written(tmp_path, "c.gpx", '<!DOCTYPE a [<!ENTITY b "c">]>' + text))


def test_nmea_is_joined_by_its_times(tmp_path):
    lines = [
        sentence("GPGGA,235959.80,4807.038,N,01131.000,E,1,08,0.9,545.4,M,46.9,M,,"),  # before any date
        sentence("GPRMC,235959.90,A,4807.0380,N,01131.0000,W,022.4,084.4,311226,,,A"),
        sentence("GNGGA,235959.90,4807.0380,N,01131.0000,W,1,08,0.9,545.4,M,46.9,M,,"),
        "\x00\xff noise\r\n",
        sentence("GNGGA,000000.00,4807.0390,N,01131.0000,W,1,08,0.9,545.4,M,46.9,M,,"),  # a new day before its RMC
        sentence("GPRMC,000000.00,A,4807.0390,N,01131.0000,W,000.0,,010127,,,A"),
        sentence("GPGST,000000.00,1.0,,,,3.0,4.0,9.0"),
        sentence("GPRMC,000000.10,V,,,,,,,010127,,,N"),
        sentence("GPRMC,000000.20,A,4807.0400,N,01131.0000,W,022.4,084.4,010127,,,A").replace("022.4", "922.4"),
        sentence("GPRMC,000000.30,A,4807.0400,S,01131.0000,W,022.4,084.4,010127,,,A"),
    ]
    fixes = read_fixes(written(tmp_path, "a.nmea", "".join(lines).encode("latin-1")))
    midnight = 1798761600_000_000
    assert fixes.times_us.tolist() == [midnight - 100_000, midnight, midnight + 300_000]
    np.testing.assert_allclose(fixes.values["latitude"], [48 + 7.038 / 60, 48 + 7.039 / 60, -48 - 7.04 / 60])
    np.testing.assert_allclose(fixes.values["longitude"], -11 - 31 / 60)
    np.testing.assert_allclose(fixes.values["height"][:2], 592.3)  # above the ellipsoid
    np.testing.assert_allclose(fixes.values["speed"][:2], [22.4 * 1852 / 3600, 0], rtol=1e-6)
    assert np.isnan(fixes.values["course"][1])
    assert fixes.values["accuracy"][1] == 5.0
    assert sorted((drop.count, drop.reason.split(",")[0]) for drop in fixes.dropped) == [
        (1, "their checksum does not fit"),
        (1, "without a fix (V)"),
    ]
    with pytest.raises(UnusableError, match="no RMC"):
        read_fixes(written(tmp_path, "b.txt", "hello"))


def test_rows_whose_time_is_not_finite_are_left_out_and_said(tmp_path):
    rows = [f"{stamp},48.{at},11.0" for at, stamp in enumerate((1.0, "nan", 2.0, "inf", 3.0))]
    (tmp_path / "a.csv").write_text("\n".join(["time_s,latitude,longitude", *rows]))
    found = read_fixes(tmp_path / "a.csv")
    assert found.times_us.tolist() == [1_000_000, 2_000_000, 3_000_000]
    assert found.values["latitude"].tolist() == [48.0, 48.2, 48.4]
    assert [(drop.count, drop.reason) for drop in found.dropped] == [(2, "without a time, the first at line 3")]


def test_times_that_step_back_are_left_out_and_said(tmp_path):
    rows = [f"{second},48.0,{11 + second / 1e4}" for second in (0.0, 0.1, 0.2, -3122.0, -3121.9, 0.3, 0.4)]
    fixes = read_fixes(written(tmp_path, "a.csv", "time_s,lat,lon\n" + "\n".join(rows)))
    assert fixes.times_us.tolist() == [0, 100_000, 200_000, 300_000, 400_000]
    (dropped,) = fixes.dropped
    assert (dropped.count, "row 4, -3122.2 s" in dropped.reason) == (2, True)
    assert fixes.breaks_us == [300_000]  # what lies between 0.2 and 0.3 is not known to be 0.1 s


def test_a_row_in_the_wrong_place_is_no_setting_of_the_clock(tmp_path):
    rows = [f"{second},48.0,{11 + second / 1e4}" for second in (0.0, 0.2, 0.1, 0.3, 0.3, 0.4)]
    fixes = read_fixes(written(tmp_path, "a.csv", "time_s,lat,lon\n" + "\n".join(rows)))
    assert (len(fixes.times_us), fixes.breaks_us) == (4, [])


def test_a_clock_that_is_set_back_does_not_mix_places_of_two_times(tmp_path):
    """The same second comes twice, of other places."""
    seconds = [*range(10, 40), *range(25, 60)]
    lines = [
        sentence(f"GPRMC,1000{second}.00,A,4807.{100 + place:04d},N,01131.0000,E,022.4,000.0,010526,,,A")
        for place, second in enumerate(seconds)
    ]
    fixes = read_fixes(written(tmp_path, "a.nmea", "".join(lines)))
    minutes = (fixes.values["latitude"] - 48) * 60
    places = np.rint((minutes - 7) * 1e4).astype(int) - 100
    assert fixes.times_us.tolist() == [1777629600_000_000 + second * 1_000_000 for second in range(10, 60)]
    assert places.tolist() in ([*range(30), *range(45, 65)], [*range(15), *range(30, 65)])
    (began,) = fixes.breaks_us
    assert began == fixes.times_us[np.argmax(np.diff(places) > 1) + 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.nmea", sentence("GPRMC,235960.00,A,4807.0380,N,01131.0000,W,022.4,084.4,311216,,,A")),
        ("a.csv", "time,lat,lon\n2016-12-31T23:59:59Z,1,2\n2016-12-31T23:59:60Z,1,2\n"),
        ("a.gpx", '<gpx><trkpt lat="1" lon="2"><time>2016-12-31T23:59:60Z</time></trkpt></gpx>'),
    ],
)
def test_a_leap_second_is_refused(tmp_path, name, text):
    """What follows it would be a second too early."""
    with pytest.raises(UnusableError, match="is a leap second"):
        read_fixes(written(tmp_path, name, text))


def test_a_receiver_without_a_date_is_of_1980(tmp_path):
    lines = [
        sentence(f"GPRMC,00000{second}.00,A,4807.0380,N,01131.0000,W,022.4,084.4,060180,,,A") for second in range(2)
    ]
    assert read_fixes(written(tmp_path, "a.nmea", "".join(lines))).times_us[0] == 315_964_800_000_000


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_decimal_commas_are_read_between_other_delimiters(tmp_path, delimiter):
    rows = [("0,25", "48,1371", "-11,5", "12,5"), ("0,5", "48,1372", "-11,5", "13")]
    text = "\n".join(delimiter.join(row) for row in (("time_s", "lat", "lon", "speed"), *rows))
    fixes = read_fixes(written(tmp_path, "a.csv", text))
    assert fixes.times_us.tolist() == [250_000, 500_000]
    assert fixes.values["latitude"].tolist() == [48.1371, 48.1372]
    assert fixes.values["longitude"].tolist() == [-11.5, -11.5]
    assert fixes.values["speed"].tolist() == [12.5, 13]
    with pytest.raises(UnusableError, match="more fields than columns; between commas, numbers need decimal points"):
        read_fixes(written(tmp_path, "b.csv", text.replace(delimiter, ",")))


@pytest.mark.parametrize(
    ("head", "stamps", "times_us"),
    [
        ("timestamp", ["1777629600123", "1777629601123"], [1777629600_123_000, 1777629601_123_000]),  # epoch ms
        ("Timestamp (ns)", ["86400000000123", "86400100000123"], [86400_000_000, 86400_100_000]),  # boot ns
        ("time", ["120000000000000", "120001000000000"], [120000_000_000, 120001_000_000]),
        ("time", ["2026-05-01 10:00:00", "2026-05-01 10:00:01"], [1777629600_000_000, 1777629601_000_000]),
        ("t", ["12.5", "12.6"], [12_500_000, 12_600_000]),
        ("time_us", ["5", "2000005"], [5, 2000005]),
    ],
)
def test_times_of_csv_have_a_unit_that_fits(tmp_path, head, stamps, times_us):
    text = f"{head};Latitude;longitude;Speed (km/h);bearing\n"
    text += "".join(f"{stamp};48.0;{11 + at / 1e4};36;90\n" for at, stamp in enumerate(stamps))
    fixes = read_fixes(written(tmp_path, "a.csv", text))
    assert fixes.times_us.tolist() == times_us
    assert fixes.absolute == (times_us[0] > 1e15)
    np.testing.assert_allclose(fixes.values["speed"], 10)
    assert fixes.values["course"].tolist() == [90, 90]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lat,lon\n1,2\n", "no column of times"),
        ("time,lat,lon\n0,1,2\n3,1,2\n6,1,2\n", "time_s, time_ms"),
        ("time,lat,latitude,lon\n0,1,1,2\n1,1,1,2\n", "two columns of latitude"),
        ("time,lat,lon\na,1,2\nb,1,2\n", "neither numbers nor ISO times"),
        ("time,lat,lon\n0,1,2\n1,x,2\n", "1 rows with a time and a fix .*line 3"),
        ("", "no column of times"),
    ],
)
def test_tables_that_do_not_say_enough_are_refused(tmp_path, text, says):
    with pytest.raises(UnusableError, match=says):
        read_fixes(written(tmp_path, "a.csv", text))
