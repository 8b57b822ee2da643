"""Writers killed with SIGKILL before every single operation on the file system, in the middle of every write."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache_store import CacheReader, CacheWriter, Field, verify

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
import pytest
from cache_store import CacheWriter, Field

fields = [
    Field(name="x", dtype="int16", axes=("i", "j"), chunk_mb=0.0001),
    Field(name="n", dtype="int64", layout="packed"),
    Field(name="t", dtype="str", layout="text"),
]
done = 0

def kill_at(step):
    def wrap(name):
        real = getattr(os, name)
        def counted(*args, **kwargs):
            global done
            done += 1
            if done == step:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, counted)
    for name in ("mkdir", "open", "write", "fsync", "link", "unlink"):
        wrap(name)

acknowledged = []
for step in range(1, 10_000):
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        say = os.write
        kill_at(step)
        with CacheWriter(Path(sys.argv[1]) / str(step), fields=fields, identity={"a": 1}) as writer:
            for name in "ab":
                values = {"x": np.full((9, 10), ord(name), np.int16), "n": np.array(ord(name)), "t": name}
                assert writer.write(name, values)
                say(send, name.encode())
        os._exit(0)
    os.close(send)
    _, status = os.waitpid(child, 0)
    acknowledged.append(os.read(receive, 100).decode())
    os.close(receive)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(json.dumps(acknowledged))
"""


@pytest.mark.ci
def test_a_killed_writer_leaves_nothing_that_must_be_mended(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    acknowledged = json.loads(ran.stdout)
    assert len(acknowledged) > 100
    assert acknowledged[-1] == "ab"
    fields = [
        Field(name="x", dtype="int16", axes=("i", "j"), chunk_mb=0.0001),
        Field(name="n", dtype="int64", layout="packed"),
        Field(name="t", dtype="str", layout="text"),
    ]

    def check(path: Path, names: str) -> None:
        reader = CacheReader(path)
        assert set(names) <= set(reader.sample_ids) <= set("ab")
        for name in reader.sample_ids:
            values = reader.read(name)
            assert values["x"].tolist() == np.full((9, 10), ord(name)).tolist()
            assert (values["n"].item(), values["t"].item()) == (ord(name), name)

    for step, names in enumerate(acknowledged, 1):
        path = tmp_path / str(step)
        if (path / "zarr.json").exists():
            check(path, names)
            assert verify(path, deep=True).ok
        else:
            assert names == ""
        with CacheWriter(path, fields=fields, identity={"a": 1}) as writer:
            for name in "ab":
                values = {"x": np.full((9, 10), ord(name), np.int16), "n": np.array(ord(name)), "t": name}
                assert writer.write(name, values) or writer.is_committed(name)
        check(path, "ab")


RACE = """
import sys
import numpy as np
import pytest
from cache_store import CacheWriter, Field
seed = int(sys.argv[2])
with CacheWriter(sys.argv[1], fields=[Field(name="x", dtype="int64", axes=("i",))], identity={}) as writer:
    order = np.random.default_rng(seed).permutation(30)
    print(*(i for i in order if writer.write(f"s{i}", {"x": np.full(1000, seed * 100 + i)})))
"""


def test_racing_processes_commit_each_sample_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "s")]
    runs = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(3)]
    wins = [[int(item) for item in run.communicate()[0].split()] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sorted(i for won in wins for i in won) == list(range(30))
    reader = CacheReader(tmp_path / "s")
    for seed, won in enumerate(wins):
        for i in won:
            assert reader.read(f"s{i}")["x"].tolist() == [seed * 100 + i] * 1000
