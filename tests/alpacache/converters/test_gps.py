"""Films with a receiver's log beside them."""

from datetime import UTC, datetime

import av
import numpy as np
import pytest

from alpacache.converters.drive import Dropped, LoggedDrive
from alpacache.converters.film_clock import FilmStart, Turning, find_start, shown_us, turning_of
from alpacache.converters.gps import drives
from alpacache.errors import UsageError

PLACE = np.deg2rad([48.137, 11.575])
BEGAN_S = 1_777_629_600
SHIFT_PX_A_RAD = 150


def drive(rate_hz=10, seconds=60.0, stop=True):
    """Times (s), east and north (m), yaw (rad), speed (m/s), yaw rate (rad/s) of a drive with turns and a stop."""
    times = np.arange(0, seconds, 0.001)
    speed = 10 + 2 * np.sin(0.3 * times)
    rate = 0.25 * np.sin(0.35 * times) * np.sin(0.05 * times + 0.3)
    if stop:
        standing = 1 / (1 + np.exp(-1.2 * (np.abs(times - 30) - 7)))
        speed, rate = speed * standing, rate * standing
    yaw = 0.7 + np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2 * 0.001)])
    way = np.concatenate([[[0, 0]], np.cumsum(np.stack([speed * np.cos(yaw), speed * np.sin(yaw)], 1)[:-1] * 0.001, 0)])
    step = 1000 // rate_hz
    return times[::step], way[::step], yaw[::step], speed[::step], rate[::step]


def degrees(way):
    """Latitude and longitude by the ellipsoid's radii of curvature, to a millimetre within 600 m."""
    latitude, squared = PLACE[0], 0.00669437999014
    bent = 1 - squared * np.sin(latitude) ** 2
    meridian, normal = 6378137 * (1 - squared) / bent**1.5, 6378137 / np.sqrt(bent)
    east, north = way.T
    there = latitude + (north - east**2 * np.tan(latitude) / (2 * normal)) / meridian
    longitude = PLACE[1] + east / (normal * np.cos(latitude)) * (1 + north / normal * np.tan(latitude))
    return np.rad2deg(there), np.rad2deg(longitude)


def csv_text(times, way, columns):
    latitude, longitude = degrees(way)
    table = {"time": times, "latitude": latitude, "longitude": longitude, **columns}
    rows = [",".join(f"{value:.10f}" for value in row) for row in zip(*table.values(), strict=True)]
    return "\n".join([",".join(table), *rows]) + "\n"


def course_of(yaw):
    return (90 - np.rad2deg(yaw)) % 360


@pytest.fixture(scope="module")
def short_film(tmp_path_factory):
    """60 s at 10 Hz of pictures that turn as `drive` does, its first frame 3.35 s into the log."""
    file = tmp_path_factory.mktemp("film") / "drive.mp4"
    times, _, yaw, _, _ = drive(rate_hz=1000, seconds=60)
    scene = np.random.default_rng(1).integers(0, 255, (12, 120), dtype=np.uint8).repeat(12, 0).repeat(16, 1)
    with av.open(str(file), "w") as movie:
        stream = movie.add_stream("mpeg4", rate=10, width=256, height=144, pix_fmt="yuv420p")
        for number in range(500):
            at = np.interp(3.35 + number / 10, times, yaw)
            left = round((yaw.max() + 0.2 - at) * SHIFT_PX_A_RAD)  # turning left moves the picture right
            picture = scene[:, left : left + 256, None].repeat(3, 2)
            movie.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
        movie.mux(stream.encode(None))
    return file


@pytest.fixture
def folder(tmp_path, short_film):
    (tmp_path / "drive.mp4").write_bytes(short_film.read_bytes())
    times, way, yaw, speed, _ = drive()
    text = csv_text(BEGAN_S + times, way, {"speed": speed, "course": course_of(yaw)})
    (tmp_path / "drive.csv").write_text(text)
    return tmp_path


