"""Sizes from headers alone, and the released sizes against the model classes."""

import math
import types

import huggingface_hub
import pytest
import torch
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.families import RELEASED
from alpacache.alpamayo.foreign_files import read_header
from alpacache.alpamayo.projection import ActionInProjection
from alpacache.errors import CheckpointError
from alpacache.planning.workload import expert_sizes


def test_of_a_checkpoint(tiny_checkpoint):
    geometry = geometry_of(Checkpoint(str(tiny_checkpoint)))
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.vlm_hidden) == (4, 2, 32, 128)
    assert geometry.expert_shapes["action_out_proj.weight"] == (2, 96)
    headers = [read_header(shard) for shard in tiny_checkpoint.glob("*.safetensors")]
    entries = [item for header in headers for item in header.items()]
    assert geometry.vlm_parameters == sum(math.prod(e.shape) for name, e in entries if name.startswith("vlm."))


def test_the_released_expert_is_the_model_class_of_that_size():
    config = Qwen3VLTextConfig(
        vocab_size=1,
        hidden_size=2048,
        intermediate_size=8256,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        expert = Qwen3VLTextModel(config)
        del expert.embed_tokens
        parts = {"expert": expert, "action_in_proj": ActionInProjection(2048, hidden_size=512)}
        parts["action_out_proj"] = torch.nn.Linear(2048, 2)
    shapes = {
        f"{part}.{name}": tuple(p.shape) for part, module in parts.items() for name, p in module.named_parameters()
    }
    assert shapes == RELEASED.geometry.expert_shapes
    sizes = expert_sizes(shapes, "lora", 16)
    assert (round(sizes["parameters"] / 1e9, 2), round(sizes["trained"] / 1e6, 2)) == (2.28, 27.42)


def test_of_a_hub_id_fetches_no_weights(tiny_checkpoint, monkeypatch):
    def download(repo, name, revision=None, local_files_only=False):
        assert not name.endswith(".safetensors")
        return str(tiny_checkpoint / name)

    def header(self, repo, name, revision=None):
        found = read_header(tiny_checkpoint / name)
        first = min(info.offset for info in found.values())
        tensors = {
            key: types.SimpleNamespace(
                dtype=info.dtype,
                shape=list(info.shape),
                data_offsets=(info.offset - first, info.offset - first + info.nbytes),
            )
            for key, info in found.items()
        }
        return types.SimpleNamespace(tensors=tensors)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", header)
    checkpoint, local = Checkpoint("owner/Tiny-R1"), geometry_of(Checkpoint(str(tiny_checkpoint)))
    assert checkpoint.shapes("expert.", "action_in_proj.", "action_out_proj.") == local.expert_shapes
    assert sum(map(math.prod, checkpoint.shapes("vlm.").values())) == local.vlm_parameters

    def unreachable(self, repo, name, revision=None):
        raise RuntimeError("connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", unreachable)
    with pytest.raises(CheckpointError, match=r"header of .* failed \(connection refused\)"):
        checkpoint.shapes("vlm.")
