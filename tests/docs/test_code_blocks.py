"""Code in the documentation: Python runs, commands exist with these options, configs are accepted."""

import contextlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import patch

import cli_reference
import pytest
from markdown_pages import ROOT, blocks, pages, prose

import alpacache
from alpacache.alpamayo.families import FAMILIES
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.config import read_toml
from alpacache.demo.story import make_demo_checkpoint
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.pictures.front_view import project
from alpacache.prefix.codecs import TENSOR_CODECS
from alpacache.training.config import TrainConfig
from cache_store import CODECS
from cache_store.kv.registry import KINDS

SHELL = [block for page in pages() for block in blocks(page, "sh", "bash", "shell")]
WHOLE = ROOT / "docs/how-to/camera-study.md"
"""A page whose blocks of both kinds go on from each other, and take too long for more than one test."""
ELSEWHERE = ROOT / "docs/how-to/closed-loop.md"
"""A page whose Python runs in another project's environment; `test_closed_loop.py` runs it with stand-ins."""
PYTHON_PAGES = [page for page in pages() if blocks(page, "python") and page not in (WHOLE, ELSEWHERE)]
ONE_PROGRAM = {"add-a-codec.md", "add-a-model.md", "your-own-head.md"}
"""Pages whose Python blocks go on from each other."""
FOREIGN = {
    *("--repo-type", "--local-dir", "--include"),  # hf download
    *("--no-python", "--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
    *(
        "--array",
        "--gres",
        "--ntasks-per-node",
        "--cpus-per-task",
        "--mem",
        "--nodes",
        "--requeue",
        "--signal",
        "--time",
    ),
    *("--dependency", "--strict", "--system-site-packages", "--quick", "--import-mode"),
    *("--commit", "--note", "--cases"),  # benchmarks
}


def commands_of(code):
    """Each simple command of a shell script as words."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        words = shlex.split(line.replace("$(", "( ").replace(";", " ; "), comments=True)
        command = []
        for word in [*words, ";"]:
            if word in ("&&", "||", "|", ";", "&", "do", "then"):
                if command:
                    yield command
                command = []
            elif not (not command and re.fullmatch(r"[A-Z_]+=.*", word)):
                command.append(word)


def parse(arguments):
    """What `alpacache ARGUMENTS` would complain about, short of running it."""
    known = cli_reference.commands()
    arguments = [word for word in arguments if word not in {"--quiet", "--verbose", "--version"}]
    if not arguments:
        return
    name, *rest = arguments
    assert name in known, f"there is no command {name}"
    if not {"-h", "--help"} & set(rest):
        rest = [word for word in rest if word not in (">", "2>&1", "&")]
        known[name].make_context(name, rest)


@pytest.mark.system
@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_name_what_exists(block):
    syntax = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert syntax.returncode == 0, syntax.stderr
    for words in commands_of(block.code):
        if "alpacache" in words and words[0] not in ("git", "cd", "pip"):
            parse(words[words.index("alpacache") + 1 :])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        elif words[0] == "python" and words[1].startswith("docs/"):
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "make":
            targets = re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert [word for word in words[1:] if "=" not in word and word not in targets] == [], words


def test_a_wrong_option_is_found():
    for wrong in (["train", "--stores", "x"], ["trian"], ["extract", "pai"]):
        with pytest.raises(Exception, match=r"(?i)no such|no command|missing"):
            parse(wrong)
    parse(["plan", "--samples", "10"])


@pytest.mark.system
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_the_text_exist(page):
    if page.name == "CHANGELOG.md":
        return  # it may speak of what is gone
    text, known = prose(page), cli_reference.commands()
    every = set().union(*map(cli_reference.option_names, known.values()), cli_reference.global_options())
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        if words[0] == "alpacache" and len(words) > 1 and words[1] in known:
            mine = cli_reference.option_names(known[words[1]]) | cli_reference.global_options()
        else:
            mine = every | FOREIGN
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        assert [option for option in options if option not in mine | FOREIGN] == [], code


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_dotted_names_exist(page):
    if page.name != "CHANGELOG.md":
        for name in set(re.findall(r"\b(?:alpacache|cache_store)(?:\.[A-Za-z_]\w*)+", page.read_text())):
            pkgutil.resolve_name(name)


def test_configs_are_accepted(tmp_path):
    found = [block for page in pages() for block in blocks(page, "toml")]
    assert found
    for block in found:
        assert tomllib.loads(block.code)
        (tmp_path / "train.toml").write_text(block.code)
        TrainConfig(**read_toml(tmp_path / "train.toml", TrainConfig))


def test_json_is_json():
    for block in (block for page in pages() for block in blocks(page, "json")):
        if not re.search(r"[\[{]\.\.\.[\]}]", block.code):
            json.loads(block.code)


def test_the_calibration_of_the_page_on_own_data_projects():
    (block,) = blocks(ROOT / "docs/how-to/own-data.md", "json")
    pixel = project([[11.8, 0.0, 0.5], [11.8, 1.0, 0.5]], json.loads(block.code)["camera_front_wide_120fov"])
    assert pixel.tolist() == [[960.0, 640.0], [860.0, 640.0]]  # 10 m ahead and 1 m below the camera; 1 m to the left


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """What the pages' shell blocks would have made before the Python blocks: a tiny model, stores, an evaluation."""
    root = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(root):
        make_tiny_checkpoint(root / "tiny")
        common = {"model": "tiny", "device": "cpu"}
        alpacache.extract(ExtractConfig(source="synthetic:2", store="cache/all", frames=1, **common))
        alpacache.extract(ExtractConfig(source="synthetic:1", store="cache/train", frames=1, **common))
        for label in ("one", "head"):
            settings = {"stores": ("cache/all",), "out": f"runs/{label}", "steps": 1, "batch_size": 2}
            alpacache.train(TrainConfig(trainable="head", track="none", **settings, **common))
        settings = {"checkpoint": "runs/one", "compare": {"head": "runs/head"}, "paths": 2, "flow_steps": 2}
        alpacache.evaluate(EvalConfig(store="cache/all", out="eval/both", **settings, **common))
        run_python(blocks(ROOT / "docs/how-to/own-data.md", "python")[0].code)
        drives = ExtractConfig(source="folder:my_drives", store="cache/pilot", samples=10, t0="every:2.0", **common)
        alpacache.extract(drives)
    return root


def extract_synthetic(code):
    """The stores of generated drives that a shell block makes."""
    from cli.main import app

    for words in commands_of(code):
        if words[:2] == ["alpacache", "extract"] and words[2].startswith("synthetic:"):
            app(words[1:], standalone_mode=False)


def run_python(code):
    """Run a block; its last line of output must be what a closing comment says."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})
    last = code.strip().splitlines()[-1]
    if last.startswith("# "):
        assert out.getvalue().splitlines()[-1] == last.removeprefix("# ")
    return out.getvalue()


@pytest.fixture
def registries():
    """What pages register is forgotten afterwards."""
    with contextlib.ExitStack() as stack:
        for registry in (KINDS, CODECS, TENSOR_CODECS, FAMILIES):
            stack.enter_context(patch.dict(registry))
        yield


@pytest.mark.ci
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, workplace, registries):
    with contextlib.chdir(workplace):
        if page.name in ONE_PROGRAM:
            run_python("\n".join(block.code for block in blocks(page, "python")))
            return
        for block in blocks(page, "sh", "python"):
            if block.language == "sh":
                extract_synthetic(block.code)
            elif "write_clip(root" not in block.code:  # that one has made my_drives for the workplace
                run_python(block.code)


def test_what_a_closing_comment_promises_is_compared():
    with pytest.raises(AssertionError):
        run_python("print(1 + 1)\n# 3\n")
    assert run_python("print(1 + 1)\n# 2\n") == "2\n"


@pytest.mark.slow
def test_the_camera_study_runs(tmp_path, monkeypatch):
    """All of it that is of the generated world, with fewer drives and steps."""
    make_demo_checkpoint(tmp_path / "demo" / "Demo-R1")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    monkeypatch.chdir(tmp_path)
    for block in blocks(WHOLE, "sh", "python"):
        code = block.code.replace("synthetic:300", "synthetic:60")
        code = code.replace("--steps 150", "--steps 2").replace("--warmup 20", "--warmup 1")
        if block.language == "python":
            run_python(code)
        elif "nvidia/" not in code:
            script = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(script, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stderr}"
    for name in ("ladder", "ladder-sharp"):
        judged = json.loads(Path(f"study/{name}/eval.json").read_text())
        assert judged["summary"]["models"] == ["base", "trained", "n32", "n128"]
    assert Path("sharp.txt").read_text().splitlines()
    assert Path("study/sheet/sheet.png").is_file()


OFFLINE = ("index", "how-to/own-data", "how-to/resume-and-repair", "how-to/export", "how-to/brain-or-hands")
MAKE_TINY = "python -m alpacache.alpamayo.tiny_checkpoint tiny\n"
OFFLINE += ("how-to/several-machines", "how-to/compare-checkpoints", "how-to/reasoning")


@pytest.mark.slow
def test_shell_blocks_that_need_no_network_run(tmp_path):
    """In the order in which the pages go on from each other."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (tmp_path / "convert.py").write_text(blocks(ROOT / "docs/how-to/own-data.md", "python")[0].code)
    for page in OFFLINE:
        for block in blocks(ROOT / f"docs/{page}.md", "sh"):
            if re.search(r"nvidia/|\bhf |\bpip |\bmake |--epochs", block.code):
                continue
            code = block.code.replace(MAKE_TINY, "") if (tmp_path / "tiny").exists() else block.code
            script = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stderr}"
