"""Closed loop: the rendered is what the car would see, the followed what was predicted, and the measures count."""

import base64
import io
import json
import re
from importlib.resources import files

import numpy as np
import pytest
import torch
from headless import Page
from PIL import Image

from alpacache.driver import closed_loop
from alpacache.driver.closed_loop import (
    KEPT_M,
    REPLAN_STEPS,
    RoadDrive,
    drive_roads,
    loop_roads,
    summarise,
)
from alpacache.driver.driver import DrivenPaths, load_driver
from alpacache.driver.loop_film import telling, write_loop_film
from alpacache.driver.loop_page import REPORT_PLACE, add_to_report, loop_table, write_loop_page
from alpacache.driving.action_space import yaw_rotation
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.sources.road import lane_place
from alpacache.sources.synthetic import SyntheticSource

pytestmark = pytest.mark.system  # whole drives


class Chauffeur:
    """Stands in for a driver: follows the road's centre line exactly, or goes straight on."""

    frames, blank, takes_routes = 1, (), False

    def __init__(self, follows):
        self.follows, self.seen, self.observer = follows, [], self

    def see_together(self, samples, tracks):
        self.seen.append(samples)
        return list(zip(samples, tracks, strict=True))

    def paths_together(self, seen, *, paths, flow_steps, seed):
        return [self.ahead(sample, track) for sample, track in seen]

    def ahead(self, sample, track):
        position, turned = track.xyz[-1], track.quaternion_xyzw[-1]
        yaw = 2 * np.arctan2(turned[2], turned[3])
        rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
        speed = np.linalg.norm(track.xyz[-1] - track.xyz[-3]) / 0.2
        along = speed * 0.1 * np.arange(1, 65)
        xyz, heading = np.stack([along, 0 * along, 0 * along], axis=1), 0 * along
        if self.follows:
            road = self.follows[sample.ref.clip_id].drive(sample.ref.clip_id).road
            arc, _ = lane_place(road, position[:2], near_m=self.arc(sample, road))
            places = ((arc + along - road.start_m) / road.spacing_m).astype(int)
            there = road.points[places].astype(float)
            world = np.concatenate([there[:, :2], np.zeros((64, 1))], axis=1)
            xyz, heading = (world - position) @ rotation, there[:, 5] - yaw

        return DrivenPaths(
            times_us=sample.ref.t0_us + 100_000 * np.arange(1, 65),
            xyz=xyz[None].astype(np.float32),
            rot=yaw_rotation(torch.from_numpy(heading))[None].numpy().astype(np.float32),
            actions=np.zeros((1, 64, 2), np.float32),
            controls=np.zeros((1, 64, 2), np.float32),
            position_m=position,
            rotation=rotation,
        )

    def arc(self, sample, road):
        recorded = self.follows[sample.ref.clip_id].drive(sample.ref.clip_id)
        return float(np.interp(sample.ref.t0_us, recorded.track.timestamps_us, recorded.arc_m))


def test_what_stands_on_the_recorded_path_sees_the_recorded_pictures():
    source = SyntheticSource(1)
    clip, drive = source.clip_ids[0], source.drive(source.clip_ids[0])
    (picture,) = source.film(clip, FRONT_CAMERA, np.array([5_100_000]))
    yaw = 2 * np.arctan2(*drive.track.quaternion_xyzw[102, 2:])
    given = {"position": drive.track.xyz[102, :2], "yaw_rad": yaw, "arc_m": drive.arc_m[102], "frame": 102}
    assert np.array_equal(source.view(clip, FRONT_CAMERA, **given), picture)
    aside = source.view(clip, FRONT_CAMERA, **given | {"position": given["position"] + [0.0, 1.0]})
    assert (aside != picture).mean() > 0.3


def test_a_place_beside_the_lane_is_found():
    source = SyntheticSource(1, mix={"late_curve": 1.0})
    road = source.drive(source.clip_ids[0]).road
    for place in (450, 800):
        x, y, cos, sin, *_, along = road.points[place].astype(float)
        arc, offset = lane_place(road, np.array([x - 1.2 * sin, y + 1.2 * cos]), near_m=along + road.start_m + 20)
        assert arc == pytest.approx(along + road.start_m, abs=0.02)
        assert offset == pytest.approx(1.2, abs=0.01)


