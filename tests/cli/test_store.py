"""`info`, `verify` and `clean` over a store with damage and leftovers; the store's own tests hold the numbers."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from cache_store import CacheReader, CacheWriter, Field


@pytest.fixture
def store(tmp_path):
    fields = [Field(name="kv", dtype="uint8", axes=("i",)), Field(name="n", dtype="int8", layout="packed")]
    with CacheWriter(tmp_path / "store", fields=fields, identity={"model": {"id": "tiny"}}) as writer:
        for name in "abc":
            writer.write(f"{name}@1#0", {"kv": np.full(100, ord(name), np.uint8), "n": np.array(1, np.int8)})
    return tmp_path / "store"


def flip(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def test_damage_is_set_aside_put_back_and_dropped(store, run_here):
    chunk = next(store.glob("samples/b_*/kv/c.0"))
    flip(chunk)
    said = run_here("verify", store, "--deep", "--repair", code=1)
    assert "set 1 damaged records aside; run `alpacache extract` again" in said.stderr
    assert "b@1#0" in said.stdout
    assert len(CacheReader(store)) == 2
    report = json.loads(run_here("verify", store, "--deep", "--json").stdout)
    assert (report["damaged"], report["unreadable"], report["set_aside"], report["orphans"]) == ([], [], 1, [])
    flip(chunk)
    assert "put back" in run_here("verify", store, "--restore").stdout
    assert len(CacheReader(store)) == 3
    flip(chunk)
    run_here("verify", store, "--deep", "--repair", code=1)
    assert json.loads(run_here("clean", store, "--min-age", 0, "--json").stdout)["attempts"] == []
    assert len(json.loads(run_here("clean", store, "--min-age", 0, "--set-aside", "--json").stdout)["attempts"]) == 1
    assert not chunk.exists()
    assert json.loads(run_here("verify", store, "--deep", "--json").stdout)["set_aside"] == 0


def test_leftovers_are_counted_and_collected(store, run_here):
    attempt = next(store.glob("samples/a_*"))
    left = attempt.with_name(f"{attempt.stem}.{'0' * 16}")
    shutil.copytree(attempt, left)
    (store / "staging" / "temporary").write_bytes(b"x")
    said = run_here("verify", store)
    assert "1, and 1 temporary files" in said.stdout
    assert "`alpacache clean` removes what killed writers left" in said.stderr
    assert "0 attempts and 0 temporary files" in run_here("clean", store).stdout  # not a day old
    then = time.time() - 2 * 24 * 3600
    for path in (left, *left.rglob("*"), store / "staging" / "temporary"):
        os.utime(path, (then, then))
    assert "would remove" in run_here("clean", store, "--min-age", 0, "--dry-run").stdout
    assert left.exists()
    assert "1 attempts and 1 temporary files" in run_here("clean", store, "--min-age", 0).stdout
    assert not left.exists()
    assert len(CacheReader(store)) == 3


def test_a_damaged_record_is_shown_beside_the_samples(store, run_here):
    record = next(store.glob("commits/c_*"))
    record.write_bytes(record.read_bytes()[:-30])
    said = run_here("info", store).stdout
    assert "2 (" in said
    assert "1 more samples, whose commit records cannot be read" in said
    assert "'c@1#0'" in said
