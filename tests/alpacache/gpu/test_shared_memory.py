"""Memory of several processes: filled once, taken over from a process that fails or dies, gone with the last one."""

import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest

from alpacache.gpu.shared_memory import SharedBytes, can_share

pytestmark = pytest.mark.skipif(not can_share(), reason="no memfd or no abstract sockets here")

SIZE = 3 * 4096
FILLING = """
import sys, time
from alpacache.gpu.shared_memory import SharedBytes

def fill(memory):
    memory[:] = 7
    print("filling", flush=True)
    time.sleep(60 if sys.argv[2] == "hang" else 0)

SharedBytes(sys.argv[1], 3 * 4096, fill)
print("filled", flush=True)
time.sleep(60)
"""


@pytest.fixture
def name():
    return f"alpacache-test-{uuid.uuid4()}"


def refuse(memory):
    raise AssertionError("filled twice")


def begun(name, how):
    process = subprocess.Popen([sys.executable, "-c", FILLING, name, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "filling\n"
    return process


def end(process):
    process.kill()
    process.communicate()


def test_what_one_process_fills_the_others_get_and_keep(name):
    other = begun(name, "go on")
    try:
        mine = SharedBytes(name, SIZE, refuse)
        again = SharedBytes(name, SIZE, refuse)
        assert not mine.filled_here
        mine.bytes[5] = 9
        assert again.bytes[5:7].tolist() == [9, 7]
    finally:
        end(other)
    assert mine.bytes[6] == 7
    new = SharedBytes(name, SIZE, lambda memory: memory.fill(1))
    assert (new.filled_here, new.bytes[5]) == (True, 1)
    new.close()


def test_a_process_that_dies_while_it_fills_is_taken_over_from(name):
    other = begun(name, "hang")
    threading.Timer(0.3, other.send_signal, [signal.SIGKILL]).start()
    mine = SharedBytes(name, SIZE, lambda memory: memory.fill(3))
    end(other)
    assert mine.filled_here
    assert np.all(mine.bytes == 3)
    mine.close()


def test_what_filling_raises_is_raised_and_the_next_one_tries(name):
    with pytest.raises(OSError, match="no such shard"):
        SharedBytes(name, SIZE, lambda memory: (_ for _ in ()).throw(OSError("no such shard")))
    mine = SharedBytes(name, SIZE, lambda memory: memory.fill(3))
    assert mine.filled_here
    mine.close()


def test_nothing_stays_open_or_has_a_name(name):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    held = SharedBytes(name, SIZE, lambda memory: memory.fill(3))
    held.close()
    for thread in threading.enumerate():
        if thread.name == "share-memory":
            thread.join(10)
    del held
    assert opened() <= before
    assert not [path for path in Path("/dev/shm").iterdir() if name in path.name]
