"""The threads around the VLM: order, bounds, and what an error leaves behind."""

import gc
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from alpacache.extraction.pipeline import (
    Waits,
    Writers,
    groups,
    read_ahead,
)
from alpacache.gpu.host_copies import HostCopies
from cache_store import CacheReader, CacheWriter, Field, StoreFullError

FIELDS = [Field(name="kv", dtype="uint8", axes=("byte",), units="1"), Field(name="n", dtype="int64", axes=(), units="")]


def each(make):
    """Makes one item of a stretch as any other."""
    return lambda stretch: nullcontext(make)


def alone(items):
    return [[item] for item in items]


def test_single_items_come_in_order_with_their_own_errors():
    def make(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        if number == 4:
            raise KeyError(number)
        return 10 * number

    found = []
    for number, future in read_ahead(alone(range(9)), each(make), workers=3, ahead=3):
        found.append((number, "error" if future.exception() else future.result()))
    assert found == [(n, "error" if n == 4 else 10 * n) for n in range(9)]


def test_items_of_stretches_come_as_they_are_ready():
    """Nothing waits for a slow one."""

    def make(number):
        time.sleep(0.3 if number == 0 else 0)

    found = [number for number, _ in read_ahead([range(2), range(2, 5)], each(make), workers=2, ahead=9)]
    assert found == [2, 3, 4, 0, 1]


def test_a_stretch_is_made_by_one_thread_in_its_order():
    begun, ended, threads = [], [], {}

    @contextmanager
    def one_pass(stretch):
        begun.append(stretch)
        made = []

        def make(item):
            made.append(item)
            threads.setdefault(stretch[0], set()).add(threading.get_ident())
            return list(made)

        yield make
        ended.append(stretch)

    stretches = [range(10 * number, 10 * number + 5) for number in range(7)]
    found = {item: future.result() for item, future in read_ahead(stretches, one_pass, workers=3, ahead=4)}
    assert begun == stretches
    assert sorted(ended, key=min) == stretches
    assert found == {item: list(stretch[: place + 1]) for stretch in stretches for place, item in enumerate(stretch)}
    assert all(len(each) == 1 for each in threads.values())


def test_a_pass_is_closed_when_its_consumer_leaves():
    begun, ended = [], []

    @contextmanager
    def one_pass(stretch):
        begun.append(min(stretch))
        try:
            yield str
        finally:
            ended.append(min(stretch))

    ahead = read_ahead([range(50), range(50, 100)], one_pass, workers=2, ahead=3)
    next(ahead)
    ahead.close()
    assert sorted(begun) == sorted(ended) != []


@pytest.mark.parametrize("where", ["one_pass", "begin"])
def test_what_no_item_is_to_blame_for_ends_it_at_once(where):
    def refuse(*_):
        raise OSError("no such thread")

    named = {"begin": refuse} if where == "begin" else {}
    ahead = read_ahead(alone(range(9)), each(str) if named else refuse, workers=2, ahead=5, **named)
    with pytest.raises(OSError, match="no such thread"):
        list(ahead)


def test_each_reading_thread_begins_once():
    begun = []
    found = [
        future.result()
        for _, future in read_ahead(
            alone(range(20)),
            each(lambda number: number),
            workers=3,
            ahead=5,
            begin=lambda: begun.append(threading.current_thread().name),
        )
    ]
    assert sorted(found) == list(range(20))
    assert len(begun) == len(set(begun)) == 3


def test_readers_wait_for_their_consumer():
    begun = []
    ahead = read_ahead([range(50), range(50, 100)], each(begun.append), workers=2, ahead=6)
    for taken in range(1, 20):
        next(ahead)
        time.sleep(0.002)
        assert len(begun) <= taken + 5
    ahead.close()
    assert len(begun) <= 25


@pytest.mark.ci
def test_what_was_read_is_not_kept():
    class Read:
        pass

    alive = weakref.WeakSet()

    def make(number):
        one = Read()
        alive.add(one)
        return one

    most = 0
    for number, future in read_ahead([range(8), range(8, 15)], each(make), workers=2, ahead=5):
        future.result()
        del future
        gc.collect()
        most = max(most, len(alive))
        assert number >= 0
    assert 1 <= most <= 5


def test_waiting_is_counted_by_what_was_waited_for():
    def items():
        time.sleep(0.02)
        yield 1
        time.sleep(0.02)

    waits = Waits()
    for item in waits.timed("read", items()):
        assert item == 1
        time.sleep(0.05)
    with waits.of("write"):
        time.sleep(0.01)
    shares = waits.shares(1.0)
    assert shares["read"] >= 0.04
    assert shares["write"] >= 0.01
    assert waits.shares(2.0)["read"] == shares["read"] / 2
    assert Waits().shares(0.0) == {"read": 0.0, "write": 0.0}


def test_equal_items_are_grouped_in_order():
    assert list(groups(range(10), length=lambda _: 100, size=lambda: 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(groups(range(3), length=lambda _: 100, size=lambda: 1)) == [[0], [1], [2]]


def test_groups_are_of_nearly_equal_length_and_leave_none_behind():
    lengths = [100, 106, 300, 101, 301, 99, 302, 320, 100, 100]
    found = list(groups(range(10), length=lengths.__getitem__, size=lambda: 4))
    assert sorted(item for group in found for item in group) == list(range(10))
    for group in found:
        assert all(abs(lengths[item] - lengths[group[0]]) * 16 <= lengths[group[0]] for item in group)
        assert len(group) <= 4
    assert found[:2] == [[0, 1, 3, 5], [2, 4, 6]]


def test_groups_take_no_more_than_their_window_and_a_new_size_at_once():
    taken, size = [], 4

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    found = groups(items(), length=lambda _: 1, size=lambda: size)
    next(found)
    assert len(taken) == 7
    size = 1
    assert [next(found) for _ in range(4)] == [[4], [5], [6], [7]]
    assert len(taken) == 8


def sample(number, size=1000):
    return f"s{number}", {"kv": torch.full((size,), number, dtype=torch.uint8), "n": np.asarray(number)}


class SlowWriter(CacheWriter):
    """Notes how many samples it has in hand."""

    def __init__(self, path, *, refuse=(), wait_s=0.01):
        super().__init__(path, fields=FIELDS, identity={})
        self.refuse, self.wait_s = refuse, wait_s
        self.in_hand, self.most, self.lock = 0, 0, threading.Lock()
        self.written = []

    def write(self, sample_id, values):
        with self.lock:
            self.in_hand += 1
            self.most = max(self.most, self.in_hand)
        time.sleep(self.wait_s)
        try:
            if sample_id in self.refuse:
                raise StoreFullError(f"no room for {sample_id}", 1000)
            won = super().write(sample_id, values)
            self.written.append(sample_id)
            return won
        finally:
            with self.lock:
                self.in_hand -= 1


def test_writers_commit_what_they_are_given_and_count_their_bytes(tmp_path):
    writer = SlowWriter(tmp_path / "store")
    writer.write(*[part if isinstance(part, str) else {**part, "kv": part["kv"].numpy()} for part in sample(3)])
    sizes = []
    with HostCopies(torch.device("cpu"), 5) as copies, Writers(writer, copies, threads=3) as writers:
        for number in range(12):
            writers.put(*sample(number))
            sizes += writers.collect()
        sizes += writers.collect(everything=True)
    assert sorted(sizes) == [0] + [1008] * 11
    assert 2 <= writer.most <= 3
    reader = CacheReader(tmp_path / "store")
    for number in range(12):
        assert (reader.read(f"s{number}")["kv"] == number).all()


def test_put_waits_for_slow_writers(tmp_path):
    writer = SlowWriter(tmp_path / "store", wait_s=0.02)
    with HostCopies(torch.device("cpu"), 4) as copies, Writers(writer, copies, threads=2) as writers:
        for number in range(20):
            writers.put(*sample(number))
            writers.collect()
            assert number + 1 - len(writer.written) <= 4
    assert len(CacheReader(tmp_path / "store")) == 20


def test_an_error_lets_the_others_finish_first(tmp_path):
    writer, begun = SlowWriter(tmp_path / "store", refuse={"s2"}), []

    def run(writers):
        for number in range(40):
            writers.put(*sample(number))
            begun.append(number)
            writers.collect()

    with HostCopies(torch.device("cpu"), 4) as copies, Writers(writer, copies, threads=3) as writers:
        with pytest.raises(StoreFullError, match="no room for s2"):
            run(writers)
        assert writer.in_hand == 0
        assert len(CacheReader(tmp_path / "store")) == len(begun) - 1
    assert len(begun) < 12


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_write_that_ends_while_it_is_asked_for_is_not_forgotten(asked):
    class Ending(Future):
        """Ends once it was asked so often."""

        left = asked

        def done(self):
            ended = super().done()
            self.left -= 1
            if self.left == 0:
                self.set_exception(StoreFullError("no room"))
            return ended

    def collect(writers):
        for _ in range(3):
            writers.collect()

    with HostCopies(torch.device("cpu"), 1) as copies, Writers(None, copies, threads=1) as writers:
        writers._begun = [Ending()]
        with pytest.raises(StoreFullError, match="no room"):
            collect(writers)


def test_leaving_by_an_error_commits_what_is_on_its_way(tmp_path):
    writer = SlowWriter(tmp_path / "store")

    def run():
        with HostCopies(torch.device("cpu"), 4) as copies, Writers(writer, copies, threads=2) as writers:
            for number in range(3):
                writers.put(*sample(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert CacheReader(tmp_path / "store").sample_ids == ["s0", "s1", "s2"]
