"""The site: it builds, faults end the build, generated pages hold what the code and the results hold."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import benchmarks_page
import cli_reference
import pytest
from headless import Page
from markdown_pages import ROOT, anchors, blocks, headings, links, pages, prose

from alpacache.evaluation.config import EvalConfig, ProbeConfig
from alpacache.exporting.config import ExportConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.planning.config import PlanConfig
from alpacache.sources.config import CheckConfig, PrepareConfig
from alpacache.training.config import TrainConfig

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed; `make docs` builds the site")
import hooks

BUILD = """
import logging
import sys
from collections import Counter
logging.basicConfig()
from mkdocs.commands.build import build
from mkdocs.config import load_config
docs, site, plugins = sys.argv[1:]
options = {"plugins": plugins.split(",")} if plugins else {}
build(load_config("mkdocs.yml", docs_dir=docs, site_dir=site, strict=True, **options))
"""


def build(docs, site, plugins=""):
    command = [sys.executable, "-c", BUILD, str(docs), str(site), plugins]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.ci
def test_every_page_is_there_and_nothing_is_fetched(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    for page in ("changelog.html", "contributing.html"):
        assert (site / page).is_file()
    fetched = re.compile(r"""<(?:script|img)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="stylesheet"[^>]*href="https?:""")
    for file in site.rglob("*.html"):
        assert not fetched.search(file.read_text()), file


SEARCH = """new Promise(found => {
  const box = document.querySelector(".md-search__input");
  box.focus(); box.value = "quarantine"; box.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
  box.dispatchEvent(new Event("input", {bubbles: true}));
  const links = () => [...document.querySelectorAll(".md-search-result__link")].map(link => link.href);
  const look = setInterval(() => { if (links().length) { clearInterval(look); found(links()); } }, 50);
  setTimeout(() => found([]), 30000);
})"""


@pytest.mark.ci
def test_the_search_works_from_the_disk(site, browser):
    shown = Page(browser, (site / "how-to/drive.html").as_uri(), width=1280)
    found = shown.evaluate(SEARCH)
    assert any("resume-and-repair.html" in link for link in found), found
    assert shown.complaints == []
    shown.close()


@pytest.mark.ci
def test_the_site_has_every_option_every_key_and_the_newest_results(site):
    text = re.sub(r"<[^>]+>", "", (site / "reference/commands.html").read_text())
    for name, command in cli_reference.commands().items():
        assert f"alpacache {name}" in text
        assert [option for option in cli_reference.option_names(command) - {"-h", "--help"} if option not in text] == []
    text = re.sub(r"<[^>]+>", "", (site / "reference/config.html").read_text())
    settings = (CheckConfig, PrepareConfig, PlanConfig)
    for config in (*settings, ExtractConfig, TrainConfig, EvalConfig, ExportConfig, ProbeConfig):
        assert [field.name for field in dataclasses.fields(config) if f"\n{field.name}\n" not in text] == []
    assert "Peak learning rate. Default: 1e-4 for all parameters" in text
    results = (site / "reference/benchmarks.html").read_text()
    for result in benchmarks_page.read():
        assert f'id="{result.anchor}"' in results
        assert result.report["commit"] in results
    assert "public recipe's shape" in results.replace("&#39;", "'").replace("’", "'")
    assert 'href="../reference/benchmarks.html#' in (site / "explanation/store-rejected.html").read_text()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_table_is_cut_in_two(page):
    """A row behind an empty line begins a new table, and is plain text where no heads of one follow."""
    lines = ["", *prose(page).splitlines(), ""]
    begun = [place for place, line in enumerate(lines) if line[:1] == "|" and lines[place - 1][:1] != "|"]
    assert [lines[place] for place in begun if not lines[place + 1].startswith("| ---")] == []


@pytest.mark.ci
def test_faults_end_the_build(tmp_path):
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs")
    index = docs / "index.md"
    index.write_text(
        index.read_text() + "\n[a](nowhere.md) [b](glossary.md#nothing) [c](../benchmarks/bench_gone.py)\n"
    )
    (docs / "stray.md").write_text("# Nobody leads here\n")
    done = build(docs, tmp_path / "site", plugins="search")
    assert done.returncode != 0
    for fault in ("nowhere.md", "glossary.md#nothing", "bench_gone.py", "stray.md"):
        assert fault in done.stderr, done.stderr


def result(directory, name, **report):
    base = {"command": "python bench.py", "hardware": "Test GPU", "commit": "abc123", "notes": "", "rows": [{"x": 1}]}
    (directory / name).write_text(json.dumps(base | report))