def test_ten_fixes_a_second_come_out_as_they_went_in(folder):
    (found,) = drives(folder, film_start="3.35")
    times, way, yaw, speed, _ = drive()
    assert found.track.timestamps_us.tolist() == np.rint((BEGAN_S + times) * 1e6).astype(int).tolist()
    np.testing.assert_allclose((found.track.xyz[:, :2] - way)[speed > 3], 0, atol=0.01)
    np.testing.assert_allclose(found.track.xyz[:, :2] - way, 0, atol=0.05)
    heading = 2 * np.unwrap(np.arctan2(*found.track.quaternion_xyzw[:, 2:].T), period=np.pi)
    off = np.rad2deg((heading - yaw + np.pi) % (2 * np.pi) - np.pi)
    assert np.abs(off[10:-10][speed[10:-10] > 4]).max() < 0.05
    assert np.abs(off).max() < 1.0  # held at the stop
    front = found.cameras["camera_front_wide_120fov"]
    assert (len(front.times_us), front.first) == (500, 0)
    assert front.times_us[0] == BEGAN_S * 1_000_000 + 3_350_000
    assert (found.name, found.point) == ("drive", "antenna")
    assert "0.100 s apart" in found.facts["fixes"]
    assert found.facts["uncertainty"].startswith("0.06 m and 0.4")


def test_the_films_place_is_found_from_its_turns(folder):
    (found,) = drives(folder)
    late_s = (found.cameras["camera_front_wide_120fov"].times_us[0] - BEGAN_S * 1_000_000) / 1e6 - 3.35
    assert abs(late_s) < 0.05
    assert "found from its turns" in found.facts["film"]


def test_where_the_film_belongs_is_not_guessed(short_film):
    turning = turning_of(short_film)
    times, _, yaw, _, _ = drive()
    assert isinstance(find_start(turning, times, yaw), FilmStart)
    assert "turns by less" in find_start(turning, times, 0 * yaw)
    assert "mirrored" in find_start(turning, times, -yaw)
    nothing = Turning(begins_s=turning.begins_s, ends_s=turning.ends_s, shift_px=np.full(len(turning.ends_s), np.nan))
    assert "0 of" in find_start(nothing, times, yaw)
    again = np.concatenate([yaw, yaw[-1] + yaw - yaw[0]])  # the same drive twice: two places
    assert "the next best" in find_start(turning, np.arange(len(again)) / 10, again)
    assert shown_us(short_film)[[0, 1, 499]].tolist() == [0, 100_000, 49_900_000]


def test_a_date_and_the_containers_times_place_a_film(folder):
    at = datetime.fromtimestamp(BEGAN_S + 5, UTC).isoformat()
    (found,) = drives(folder / "drive.mp4", film_start=at)
    assert found.cameras["camera_front_wide_120fov"].times_us[0] == (BEGAN_S + 5) * 1_000_000
    with pytest.raises(UsageError, match="neither a time"):
        list(drives(folder, film_start="noon"))


def test_one_date_for_a_folder_of_films_leaves_out_those_that_it_is_not_of(folder):
    (folder / "later.mp4").write_bytes((folder / "drive.mp4").read_bytes())
    times, way, yaw, speed, _ = drive()
    later = csv_text(BEGAN_S + 600 + times, way, {"speed": speed, "course": course_of(yaw)})
    (folder / "later.csv").write_text(later)
    at = datetime.fromtimestamp(BEGAN_S + 5, UTC).isoformat()
    found, dropped = drives(folder, film_start=at)
    assert (found.name, dropped.what, dropped.count) == ("drive", "drives", 1)
    assert "later.mp4: the film, first frame at" in dropped.reason
    assert "seconds after the log's first row may be those of every film in a folder" in dropped.reason


