"""A complete Alpamayo checkpoint of a few megabytes, in the public layout, with random weights.

With it every command runs offline and on a CPU exactly as on the 10 B model: config, sharded weights with an index, the
VLM's own config, tokenizer and image processor. `python -m alpacache.alpamayo.tiny_checkpoint DIR [FAMILY]`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from alpacache.alpamayo.backbone import expert_config, vlm_config
from alpacache.alpamayo.checkpoint import INDEX, Checkpoint
from alpacache.alpamayo.families import DEFAULT_FAMILY, FAMILIES
from alpacache.alpamayo.family import Family
from alpacache.alpamayo.projection import ActionInProjection
from alpacache.alpamayo.prompt import CAMERA_TITLES, DIRECT, REASONING, SYSTEM
from alpacache.errors import UsageError

BASE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FUTURE_BINS, HISTORY_BINS = 128, 64
INITIALIZER_RANGE = 0.08
"""About 1 / sqrt(width). The usual 0.02 suits thousands of channels; at 128 it leaves attention without a gradient."""
EXPERT_SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
PROCESSORS = {"image_processor": "Qwen2VLImageProcessor", "video_processor": "Qwen3VLVideoProcessor"}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- for part in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Messages as text: images back to back and nothing between parts, as in `prompt.PromptFormat`."""
ACTION_CONSTANTS = {
    "accel_mean": 0.02902694707164455,
    "accel_std": 0.6810426736454882,
    "curvature_mean": 0.0002692167976330542,
    "curvature_std": 0.026148280660833106,
}


def make_tiny_checkpoint(
    directory: Path | str,
    *,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    family: str = "r1",
    shards: int = 2,
) -> Path:
    """Write the checkpoint into a new directory and return it. The same arguments give the same bytes."""
    directory, kind = Path(directory), FAMILIES[family]
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty; choose a new directory for the tiny checkpoint.")
    tokenizer = _tokenizer()
    first, vlm = tokenizer.get_vocab_size(), _vlm_config(tokenizer)
    if kind.nested:
        companion, config = directory, _nested_config(first, vlm, dtype=dtype, family=kind)
        companion.mkdir(parents=True, exist_ok=True)
    else:
        companion, config = directory / "vlm", _config(first, dtype=dtype, family=kind)
        companion.mkdir(parents=True)
        _write_json(companion / "config.json", vlm)
    tokenizer.save(str(companion / "tokenizer.json"))
    _write_processor(companion)
    _write_json(directory / "config.json", config)
    _write_weights(directory, _random_weights(Checkpoint(str(directory)), seed=seed), dtype=dtype, shards=shards)
    return directory