def test_whoever_follows_the_road_keeps_it_and_whoever_does_not_leaves_it_at_the_bend():
    roads = loop_roads(2, shapes=("straight", "late_curve"))
    assert [road.shape for road in roads] == ["straight", "late_curve"]
    sources = {road.clip_id: road.source for road in roads}
    good, bad = Chauffeur(sources), Chauffeur({})
    heard = []
    kept = drive_roads(good, roads, seconds=13.0, pictures=1, on_step=lambda *step: heard.append(step))
    left = drive_roads(bad, roads, seconds=13.0)
    assert heard[-1] == (23, 23)
    assert all(drive.kept and drive.lateral_error_m < 0.4 for drive in kept)
    assert [drive.kept for drive in left] == [True, False]
    for drive in left[1:]:
        onset = drive.road.source.clip_kind(drive.road.clip_id).onset_s + 5.1
        assert onset < drive.left_at * 0.1 < onset + 5.0
        assert drive.distance_m < drive.arc_m[-1]
        assert abs(drive.offset_m[drive.left_at]) > KEPT_M
    assert left[0].jerk_mps3 < 0.2
    assert list(kept[0].pictures) == list(range(15, 130, REPLAN_STEPS))
    assert not kept[1].pictures
    assert kept[0].pictures[15].shape == (3, 128, 256)
    assert len(kept[0].xyz) == 15 + 1 + 23 * REPLAN_STEPS
    summary = summarise(kept, before=left)
    assert (summary.kept.estimate, summary.more_kept.estimate) == (1.0, 0.5)
    assert (summary.finished.estimate, summary.more_finished.estimate) == (1.0, 0.5)
    assert summarise(left).by_shape == {"straight": (1, 1), "late_curve": (0, 1)}


@pytest.fixture(scope="module")
def bend():
    """A bend, driven by one that goes straight on and one that follows it; by label drives and summary."""
    roads = loop_roads(2, shapes=("late_curve",))
    sources = {road.clip_id: road.source for road in roads}
    drives = {
        label: drive_roads(Chauffeur(follows), roads, seconds=9.0, pictures=1)
        for label, follows in (("base", {}), ("trained", sources))
    }
    return drives, {label: summarise(own, before=drives["base"]) for label, own in drives.items()}


def test_the_page_holds_all_it_plays(bend, tmp_path):
    drives, loop = bend
    beside = {"trained": {"minADE m": "1.08"}}
    write_loop_page(tmp_path / "loop.html", drives, loop, about="</script> two bends", beside=beside)
    page = (tmp_path / "loop.html").read_text()
    text = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    data = json.loads(text)
    assert data["about"] == "</script> two bends"
    (road,) = data["roads"]
    assert [car["label"] for car in road["cars"]] == ["base", "trained"]
    car = road["cars"][1]
    assert len(car["xy"]) == len(car["yaw"]) == len(car["offset"]) == len(drives["trained"][0].xyz)
    steps, pictures = zip(*car["pictures"], strict=True)
    assert list(steps) == list(drives["trained"][0].pictures)
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert picture.size == (256, 128)
    assert [data["heads"], *data["rows"]] == loop_table(loop, beside=beside)
    assert data["heads"][-1] == "minADE m"
    assert [row[-1] for row in data["rows"]] == ["-", "1.08"]
    assert data["rows"][1][1].startswith("2 of 2, 1.00")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    left, lane = np.array(road["left"]), np.array(road["lane"][0])
    width = np.linalg.norm(left[5] - lane[5])
    outer = drives["base"][0].road.source.half_lanes_m(drives["base"][0].road.clip_id)[0]
    assert width == pytest.approx(outer - 1.75, abs=0.02)


MOVED = """(() => {
  const time = document.querySelector("#loop input"), seen = () => [...document.querySelectorAll("#loop .cars img")]
    .map(image => image.src).concat(document.querySelector("#loop canvas").toDataURL());
  const before = seen(); time.value = time.max; time.dispatchEvent(new Event("input")); const after = seen();
  return {moved: before.map((text, i) => text !== after[i]), said: document.querySelector("#loop .cars").innerText};
})()"""
WINDOWS = [(1280, False, "screen"), (1280, True, "screen"), (390, False, "screen"), (390, True, "screen")]


