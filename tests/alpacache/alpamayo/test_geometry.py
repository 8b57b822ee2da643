"""Sizes from headers alone, and the released sizes against the model classes."""

import math
import types

import huggingface_hub
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLTextConfig, Qwen3VLTextModel

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.families import FAMILIES
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


@pytest.mark.parametrize(
    ("family", "width", "intermediate", "layers", "parameters", "adapters"),
    [("r1", 2048, 8256, 36, 2.28, 27.42), ("2", 1536, 6144, 64, 2.42, None)],
)
def test_a_released_expert_is_the_model_class_of_that_size(family, width, intermediate, layers, parameters, adapters):
    config = Qwen3VLTextConfig(
        vocab_size=1,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        expert = Qwen3VLTextModel(config)
        del expert.embed_tokens
        parts = {"expert": expert, "action_in_proj": ActionInProjection(width, hidden_size=512)}
        parts["action_out_proj"] = torch.nn.Linear(width, 2)
    shapes = {
        f"{part}.{name}": tuple(p.shape) for part, module in parts.items() for name, p in module.named_parameters()
    }
    assert shapes == FAMILIES[family].released.geometry.expert_shapes
    sizes = expert_sizes(shapes, "lora", 16)
    assert round(sizes["parameters"] / 1e9, 2) == parameters
    assert adapters is None or round(sizes["trained"] / 1e6, 2) == adapters


def test_the_released_vlm_of_2_is_the_model_class_of_that_size():
    released = FAMILIES["2"].released.geometry
    text = {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "vocab_size": 155776}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}
    vision = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "out_hidden_size": 5120}
    vision |= {"deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304, "patch_size": 16}
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig.from_dict({"text_config": text, "vision_config": vision}))
    counts = {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(part))
        for part in ("visual.", "language_model.layers.0.", "language_model.embed_tokens.", "language_model.norm.")
    }
    tower, layer, embeddings, norm = counts.values()
    sizes = released.vlm
    assert (tower, layer, embeddings) == (sizes.tower_parameters, sizes.layer_parameters, sizes.embedding_parameters)
    assert released.vlm_parameters == tower + 64 * layer + 2 * embeddings + norm


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
