"""Work in turn on two streams."""

import pytest
import torch

from alpacache.gpu.capture import TwoStreams


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_without_a_gpu_work_stays_where_it_is(device):
    streams, done = TwoStreams(device), []
    with streams():
        for place in range(3):
            with streams.turn(place):
                done.append(place)
    assert done == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_see_what_came_before_and_are_seen_by_what_comes_after():
    device = torch.device("cuda", torch.cuda.current_device())
    streams, values = TwoStreams(device), torch.zeros(4, device=device)
    used = set()
    for _ in range(3):
        torch.cuda._sleep(20_000_000)
        values += 1
        with streams():
            for place in range(4):
                with streams.turn(place):
                    used.add(torch.cuda.current_stream())
                    torch.cuda._sleep(2_000_000)
                    values[place] *= 2
        values += 1
    assert len(used) == 2
    assert values.tolist() == [21.0] * 4