def _tokenizer() -> Tokenizer:
    """A byte-level BPE like the real one, its merges learnt from the prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(
        [SYSTEM, DIRECT, REASONING, "system\n", "user\n", "assistant\n", *CAMERA_TITLES], trainer
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in BASE_TOKENS])
    return tokenizer


def _write_processor(directory: Path) -> None:
    """Write what `AutoProcessor` reads beside the tokenizer; the public classes make their prompts with it."""
    kind = {"processor_class": "Qwen3VLProcessor"}
    pictures = {
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        **{"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2},
        "size": {"shortest_edge": 128 * 256, "longest_edge": 128 * 256},
    }
    image, video = ({f"{name}_type": value} for name, value in PROCESSORS.items())
    _write_json(directory / "preprocessor_config.json", image | pictures | kind)
    _write_json(directory / "video_preprocessor_config.json", video | pictures | kind)
    tokens = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": None}
    how = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 8192}
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", **kind, **tokens, **how})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _vlm_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **{"model_type": "qwen3_vl", "tie_word_embeddings": False},
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": tokenizer.get_vocab_size(),
            **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
            **{"rms_norm_eps": 1e-6, "initializer_range": INITIALIZER_RANGE, "max_position_embeddings": 8192},
            "rope_theta": 100.0,  # prompts of hundreds of tokens and images of 8 columns want fast-turning angles
            "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **{"depth": 4, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128},
            **{"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [1]},
            **{"num_position_embeddings": 256, "in_channels": 3, "initializer_range": INITIALIZER_RANGE},
        },
    }


def _config(first: int, *, dtype: str, family: Family) -> dict[str, Any]:
    """`config.json` as the public checkpoints have it; `first` is the id of `<i0>`."""
    package, special_tokens = family.package, family.special_tokens
    traj = FUTURE_BINS + HISTORY_BINS
    ids = {name: first + traj + place for place, name in enumerate(special_tokens)}
    action_space, future, projections = _shared_blocks(package)
    return {
        "model_type": package,
        "architectures": [family.architecture],
        **{"vlm_backend": "qwenvl3", "vlm_name_or_path": "vlm", "dtype": dtype, "model_dtype": dtype},
        "attn_implementation": "sdpa",
        **{"min_pixels": 128 * 256, "max_pixels": 128 * 256},
        "vocab_size": first + traj + len(special_tokens),
        "traj_vocab_size": traj,
        "traj_token_start_idx": first,
        "traj_token_ids": {
            name: ids[f"<|traj_{name}|>"]
            for name in ("history", "future", "history_start", "future_start", "history_end", "future_end")
        },
        **{"tokens_per_history_traj": 48, "tokens_per_future_traj": 128, "add_special_tokens": True},
        **{"expert_non_causal_attention": True, "keep_same_dtype": True},
        "traj_tokenizer_cfg": future,
        "hist_traj_tokenizer_cfg": {
            "_target_": f"{package}.models.delta_tokenizer.DeltaTrajectoryTokenizer",
            **{"num_bins": HISTORY_BINS, "ego_xyz_min": [-4, -4, -10], "ego_xyz_max": [4, 4, 10]},
        },
        "diffusion_cfg": {"_target_": f"{package}.diffusion.flow_matching.FlowMatching", "int_method": "euler"},
        "action_space_cfg": action_space,
        **projections,
        "expert_cfg": EXPERT_SIZES,
    }


def _shared_blocks(package: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Action space, tokenizer of the future, and the two projections."""
    action_space = {
        "_target_": f"{package}.action_space.UnicycleAccelCurvatureActionSpace",
        **ACTION_CONSTANTS,
        **{"accel_bounds": [-9.8, 9.8], "curvature_bounds": [-0.33, 0.33], "dt": 0.1, "n_waypoints": 64},
        **{"theta_lambda": 1e-06, "theta_ridge": 1e-08, "v_lambda": 1e-06, "v_ridge": 1e-4},
        **{"a_lambda": 1e-4, "a_ridge": 1e-4, "kappa_lambda": 1e-4, "kappa_ridge": 1e-4},
    }
    future = {
        "_target_": f"{package}.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
        "_recursive_": False,  # it makes its action space itself, of the settings below
        "action_space_cfg": action_space,
        **{"dims_min": [-4.0, -4.0], "dims_max": [4.0, 4.0], "num_bins": FUTURE_BINS},
    }
    projections = {
        "action_in_proj_cfg": {
            "_target_": f"{package}.models.action_in_proj.PerWaypointActionInProjV2",
            **{"hidden_size": 64, "max_freq": 100.0, "num_enc_layers": 2, "num_fourier_feats": 20},
        },
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
    }
    return action_space, future, projections


