"""What stderr says: progress in a pipe, `--quiet` and `--verbose`, colours, nearest names."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from alpacache.errors import UsageError
from alpacache.progress import Progress
from cli import main, output, progress_bar

COLOUR = re.compile(rb"\x1b\[(?:[\d;]*;)?(?:3[0-8]|9[0-7])[\d;]*m")


def run(*arguments, cwd=None, code=0):
    done = subprocess.run([sys.executable, "-m", "cli.main", *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done


def in_a_terminal(*arguments, **environment):
    """What a terminal is sent on stderr."""
    ours, theirs = pty.openpty()
    settings = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    command = [sys.executable, "-m", "cli.main", *arguments]
    with subprocess.Popen(command, stderr=theirs, env=settings | {"TERM": "xterm-256color"} | environment) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                sent += (part := os.read(ours, 65536))
            except OSError:  # the other end is closed
                break
            if not part:
                break
    os.close(ours)
    assert process.returncode == 2
    return sent


def test_sentences_of_a_table_begin_at_the_left_and_numbers_end_at_the_right(capsys):
    reason = "where the film belongs in the log cannot be told from its turns, so say when its first frame was taken"
    output.print_table("dropped", [["1", "7.25", reason], ["12", "141.50", "too short"]], heads=["number", "s", "why"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["number       s  why", "1         7.25  " + reason[:103]]
    assert lines[-1] == "12      141.50  too short"


PREPARE = ("prepare", "synthetic:2", "--frames", "1")


@pytest.mark.system
def test_progress_in_a_pipe_is_plain_lines(tmp_path):
    command = [sys.executable, "-m", "cli.main", *PREPARE, "--out", str(tmp_path / "samples")]
    stderr = subprocess.run(command, capture_output=True, check=True).stderr.decode()  # as bytes: \r stays \r
    assert re.search(r"^prepare: 2/2 samples, [\d.e+]+ samples/s, ETA 0:00:00", stderr, re.M), stderr
    assert "\x1b" not in stderr
    assert "\r" not in stderr


@pytest.mark.parametrize(
    ("width", "shown", "bar"),
    [
        (200, "title bar done rate elapsed eta notes", 40),
        (110, "title bar done rate elapsed eta notes", 13),
        (90, "title bar done rate elapsed eta notes", 22),
        (60, "title done rate elapsed eta", 0),
        (45, "title done elapsed eta", 0),
        (40, "title done eta", 0),
        (31, "done eta", 0),
        (15, "done", 0),
    ],
)
def test_a_narrow_terminal_keeps_count_and_eta(width, shown, bar):
    texts = {"title": "extract", "done": "12/345 samples", "rate": "0.123 samples/s", "elapsed": "0:01:02"}
    notes = ["GB 0.12", "store 812/1000", "quarantined 2"]
    progress = Progress(done=12, total=345, unit="samples", rate=0.123, notes=dict(note.split(" ") for note in notes))
    parts, bar_width = progress_bar.fitting(texts | {"eta": "ETA 0:45:07"}, notes, width)
    assert (set(parts) | ({"bar"} if bar_width else set()), bar_width) == (set(shown.split()), bar)
    assert parts.get("notes", "") in ("", "GB 0.12", " ".join(notes))
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    with progress_bar.progress_bar(console) as line:
        done, rate, eta = output._texts(progress)
        texts = {"done": done, "rate": rate, "eta": eta}
        line.add_task("extract", total=345, completed=12, texts=texts, notes=output._notes(progress))
        console.print(line.get_renderable())
    *_, last = (
        part for part in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "\n", console.file.getvalue()).split("\n") if part.strip()
    )
    assert "…" not in last
    assert "12/345 samples" in last
    assert ("ETA 0:45:07" in last) == ("eta" in parts)
    assert len(last.rstrip()) <= width


def test_something_moves_before_the_first_progress():
    console = Console(width=60, force_terminal=True, color_system=None, file=io.StringIO())
    with progress_bar.progress_bar(console) as line:
        line.add_task("extract", total=None, texts={}, notes=[])
        console.print(line.get_renderable())
    text = console.file.getvalue()
    assert re.search(r"[\u2800-\u28ff] extract 0:00:00", text)


@pytest.mark.system
@pytest.mark.parametrize("place", ["before", "behind"])
def test_quiet_leaves_results_only(place, tmp_path):
    command = (*PREPARE, "--out", str(tmp_path / "samples"), "--json")
    done = run("--quiet", *command) if place == "before" else run(*command, "--quiet")
    assert done.stderr == ""
    assert '"samples": 2' in done.stdout


@pytest.mark.system
def test_quiet_keeps_errors_and_drops_notes(monkeypatch, capsys):
    assert "there is no store at" in run("info", "nowhere", "--quiet", code=2).stderr
    monkeypatch.setattr(output, "_verbosity", "quiet")
    output.note("drop me")
    with output.show_progress("work") as on_progress:
        on_progress(Progress(done=1, total=1, unit="samples", rate=1.0, notes={}))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(output, "_verbosity", "normal")
    output.note("keep me")
    assert capsys.readouterr().err == "note: keep me\n"


def test_refused_samples_are_counted_by_kind_with_the_first_reason_of_each():
    refused = [("a", "short_clip", "too short"), ("b", "no_sun", "dark"), ("c", "short_clip", "4 s")]
    assert output.reason_lines(refused) == [
        "3",
        "2 short_clip, the first: a: too short",
        "1 no_sun, the first: b: dark",
    ]
    assert output.reason_lines([]) == ["0"]


@pytest.mark.ci
def test_verbose_shows_where_an_error_comes_from():
    assert "Traceback" not in run("info", "nowhere", code=2).stderr
    stderr = run("info", "nowhere", "--verbose", code=2).stderr
    assert "Traceback" in stderr
    assert stderr.splitlines()[-1].startswith("alpacache: there is no store at")


def test_quiet_and_verbose_exclude_each_other():
    assert "exclude each other" in run("info", "nowhere", "--quiet", "--verbose", code=2).stderr


def test_no_color():
    assert COLOUR.search(in_a_terminal("trian"))
    assert not COLOUR.search(in_a_terminal("trian", NO_COLOR="1"))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train", "--stor", "s"), "--store"),
        (("extract", "pai", "--codecs", "int8"), "--codec"),
    ],
)
def test_nearest_names(arguments, hint):
    stderr = " ".join(run(*arguments, code=2).stderr.split())
    assert re.search(r"Did you mean|Possible options", stderr), stderr
    assert hint in stderr


TITLE, CLEAR, CSI, TURNED = "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202egnp.exe"


def test_what_is_not_printable_is_shown_escaped(monkeypatch, capsys):
    evil = f"a{TITLE}{CLEAR}{CSI}{TURNED}"
    told = r"a\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe"
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    output.guard_streams()
    output.note(evil)
    output.print_lines(evil, {evil: [evil, f"two\n{evil}"]})
    output.print_table("", [[evil]], heads=[""])
    output.print_json({evil: evil})
    with output.show_progress(evil) as on_progress:
        on_progress(Progress(done=1, total=1, unit="samples", rate=1.0, notes={"model": evil}))
    with pytest.raises(SystemExit):
        main._end_with(UsageError(f"sample {evil}\nsecond line"))
    found = capsys.readouterr()
    assert not {char for char in found.out + found.err if not char.isprintable()} - {"\n"}
    assert found.err.splitlines()[0] == f"note: {told}"
    assert found.err.splitlines()[-2:] == [f"alpacache: sample {told}", "second line"]
    assert f"two\\n{told}" in found.out


def test_log_messages_are_escaped_and_masked(tmp_path):
    code = "import logging; from cli import output; output.guard_streams(); output.set_verbosity('normal');"
    code += r"logging.getLogger('alpacache').warning('%s \x1b[2J %s', 's3://k:v@b', 'hf_abcdefghijklmnop')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING: s3://***@b \\x1b[2J ***\n"


@pytest.mark.ci
@pytest.mark.parametrize("broken", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_a_stderr_that_takes_nothing_ends_nothing(broken, tmp_path):
    command = f"{sys.executable} -m cli.main prepare synthetic:2 --frames 1 --out {tmp_path / 'samples'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {broken}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples/provenance.json").is_file()


@pytest.mark.ci
@pytest.mark.parametrize(("arguments", "code", "begins"), [("", 0, "WARNING"), ("--json", 1, "alpacache")])
def test_a_stdout_that_takes_nothing_fails_what_programs_wait_for_alone(arguments, code, begins, tmp_path):
    command = f"{sys.executable} -m cli.main --quiet prepare synthetic:2 --frames 1 --out {tmp_path / 'a'} {arguments}"
    done = subprocess.run(f"{command} >/dev/full", shell=True, capture_output=True, text=True)
    told = "the result could not be written to stdout (No space left on device); all else is done."
    assert (done.returncode, done.stderr) == (code, f"{begins}: {told}\n")
    assert (tmp_path / "a/provenance.json").is_file()


@pytest.mark.ci
def test_a_reader_that_has_seen_enough_ends_nothing(tmp_path):
    command = f"{sys.executable} -m cli.main --quiet prepare synthetic:2 --frames 1 --out {tmp_path / 'a'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path):
    code = "import os, sys; from cli import output; output.guard_streams(); print(1); print(2, file=sys.stderr);"
    code += f"os._exit(os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT) < 3)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code])
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_numbers_stay_whole_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    numbers = [f"{number}.{number}{number}{number}" for number in range(1, 9)]
    output.print_table("t", [["all", "1234", "constant turn rate", *numbers]], heads=["stratum", *"abcdefghij"])
    printed = capsys.readouterr().out
    assert all(number in printed.split() for number in numbers)
    assert len(printed.splitlines()) < 12


def test_lines_end_where_their_text_ends(capsys):
    output.print_lines("store s", {"samples": "3", "cameras": "one, two"})
    output.print_table("numbers", [["a", "1"], ["b", "22"]], heads=["model", "minADE"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["store s", "samples  3"]
    assert not [line for line in lines if line != line.rstrip()]


def test_json_stays_json_where_secrets_are_masked(capsys):
    output.print_json({"error": 'no "https://u:p@h/x?key=a" there', "store": 'MY_KEY="a"', "out": ['TOKEN="b"']})
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"error": 'no "https://***@h/x?***" there', "store": 'MY_KEY="***"', "out": ['TOKEN="***"']}
