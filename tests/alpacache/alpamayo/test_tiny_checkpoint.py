"""The tiny checkpoint is one that the public classes load: its files hold what those ask for."""

import json

import numpy as np
import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.family import SPECIAL_TOKENS
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt import CAMERA_TITLES, DIRECT, REASONING, SYSTEM
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.cameras import CAMERAS
from alpacache.errors import UsageError

FRONT = CAMERAS[1]


@pytest.fixture(params=["r1", "1.5"])
def model(request, tiny_checkpoint, tiny_checkpoint_15):
    return tiny_checkpoint if request.param == "r1" else tiny_checkpoint_15


@pytest.fixture
def tokenizer(model):
    """transformers' own, extended as the public classes extend it: all of a name's first, then the special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model / "vlm")
    tokenizer.add_tokens([f"<i{number}>" for number in range(Checkpoint(str(model)).config.traj_vocab_size)])
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


def blocks(value):
    """All objects of a config that name a class."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from blocks(child)
    if isinstance(value, dict) and "_target_" in value:
        yield value


def test_blocks_within_blocks_are_left_to_their_owners(model):
    """Otherwise the public code's factory makes an inner block first, and its owner gets an object for its settings."""
    found = list(blocks(json.loads((model / "config.json").read_text())))
    assert len(found) == 7
    for block in found:
        nested = any("_target_" in inner for inner in block.values() if isinstance(inner, dict))
        assert block.get("_recursive_", True) == (not nested), block["_target_"]


def test_the_vocabulary_is_the_one_that_the_public_classes_count(model, tokenizer):
    config = Checkpoint(str(model)).config
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<i0>") == config.traj_token_start
    for name, token in config.traj_token_ids.items():
        assert tokenizer.convert_tokens_to_ids(f"<|traj_{name}|>") == token
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_end|>", None)


@pytest.mark.parametrize("reasoning", ["none", "rollout"])
@pytest.mark.parametrize("cameras", [CAMERAS[1:2], CAMERAS])
def test_messages_become_our_prompt_token_by_token(reasoning, cameras, model, tokenizer):
    """The messages are those of the public helpers: for 1.5 a camera's title, then each frame's number and image."""
    builder = InputBuilder(Checkpoint(str(model)), reasoning=reasoning)
    parts = []
    for camera in cameras:
        title = f"{CAMERA_TITLES[CAMERAS.index(camera)]}: " if builder.format.camera_names else ""
        parts += [{"type": "text", "text": title}]
        for number in range(4):
            parts += [{"type": "text", "text": f"frame {number} " if builder.format.frame_numbers else ""}]
            parts += [{"type": "image", "image": None}]
    history = f"<|traj_history_start|>{'<|traj_history|>' * 48}<|traj_history_end|>"
    question, answer = (DIRECT, "<|traj_future_start|>") if reasoning == "none" else (REASONING, "<|cot_start|>")
    parts += [{"type": "text", "text": history + question}]
    texts = {
        "system": [{"type": "text", "text": SYSTEM}],
        "user": parts,
        "assistant": [{"type": "text", "text": answer}],
    }
    messages = [{"role": role, "content": content} for role, content in texts.items()]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    text, ids, tokens = builder.prompt(cameras, frames=4, height=128, width=256)
    assert rendered.replace("<|image_pad|>", "<|image_pad|>" * tokens) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>assistant\n"


def test_the_processor_is_qwen3_vls(model):
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config", "video_preprocessor_config", "tokenizer_config"):
        assert json.loads((model / f"vlm/{name}.json").read_text())["processor_class"] == "Qwen3VLProcessor"
    try:
        processor = AutoImageProcessor.from_pretrained(model / "vlm")
    except ImportError:
        pytest.skip("image processors of this transformers need torchvision")
    pictures = [np.zeros((128, 256, 3), np.uint8)] * 2
    assert processor(images=pictures, return_tensors="np")["image_grid_thw"].tolist() == [[1, 8, 16]] * 2


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    one, other = (make_tiny_checkpoint(tmp_path / name, dtype="float32") for name in ("one", "other"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    config = json.loads((one / "config.json").read_text())
    assert config["dtype"] == config["model_dtype"] == "float32"
    with pytest.raises(UsageError, match="is not empty"):
        make_tiny_checkpoint(one)