def _nested_config(first: int, vlm: Mapping[str, Any], *, dtype: str, family: Family) -> dict[str, Any]:
    """`config.json` as 2 Super has it: history bins first, the configs of VLM and expert whole and within it."""
    package, special_tokens = family.package, family.special_tokens
    traj = HISTORY_BINS + FUTURE_BINS
    ids = {name: first + traj + place for place, name in enumerate(special_tokens)}
    vocabulary = -(-(first + traj + len(special_tokens)) // 128) * 128
    text = {**vlm["text_config"], "vocab_size": vocabulary, "eos_token_id": first - len(BASE_TOKENS) + 1}
    action_space, future, projections = _shared_blocks(package)
    ends = {"pad": "", "start": "_start", "end": "_end"}
    placed = {f"{of}_{kind}": ids[f"<|traj_{of}{end}|>"] for of in ("history", "future") for kind, end in ends.items()}
    return {
        "model_type": package,
        "architectures": [family.architecture],
        **{"dtype": dtype, "vlm_class": "Qwen3VLForConditionalGeneration", "vlm_name_or_path": None},
        **{"enable_expert": True, "cotrain_expert_vlm": False, "padding_side": "left"},
        **{"min_pixels": 128 * 256, "max_pixels": 128 * 256},
        **{"include_camera_ids": True, "frame_label": "frame_num", "token_layout": "camera_ts"},
        **{"history_vocab_size": HISTORY_BINS, "future_vocab_size": FUTURE_BINS},
        **{"tokens_per_history_traj": 45, "tokens_per_future_traj": 128},
        "traj_ids": {"history_id0": first, "future_id0": first + HISTORY_BINS, **placed},
        "future_traj_tokenizer_cfg": future,
        "hist_traj_tokenizer_cfg": {
            "_target_": f"{package}.models.delta_tokenizer.DeltaTrajectoryTokenizer",
            **{"num_bins": HISTORY_BINS, "ego_xyz_min": [-4, -4, -10], "ego_xyz_max": [4, 4, 10]},
            **{"predict_yaw": False, "pad_origin_at_beginning": False},
        },
        "vlm_config": {**vlm, "text_config": text},
        "expert_config": {
            "model_type": f"{package}_expert",
            "llm_config": {**text, **EXPERT_SIZES},
            "expert_update_cfg": EXPERT_SIZES,
            "action_space_cfg": action_space,
            "diffusion_cfg": {
                "_target_": f"{package}.diffusion.flow_matching.FlowMatching",
                **{"int_method": "euler", "train_timestep_sampler": "beta", "num_inference_steps": 10},
                **{"inference_guidance_weight": 3.0, "use_classifier_free_guidance": False},
            },
            **projections,
            "expert_non_causal_attention": True,
        },
    }


def _random_weights(checkpoint: Checkpoint, *, seed: int) -> dict[str, Tensor]:
    """Freshly initialised tensors under the public state-dict names."""
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expert = Qwen3VLTextModel(expert_config(checkpoint))
        del expert.embed_tokens
        hidden = expert.config.hidden_size
        stores_constants = checkpoint.config.family.stores_constants
        in_proj = ActionInProjection(hidden, **checkpoint.config.action_in_proj, persistent_constants=stores_constants)
        parts: dict[str, nn.Module] = {
            "vlm.": Qwen3VLForConditionalGeneration(vlm_config(checkpoint)),
            "expert.": expert,
            "action_in_proj.": in_proj,
            "action_out_proj.": nn.Linear(hidden, 2),
        }
    own = checkpoint.config.family.expert_prefix
    prefixes = {name: name if name == "vlm." else own + name for name in parts}
    state = {prefixes[at] + name: tensor for at, part in parts.items() for name, tensor in part.state_dict().items()}
    if stores_constants:
        state |= {f"action_space.{name}": torch.tensor(value) for name, value in ACTION_CONSTANTS.items()}
    return state


def _write_weights(directory: Path, state: Mapping[str, Tensor], *, dtype: str, shards: int) -> None:
    """Safetensors shards of whole tensors, and the index."""
    tensors = {name: state[name].detach().to(getattr(torch, dtype)).contiguous() for name in sorted(state)}
    names, per_shard = list(tensors), -(-len(tensors) // shards)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    make_tiny_checkpoint(sys.argv[1], family=sys.argv[2] if sys.argv[2:] else DEFAULT_FAMILY.name)