def test_newer_results_take_the_place_of_older_ones(tmp_path):
    result(tmp_path, "speed_test-gpu_2026-01-02.json", commit="new", rows=[{"ms": 2.0, "batch": 8}, {"gone": None}])
    result(tmp_path, "speed_test-gpu_2026-01-01.json", commit="old", rows=[{"ms": 3.0}])
    result(tmp_path, "speed_other_2025-12-31.json", commit="other", rows=[{"ms": 4.0}])
    page = benchmarks_page.page(benchmarks_page.read(tmp_path))
    assert page.count("### speed") == 2
    assert "| ms | batch |" in page  # columns without a value are left out
    assert "| 2 | 8 |" in page
    assert "| 3 |" not in page
    assert "2026-01-01 at `old`" in page
    result(tmp_path, "speed_test-gpu_2026-01-03.json", commit="newest", rows=[{"ms": 1.0}])
    assert "| 1 |" in benchmarks_page.page(benchmarks_page.read(tmp_path))
    result(tmp_path, "no-date.json")
    with pytest.raises(ValueError, match=r"no-date.json: expected a name like"):
        benchmarks_page.read(tmp_path)


def end_to_end(cameras, medium, batch, samples_s, **more):
    return {"cameras": cameras, "medium": medium, "batch": batch, "samples_s": samples_s, "draws": 1} | more


def test_the_headline_is_against_the_recipe_of_the_same_run(tmp_path):
    old = [end_to_end(1, "recipe", 1, 4.0), end_to_end(1, "pinned", 16, 200.0, codec="int8", peak_gib=22.6)]
    new = [
        end_to_end(4, "recipe", 1, 2.0, peak_gib=35.0),
        end_to_end(4, "recipe", 8, 5.0, peak_gib=43.0),
        end_to_end(4, "pinned", 8, 100.0, codec="int8", peak_gib=19.7),
        end_to_end(4, "pinned", 8, None, codec="bf16", note="out of memory"),
        end_to_end(1, "recipe", 1, 3.0),
    ]
    result(tmp_path, "train_e2e_test-gpu_2026-01-01.json", rows=old, commit="old")
    result(tmp_path, "train_e2e_test-gpu_2026-01-02.json", rows=new, commit="new")
    table = benchmarks_page.headline(benchmarks_page.read(tmp_path))
    assert "| `train`, int8, RAM, page-locked | 8 | 1 | 100 | 50.0x / 20.0x | 19.7 GiB |" in table
    assert "**4 cameras, Test GPU, 2026-01-02, commit `new`**" in table
    assert "| `train`, int8, RAM, page-locked | 16 | 1 | 200 | 50.0x / 50.0x | 22.6 GiB |" in table
    assert "**1 camera, Test GPU, 2026-01-01, commit `old`**" in table
    assert "bf16" not in table


@pytest.mark.parametrize(
    ("link", "here", "page", "expected"),
    [
        ("../../benchmarks/results/a_b-c_2026-01-01.md", "docs/x", "x/p.md", "../reference/benchmarks.md#a-b-c"),
        ("../benchmarks/results", "docs", "p.md", "reference/benchmarks.md"),
        ("docs/glossary.md#words", "", "contributing.md", "glossary.md#words"),
        ("CHANGELOG.md", "", "contributing.md", "changelog.md"),
        ("../reference/commands.md#train", "docs/how-to", "how-to/p.md", "../reference/commands.md#train"),
        ("https://example.org/x.md", "docs", "p.md", "https://example.org/x.md"),
    ],
)
def test_links_that_leave_docs_are_led_to_the_site(link, here, page, expected):
    assert hooks.led_home(f"see [it]({link}).", here=here, page=page) == f"see [it]({expected})."
    fenced = f"```md\n[it]({link})\n```"
    assert hooks.led_home(fenced, here=here, page=page) == fenced


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_hold_in_the_repository_too(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading in {target.name}"


def test_the_japanese_readme_has_the_same_content():
    english, japanese = ROOT / "README.md", ROOT / "README.ja.md"
    assert [block.code for block in blocks(japanese)] == [block.code for block in blocks(english)]
    assert [level for level, _ in headings(japanese)] == [level for level, _ in headings(english)]
    mutual = {"README.md", "README.ja.md"}
    assert [link for link in links(japanese) if link not in mutual] == [
        link for link in links(english) if link not in mutual
    ]
    assert japanese.read_text().count("\n| ") == english.read_text().count("\n| ")


def test_the_japanese_readme_has_the_same_numbers():
    """In its prose and tables; small ones are words in one language and digits in the other."""
    english, japanese = (
        Counter(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)", "", prose(ROOT / name))))
        for name in ("README.md", "README.ja.md")
    )
    for counts in (english, japanese):
        for digit in map(str, range(10)):
            counts.pop(digit, None)
    assert japanese == english
