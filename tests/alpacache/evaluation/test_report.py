"""The page: self-contained, safe against hostile ids, small for a thousand samples, and working in a browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from headless import Browser, Page
from PIL import Image

from alpacache.driving.strata import LATE_CURVE, classify
from alpacache.evaluation.judging import SampleResult, judge, judge_baselines
from alpacache.evaluation.report import write_report
from alpacache.evaluation.summary import summarise

pytestmark = pytest.mark.system

HISTORY_XYZ = np.stack([np.arange(-15.0, 1.0), np.zeros(16), np.zeros(16)], axis=-1)
HISTORY_ROT = np.broadcast_to(np.eye(3), (16, 3, 3))
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}&quot;"


def arc(turn_rate_degps: float) -> tuple[np.ndarray, np.ndarray]:
    yaw = np.deg2rad(turn_rate_degps) * 0.1 * np.arange(1, 65)
    rot = np.zeros((64, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1], rot[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1.0
    return np.cumsum(np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], axis=-1), axis=0), rot


def front(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (160, 320, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, format="JPEG", quality=60)
    return out.getvalue()


def result(number: int, turn_rate_degps: float, paths: int = 2) -> SampleResult:
    xyz, rot = arc(turn_rate_degps)
    models = {}
    for label, share in (("before", 0.2), ("after", 0.9)):
        each = [arc(share * turn_rate_degps + sway) for sway in np.linspace(-0.5, 0.5, paths)]
        models[label] = judge(np.stack([one[0] for one in each]), np.stack([one[1] for one in each]), xyz, rot)
    return SampleResult(
        sample_id=f"clip-{number}@5100000#0",
        clip_id=f"clip-{number}",
        truth_xyz=xyz,
        truth_rot=rot,
        history_xyz=HISTORY_XYZ,
        history_rot=HISTORY_ROT,
        front_jpeg=front(number),
        strata=classify(HISTORY_XYZ, HISTORY_ROT, xyz, rot),
        models=models | judge_baselines(HISTORY_XYZ, HISTORY_ROT, xyz, rot),
    )


@pytest.fixture(scope="module")
def results() -> list[SampleResult]:
    return [result(i, float(rate)) for i, rate in enumerate(np.linspace(-8.0, 8.0, 40))]


class Elements(HTMLParser):
    """Start tags with their attributes, and the text inside the data element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._in_data = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