def refused(folder, times, way, columns, **options):
    (folder / "drive.csv").write_text(csv_text(times, way, columns))
    found = list(drives(folder, film_start="3.35", **options))
    assert all(isinstance(item, Dropped) for item in found)
    return "; ".join(item.reason for item in found)


def test_one_place_a_second_is_no_path(folder):
    times, way, yaw, speed, _ = drive(rate_hz=1)
    assert "does not tell the path between; record 5 fixes" in refused(folder, times, way, {})
    rng = np.random.default_rng(3)
    noisy = way + rng.normal(size=way.shape) * 2  # a phone's
    columns = {"speed": speed, "course": course_of(yaw)}
    assert "places and speeds differ by" in refused(folder, times, noisy, columns)


def test_gaps_wrong_units_and_standing_are_refused(folder):
    times, way, yaw, speed, _ = drive()
    columns = {"speed": speed * 3.6, "course": course_of(yaw)}
    assert "3.60 times what the places say; name the column speed_kmh" in refused(folder, times, way, columns)
    rare = slice(None, None, 20)
    assert "shorter than 8.1 s" in refused(folder, times[rare], way[rare], {})
    assert "never moves" in refused(folder, times, way * 0, {})


def test_a_gap_makes_two_drives(folder):
    times, way, _, speed, _ = drive()
    kept = (times < 22) | (times > 38)
    (folder / "drive.csv").write_text(csv_text(times[kept], way[kept], {"speed": speed[kept]}))
    first, second = drives(folder, film_start="3.35")
    assert (first.name, second.name) == ("drive-1", "drive-2")
    front = second.cameras["camera_front_wide_120fov"]
    assert front.times_us[0] >= second.track.timestamps_us[0]
    assert front.first == 348  # 3.35 s + 34.8 s


def test_a_clock_that_is_set_back_ends_a_stretch(folder):
    """From 30 s on rows say the times of 5 s before; how long lies between is not known, and nothing bridges it."""
    times, way, yaw, speed, _ = drive(stop=False)
    told = np.where(times < 30, times, times - 5)
    columns = {"speed": speed, "course": course_of(yaw)}
    (folder / "drive.csv").write_text(csv_text(told, way, columns))
    found = list(drives(folder / "drive.csv", film_start="0"))
    parts = [item for item in found if isinstance(item, LoggedDrive)]
    assert len(parts) == 2
    for part in parts:
        gone = np.linalg.norm(np.diff(part.track.xyz[:, :2], axis=0), axis=1)
        assert (gone / np.diff(part.track.timestamps_us) * 1e6).max() < 1.2 * speed.max()
    assert sum(item.count for item in found if isinstance(item, Dropped) and item.what == "rows") == 50


def test_a_vehicles_speed_and_steering_carry_rare_fixes(folder):
    times, way, yaw, speed, rate = drive(rate_hz=20)
    rare = slice(None, None, 20)
    steering = -15 * np.rad2deg(np.arctan(2.7 * rate / np.maximum(speed, 0.5))) + 1.5  # right positive, of the wheel
    vehicle = np.column_stack([times, speed / 0.99, steering])
    rows = "\n".join(",".join(f"{value:.8f}" for value in row) for row in vehicle)
    (folder / "drive.vehicle.csv").write_text("time_s,speed,steering_deg\n" + rows)
    (folder / "drive.csv").write_text(csv_text(times[rare], way[rare], {}))
    (found,) = drives(folder, film_start="3.35")
    assert isinstance(found, LoggedDrive)
    at = np.interp(found.track.timestamps_us / 1e6, times, np.arange(len(times))).round().astype(int)
    assert np.abs(found.track.xyz[:, :2] - way[at]).max() < 0.5
    heading = 2 * np.unwrap(np.arctan2(*found.track.quaternion_xyzw[:, 2:].T), period=np.pi)
    assert np.abs(np.rad2deg((heading - yaw[at] + np.pi) % (2 * np.pi) - np.pi)).max() < 1.0
    assert "explained" in found.facts["steering"]
    wrong = "\n".join(f"{a:.3f},{b:.6f},{-c:.6f}" for a, b, c in zip(times, speed, rate, strict=True))
    (folder / "drive.vehicle.csv").write_text("time_s,speed,yaw_rate\n" + wrong)
    (dropped,) = drives(folder, film_start="3.35")
    assert "left positive: negate it" in dropped.reason


