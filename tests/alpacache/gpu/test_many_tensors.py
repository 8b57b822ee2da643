"""Where tensors begin, and how they are divided among programs."""

import numpy as np
import pytest
import torch

from alpacache.gpu.many_tensors import AddressTable, LaunchTables, is_aligned, offsets, stretches


def test_offsets_lead_from_the_first_tensor_to_each_of_the_others():
    memory = torch.arange(100, dtype=torch.int16)
    tensors = [memory[32:40], memory[:8], memory[90:]]
    assert offsets(tensors).tolist() == [0, -32, 58]
    whole = memory.view(-1).numpy()
    assert [int(whole[32 + place]) for place in offsets(tensors)] == [int(each[0]) for each in tensors]


def test_aligned_is_what_can_be_read_16_bytes_at_a_time_from_any_other():
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    start = (-memory.data_ptr() // 2) % 16
    assert is_aligned(memory[start:])
    assert is_aligned(memory[start + 16 :])
    assert not is_aligned(memory[start + 8 :])


def test_stretches_cover_each_part_once_in_order():
    found = stretches([5, 1, 4, 0, 9], 4)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 0], [0, 4], [1, 0], [2, 0], [4, 0], [4, 4], [4, 8]]


def test_table_holds_what_was_put_last():
    table, rows = AddressTable(torch.device("cpu")), np.arange(6).reshape(3, 2)
    assert table.put(rows).tolist() == rows.tolist()
    assert table.put(rows.copy()).tolist() == rows.tolist()
    assert table.put(rows + 1).tolist() == (rows + 1).tolist()
    assert table.put(rows[:2]).tolist() == rows[:2].tolist()


def test_programs_are_divided_once_and_kinds_have_tables_of_their_own():
    tables, rows = LaunchTables(torch.device("cpu")), np.arange(4).reshape(2, 2)
    assert tables.programs([5, 1], 4).tolist() == [[0, 0], [0, 4], [1, 0]]
    assert tables.programs([5, 1], 4) is tables.programs((5, 1), 4)
    assert tables.programs([5, 1], 5).tolist() == [[0, 0], [1, 0]]
    one, other = tables.numbers("one", rows), tables.numbers("other", rows + 1)
    assert (one.tolist(), other.tolist()) == (rows.tolist(), (rows + 1).tolist())
    assert tables.numbers("one", rows + 2) is one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_finds_what_it_was_captured_with():
    table, device = AddressTable(torch.device("cuda")), torch.device("cuda")
    table.put(np.array([[1, 2]]))
    graph, found = torch.cuda.CUDAGraph(), torch.zeros(1, 2, dtype=torch.int64, device=device)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found.copy_(table.put(np.array([[3, 4]])))
    assert table.put(np.array([[5, 6]])).tolist() == [[5, 6]]
    graph.replay()
    assert found.tolist() == [[3, 4]]
    with pytest.raises(RuntimeError, match=r"\[1, 2\]; it cannot become \[2, 2\]"):
        table.put(np.zeros((2, 2), np.int64))
    assert table.put(np.array([[5, 6]])).tolist() == [[5, 6]]