@pytest.mark.system
@pytest.mark.parametrize(("width", "dark", "medium"), [*WINDOWS, (1040, True, "print")])
def test_the_slider_moves_pictures_and_cars_and_nothing_is_cut(bend, browser, tmp_path, width, dark, medium):
    path = tmp_path / "loop.html"
    write_loop_page(path, *bend, about="two bends")
    shown = Page(browser, path.as_uri(), width=width, dark=dark, medium=medium)
    layout = shown.layout()
    assert (layout["cut"], layout["width"], layout["faint"]) == ([], 0, [])
    assert layout["hole"] < 120
    if width >= 1280:
        assert layout["scrolled"] == []
    found = shown.evaluate(MOVED)
    assert found["moved"] == [True, True, True]
    assert found["said"].count("out of its lane") == 1
    assert shown.complaints == []
    shown.close()


@pytest.mark.system
def test_the_report_plays_it_too(bend, browser, tmp_path):
    report = tmp_path / "report.html"
    report.write_text(f"<!doctype html><body>{REPORT_PLACE}</body>")
    write_loop_page(tmp_path / "loop.html", *bend, about="two bends")
    add_to_report(report, tmp_path / "loop.html")
    shown = Page(browser, report.as_uri(), width=1280)
    assert shown.evaluate(MOVED)["moved"] == [True, True, True]
    assert shown.complaints == []
    shown.close()
    with pytest.raises(ValueError, match="has no place for a closed loop"):
        add_to_report(report, tmp_path / "loop.html")
    assert files("alpacache").joinpath("report.html").read_text().count(REPORT_PLACE) == 1


def test_the_film_shows_the_road_that_only_the_trained_model_keeps(bend, tmp_path):
    drives, _ = bend
    best = telling(drives)
    assert drives["trained"][best].kept
    assert not drives["base"][best].kept
    write_loop_film(tmp_path / "loop.webp", {label: own[best] for label, own in drives.items()})
    with Image.open(tmp_path / "loop.webp") as film:
        assert (film.n_frames, film.size) == (len(range(0, 91, 2)), (648, 408))
        film.seek(film.n_frames - 1)
        panels = np.asarray(film.convert("RGB"), dtype=int)
    red = (panels[:28, :, 0] - panels[:28, :, 2] > 50).sum(axis=0)
    assert red[120:320].sum() > 100 > red[328:].sum(), "the first model's state is out of its lane, the other's is not"
    with pytest.raises(ValueError, match="expected at most 1,000"):
        write_loop_film(tmp_path / "loop.webp", {"base": drives["base"][best]}, most_bytes=1000)


def test_the_first_thing_it_sees_is_what_training_saw(bend):
    """The sample of the first step equals the one that the source loads there for extraction."""
    driver, (road,) = Chauffeur({}), loop_roads(1, shapes=("late_curve",))
    drive_roads(driver, [road], seconds=2.0)
    ((sample,),) = driver.seen
    recorded = road.source.load(SampleRef(clip_id=road.clip_id, t0_us=1_500_000), cameras=[FRONT_CAMERA], frames=1)
    assert np.array_equal(sample.frames, recorded.frames)
    assert np.abs(sample.history_xyz - recorded.history_xyz).max() < 1e-3
    assert np.abs(sample.history_rot - recorded.history_rot).max() < 1e-4


def test_measures_of_a_drive_by_hand():
    (road,) = loop_roads(1)
    steps = np.arange(60)
    drive = RoadDrive(
        road=road,
        xyz=[np.array([float(step) ** 3 / 1000, 0.0, 0.0]) for step in steps],
        yaw=[0.0] * 60,
        arc_m=[float(step) for step in steps],
        offset_m=[0.0] * 40 + [1.0] * 10 + [2.0] * 10,
    )
    assert (drive.left_at, drive.kept, drive.distance_m) == (50, False, 35.0)
    assert drive.lateral_error_m == pytest.approx(10 / 35)
    assert drive.jerk_mps3 == pytest.approx(6.0)
    drive.offset_m[50:] = [1.5] * 10
    assert (drive.kept, drive.distance_m) == (True, 44.0)
    drive.lost = True
    assert not drive.kept