def test_a_film_without_its_log_is_named(folder):
    (folder / "drive.csv").rename(folder / "other.csv")
    (folder / "notes.txt").write_text("a sunny day")
    dropped, alone = drives(folder)
    assert (alone.what, alone.count) == ("logs", 1)
    assert "other.csv: no film of that name is beside it" in alone.reason
    assert "drive.mp4: no log is beside it (drive.gpx, .nmea or .csv), and it has no telemetry" in dropped.reason
    (folder / "notes.txt").unlink()
    (alone,) = drives(folder / "other.csv")
    assert (alone.name, alone.cameras, len(alone.track.timestamps_us)) == ("other", {}, 600)
    assert "no film is beside other.csv: the clip holds poses alone" in alone.dropped[0].reason
    (folder / "drive.mp4").unlink()
    assert [item.name for item in drives(folder) if isinstance(item, LoggedDrive)] == ["other"]
    (folder / "other.csv").rename(folder / "other.pdf")
    with pytest.raises(UsageError, match="neither a film nor a log"):
        list(drives(folder))


def write_vehicle(file, times, speed, rate, head="time_s,speed,yaw_rate"):
    rows = "\n".join(f"{a:.3f},{b:.6f},{c:.6f}" for a, b, c in zip(times, speed, rate, strict=True))
    file.write_text(f"{head}\n{rows}\n")


def test_speed_and_yaw_rate_alone_are_integrated_and_said_to_drift(folder):
    times, way, yaw, speed, rate = drive(rate_hz=20)
    still = np.where(speed < 0.03, 0.0, speed)
    write_vehicle(folder / "drive.csv", times, still, np.where(still > 0, rate, 0.0) + 0.02)
    (found,) = drives(folder, film_start="3.35")
    assert found.point == "rear axle"
    turned = np.array([[np.cos(0.7), np.sin(0.7)], [-np.sin(0.7), np.cos(0.7)]])
    assert np.abs(found.track.xyz[:, :2] - way @ turned.T).max() < 0.5
    heading = 2 * np.unwrap(np.arctan2(*found.track.quaternion_xyzw[:, 2:].T), period=np.pi)
    assert np.abs(np.rad2deg(heading - (yaw - 0.7))).max() < 0.3
    assert "they drift" in found.facts["positions"]
    assert found.facts["yaw rate bias"] == "+0.02000 rad/s, seen at standstill"
    write_vehicle(folder / "drive.csv", times, still, rate, head="time_s,speed,steering_deg")
    (refused,) = drives(folder, film_start="3.35")
    assert "no latitude and longitude" in refused.reason


def test_a_vehicles_log_with_a_hole_is_refused_and_a_shorter_one_bounds_the_path(folder):
    times, way, _, speed, rate = drive(rate_hz=20)
    (folder / "drive.csv").write_text(csv_text(times[::20], way[::20], {}))
    late = times > 5
    write_vehicle(folder / "drive.vehicle.csv", times[late], speed[late], rate[late])
    (found, *said) = drives(folder, film_start="3.35")
    assert found.track.timestamps_us[0] == 6_000_000
    assert [(item.what, item.count) for item in said] == [("rows", 6)]
    hole = (times < 20) | (times > 22)
    write_vehicle(folder / "drive.vehicle.csv", times[hole], speed[hole], rate[hole])
    (refused,) = drives(folder, film_start="3.35")
    assert "no speed and yaw rate for 2.1 s from 19.9 s on" in refused.reason
