"""Where weights live: every unit's tensors as they are in the files, again and again, and what a bad file says."""

import math
import os

import pytest
import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.weight_homes import EmbeddingRows, FilesHome, RamHome, unit_files
from alpacache.errors import CheckpointError

BEGIN = "vlm.model."
UNITS = ["visual.", *(f"language_model.layers.{number}." for number in range(4))]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("kind", ["ram", "files"])
def test_units_come_whole_in_order_and_over_again(kind, direct, tiny_checkpoint, monkeypatch):
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    checkpoint = Checkpoint(str(tiny_checkpoint))
    stored = dict(checkpoint.read(checkpoint.with_prefix(BEGIN)))
    files = unit_files(checkpoint, BEGIN, UNITS)
    home = RamHome(files, dtype=torch.bfloat16, cuda=False) if kind == "ram" else FilesHome(files, cuda=False)
    try:
        for _ in range(3):
            for unit in UNITS:
                tensors = home.next_unit()
                names = {name for name in stored if name.startswith(BEGIN + unit)}
                assert {f"{BEGIN}{unit}{name}" for name in tensors} == names
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, stored[f"{BEGIN}{unit}{name}"])
                home.given_back(None)
    finally:
        home.close()


def test_embedding_rows_are_those_of_the_table(tiny_checkpoint):
    checkpoint, name = Checkpoint(str(tiny_checkpoint)), f"{BEGIN}language_model.embed_tokens.weight"
    table = dict(checkpoint.read(checkpoint.with_prefix(name)))[name]
    ids = torch.tensor([7, 0, len(table) - 1])
    assert torch.equal(EmbeddingRows(checkpoint, name, dtype=torch.float32).rows(ids), table[ids].float())


def test_a_file_that_becomes_shorter_is_named(tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    (unit,) = unit_files(checkpoint, BEGIN, UNITS[-1:])
    shard = max(unit.tensors.values(), key=lambda info: info.offset).shard
    cut = tmp_path / shard
    cut.write_bytes(unit.paths[shard].read_bytes()[:5000])
    unit.paths[shard] = cut
    with pytest.raises(CheckpointError, match=f"{shard} cannot be read: the file has become shorter"):
        RamHome([unit], dtype=torch.bfloat16, cuda=False)


def test_sizes_by_the_configuration_are_those_of_the_tensors(tiny_checkpoint):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    sizes = geometry_of(checkpoint).vlm

    def count(prefix):
        return sum(map(math.prod, checkpoint.shapes(BEGIN + prefix).values()))

    assert sizes.layer_parameters == count("language_model.layers.1.")
    assert sizes.tower_parameters == count("visual.")
    assert sizes.embedding_parameters == count("language_model.embed_tokens.")