def test_a_model_drives_and_meets_the_same_in_each_run(tiny_checkpoint, tiny_checkpoint_15):
    driver, roads = load_driver(tiny_checkpoint, device="cpu", frames=2), loop_roads(2)
    first, again = (drive_roads(driver, roads, seconds=3.0, flow_steps=2, seed=3) for _ in range(2))
    assert all(np.array_equal(one.xyz, two.xyz) for one, two in zip(first, again, strict=True))
    other = drive_roads(driver, roads, seconds=3.0, flow_steps=2, seed=4)
    assert not np.array_equal(first[0].xyz, other[0].xyz)
    mean = drive_roads(driver, roads, seconds=3.0, flow_steps=2, seed=3, paths=3, follow="mean")
    assert not np.array_equal(first[0].xyz, mean[0].xyz)
    with pytest.raises(ValueError, match="follow is 'best'"):
        drive_roads(driver, roads, follow="best")
    routed = load_driver(tiny_checkpoint_15, device="cpu", frames=1)
    forks, told = loop_roads(1, shapes=("fork",)), []
    look = routed.observer.see_together

    def see_together(samples, tracks):
        told.extend(one.route for one in samples)
        return look(samples, tracks)

    routed.observer.see_together = see_together
    drive_roads(routed, forks, seconds=2.5, flow_steps=1)
    side = forks[0].source.clip_kind(forks[0].clip_id).side
    assert {text for text in told if text} <= {f"turn {side} in {metres} m" for metres in range(200)}
    assert len(told) == 2


def test_a_route_says_how_far_its_turn_is():
    (road,) = loop_roads(1, shapes=("fork",))
    drive, recorded = closed_loop._begun(road), road.source.drive(road.clip_id)
    start_us, side = recorded.turns[0]
    there = float(np.interp(start_us, recorded.track.timestamps_us, recorded.arc_m))
    drive.arc_m[-1] = there - 12.0
    drive.arc_m[-6] = there - 17.0
    assert closed_loop._route(drive, len(drive.arc_m) - 1) == f"turn {side} in 12 m"
    drive.arc_m[-1], drive.arc_m[-6] = there - 300.0, there - 305.0
    assert closed_loop._route(drive, len(drive.arc_m) - 1) is None


def test_an_s_bends_to_both_sides():
    source = SyntheticSource(6, seed=9, mix={"s_curve": 1.0})
    for clip in source.clip_ids:
        sides = [side for start_us, side in source.drive(clip).turns if start_us < 11_000_000]
        assert sorted(sides) == ["left", "right"]


def test_a_strayed_car_drifts_evenly_and_returns_to_the_middle():
    source = SyntheticSource(12, seed=9, mix={"recovery": 1.0})
    strayed, askew = [], []
    for clip in source.clip_ids:
        drive = source.drive(clip)
        places = zip(drive.track.xyz[:, :2], drive.arc_m.tolist(), strict=True)
        arc, offset = np.array([lane_place(drive.road, xy, near_m=arc) for xy, arc in places]).T
        heading = 2 * np.arctan2(*drive.track.quaternion_xyzw[:, 2:].T)
        along = drive.road.points[:, 6] + drive.road.start_m
        across = heading - np.interp(arc, along, drive.road.points[:, 5])
        strayed.append(offset[102])
        askew.append(across[102])
        assert np.abs(offset[155:]).max() < 0.02
        assert np.ptp(np.diff(offset[72:82])) < 0.002, "evenly, until it turns back"
        speed = np.diff(drive.track.xyz[:, :2], axis=0)
        course = np.arctan2(speed[:, 1], speed[:, 0])
        assert np.abs(np.sin(course - (heading[1:] + heading[:-1]) / 2)).max() < 0.02
    assert max(strayed) > 0.7
    assert min(strayed) < -0.7
    assert np.std(askew) > 0.02