def write(results: list[SampleResult], path: Path) -> str:
    write_report(summarise(results), results, path, losses={})
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(results: list[SampleResult], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(results, tmp_path_factory.mktemp("page") / "report.html")


def test_page_holds_the_numbers_and_every_sample(results: list[SampleResult], page: str) -> None:
    summary = summarise(results)
    data = json.loads(Elements(page).data)

    assert f"{summary.strata['all'].metrics['after']['min_ade']:.2f}" in page
    slope = summary.strata["all"].bias["before"]["heading"][6.4]
    assert slope is not None
    assert f"{slope.slope:.2f}" in page
    missed = summary.strata["all"].differences["after"]["miss_rate"]
    assert missed is not None
    assert f"{100 * missed.estimate:+.1f} points<br>" in page
    assert [model["label"] for model in data["models"]] == [
        "before",
        "after",
        "constant velocity",
        "constant turn rate",
    ]
    assert {sample["id"] for sample in data["samples"]} == {one.sample_id for one in results}
    errors = [sample["errors"][1] for sample in data["samples"]]
    assert errors == sorted(errors, reverse=True), "worst of the last model first"
    worst = next(one for one in results if one.sample_id == data["samples"][0]["id"])
    assert data["samples"][0]["truth"][-2:] == [round(10 * float(value)) for value in worst.truth_xyz[-1, :2]]


def test_page_says_what_is_wrong_with_a_model_and_that_less_than_1_is_no_bias(page: str) -> None:
    headline = page[page.index('<section id="headline">') : page.index('<section id="bias">')]

    told = r"<strong>before</strong> on all 40 samples: <strong>biased</strong>. It takes 0\.20 .* and knows more"
    assert re.search(told, headline)
    assert headline.count("<strong>biased</strong>") == headline.count("<strong>takes the turn</strong>") == 2
    assert "calibration" in headline
    assert "unbiased" not in page
    assert "<th scope=\"col\"><button type='button'>calibration</button></th>" in page


def test_page_fetches_nothing(page: str) -> None:
    elements = Elements(page)

    sources = [attrs["src"] or "" for _, attrs in elements.tags if "src" in attrs]
    links = [attrs["href"] or "" for _, attrs in elements.tags if "href" in attrs]
    assert len(sources) >= 2 + 2 * 9
    assert all(source.startswith("data:image/") for source in sources)
    assert links == ["data:,"]
    policy = [attrs["content"] or "" for tag, attrs in elements.tags if tag == "meta" and "http-equiv" in attrs]
    assert policy[0].startswith("default-src 'none'")


def test_gallery_shows_moving_samples_of_each_kind_once(results: list[SampleResult], tmp_path: Path) -> None:
    standing = replace(
        results[0], sample_id="standing", strata=replace(results[0].strata, speed="stopped"), clip_id="clip-standing"
    )
    page = write([*results, standing], tmp_path / "report.html")
    gallery = page[page.index('<section id="gallery">') : page.index('<section id="samples">')]

    assert re.findall(r'class="tag">(\w+)', gallery) == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    ids = re.findall(r"<h3>([^<]+)</h3>", gallery)
    assert len(set(ids)) == 9
    assert "standing" not in ids
    assert len(re.findall(r'class="tag">(\w+)', write(results[:2], tmp_path / "two.html"))) == 2


def test_hostile_ids_and_labels_stay_text(results: list[SampleResult], tmp_path: Path) -> None:
    evil = [
        replace(
            one, sample_id=one.sample_id + HOSTILE, models={HOSTILE: one.models["after"], "z": one.models["before"]}
        )
        for one in results[:12]
    ]

    page = write(evil, tmp_path / "report.html")

    assert page.count("<script>") == 1
    assert "<img src=x" not in page
    elements = Elements(page)
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert not any("onerror" in attrs for _, attrs in elements.tags)
    assert json.loads(elements.data)["samples"][0]["id"].endswith(HOSTILE)


def test_unreadable_front_frame_is_said(results: list[SampleResult], tmp_path: Path) -> None:
    damaged = [replace(one, front_jpeg=one.front_jpeg[:50] if one.front_jpeg else None) for one in results[:9]]
    page = write(damaged, tmp_path / "report.html")
    assert page.count("The stored front frame cannot be read.") == 9
    assert "data:image/jpeg" not in Elements(page).data


@pytest.mark.ci
def test_a_thousand_samples_stay_below_ten_megabytes(results: list[SampleResult], tmp_path: Path) -> None:
    six = [result(i, float(rate), paths=6) for i, rate in enumerate(np.linspace(-8.0, 8.0, 10))]
    thousand = [
        replace(six[i % 10], sample_id=f"0123456789abcdef-0123456789abcdef-{i}@5100000#0", clip_id=f"c{i}")
        for i in range(1000)
    ]

    page = write(thousand, tmp_path / "report.html")

    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    data = json.loads(Elements(page).data)
    assert len(data["samples"]) == 1000
    with_front = [("front" in sample) for sample in data["samples"]]
    assert with_front[0]
    assert not with_front[-1], "front frames end with their budget"
    with Image.open(io.BytesIO(base64.b64decode(data["samples"][0]["front"]))) as image:
        assert image.size == (300, 150)


PROBE = """<script>
document.querySelector('[data-stratum=sharp]').click();
const rows = [...document.querySelectorAll('#samples tbody tr')];
const seen = rows.filter(row => !row.hidden).length;
const table = document.querySelector('#samples table');
table.tHead.rows[0].cells[3].click();
const values = [...table.tBodies[0].rows].map(row => Number(row.cells[3].dataset.value));
rows[5].click();
const open = document.getElementById('detail').open;
const lines = () => document.querySelectorAll('#detail-view polyline').length;
const before = lines();
document.querySelector('#detail-models input').click();
document.title = JSON.stringify({seen, sorted: values.every((v, i) => i === 0 || values[i - 1] <= v), open,
  before, after: lines(), front: document.getElementById('detail-front').naturalWidth});
</script></body>"""


def test_filter_sort_and_detail_work_in_chromium(results: list[SampleResult], page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on the path; Debian's package `chromium` provides it")
    (tmp_path / "probe.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    sharp = summarise(results).strata["sharp"].samples
    flags = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--dump-dom", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")

    done = subprocess.run(
        [browser, *flags, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=180, check=True
    )

    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found == {
        "seen": sharp,
        "sorted": True,
        "open": True,
        # History, truth, two paths of each of two models, one of each of two baselines; then one model fewer.
        "before": 8,
        "after": 6,
        "front": found["front"],
    }


WINDOWS = [(1280, False, "screen"), (1280, True, "screen"), (390, False, "screen"), (390, True, "screen")]


@pytest.mark.parametrize(("width", "dark", "medium"), [*WINDOWS, (1040, True, "print")])
def test_it_is_whole_and_readable(
    results: list[SampleResult], browser: Browser, tmp_path: Path, width: int, dark: bool, medium: str
) -> None:
    write(results, tmp_path / "report.html")

    shown = Page(browser, (tmp_path / "report.html").as_uri(), width=width, dark=dark, medium=medium)
    found = shown.layout()

    assert shown.complaints == []
    assert (found["cut"], found["width"], found["faint"]) == ([], 0, [])
    assert found["hole"] < 120
    if width >= 1280 or medium == "print":
        assert [name for name in found["scrolled"] if name != "DIV.card samples"] == []
    shown.close()


def test_a_stratum_has_one_name(page: str, results: list[SampleResult]) -> None:
    text = re.sub("<[^>]+>", "", page.split("<script")[0])
    assert all(name in text for name in ("curve after t0 (", "turn taken, curve after t0"))
    assert "straight history, curve after t0" not in text
    assert LATE_CURVE not in " ".join(summarise(results).warnings)
