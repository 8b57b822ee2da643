"""Prompts byte for byte, and the ids they become."""

import numpy as np
import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.families import FAMILIES
from alpacache.alpamayo.family import SPECIAL_TOKENS
from alpacache.alpamayo.inputs import PromptTokenizer
from alpacache.driving.cameras import CAMERAS
from alpacache.errors import CheckpointError

R1, ALPAMAYO_1_5 = FAMILIES["r1"].prompt, FAMILIES["1.5"].prompt
HISTORY = "<|traj_history_start|>" + "<|traj_history|>" * 48 + "<|traj_history_end|>"
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
SYSTEM = (
    "<|im_start|>system\nYou are a driving assistant that generates safe and accurate actions.<|im_end|>\n"
    "<|im_start|>user\n"
)


def test_r1_direct_prompt():
    text = R1.render([[2, 2], [2, 2]], cameras=[CAMERAS[0], CAMERAS[1]])
    expected = (
        SYSTEM
        + IMAGE * 4
        + HISTORY
        + "output the future trajectory.<|im_end|>\n<|im_start|>assistant\n<|traj_future_start|>"
    )
    assert text == expected


def test_r1_reasoning_prompt():
    text = R1.render([[2]], cameras=[CAMERAS[1]], reasoning="rollout")
    question = "output the chain-of-thought reasoning of the driving process, then output the future trajectory."
    assert text == SYSTEM + IMAGE + HISTORY + question + "<|im_end|>\n<|im_start|>assistant\n<|cot_start|>"


def test_15_prompt_names_cameras_frames_and_route():
    text = ALPAMAYO_1_5.render([[2, 2], [2, 2]], cameras=[CAMERAS[1], CAMERAS[6]], route="turn left in 50 m")
    images = f"Front camera: frame 0 {IMAGE}frame 1 {IMAGE}Front telephoto camera: frame 0 {IMAGE}frame 1 {IMAGE}"
    route = "<|route_start|>turn left in 50 m<|route_end|>"
    expected = (
        SYSTEM
        + images
        + HISTORY
        + route
        + "output the future trajectory.<|im_end|>\n<|im_start|>assistant\n<|traj_future_start|>"
    )
    assert text == expected


def test_special_tokens_follow_the_trajectory_tokens_in_the_golden_order(golden_cases):
    assert [golden_cases["vocab"][name] for name in SPECIAL_TOKENS] == list(range(128, 156))


@pytest.mark.parametrize("case", ["clip0", "clip1", "clip2", "rollout_mixed", "rollout_early"])
def test_fused_ids_equal_golden(case, golden, golden_dir):
    tokenizer = object.__new__(PromptTokenizer)  # the golden checkpoint has no tokenizer, only ids
    tokenizer._config = Checkpoint(str(golden_dir)).config
    fused = tokenizer.fuse_history(golden[f"{case}.input_ids"].numpy(), golden[f"{case}.ego_history_xyz"].numpy())
    assert np.array_equal(fused, golden[f"{case}.input_ids_fused"].numpy())


def test_r1_ids_of_the_real_layout():
    """`<i0>` = 151669 and 4,000 trajectory tokens put the special tokens where R1 has them."""
    ids = {name: 151_669 + 4_000 + place for place, name in enumerate(SPECIAL_TOKENS)}
    expected = {"traj_history_start": 155674, "traj_history_end": 155676, "cot_start": 155677, "cot_end": 155678}
    expected |= {"traj_future_start": 155681, "traj_future_end": 155683, "traj_history": 155684, "traj_future": 155685}
    expected |= {"route_start": 155690, "route_end": 155692}
    assert {name: ids[f"<|{name}|>"] for name in expected} == expected
    assert max(ids.values()) + 1 == 155_697


def test_history_bins_round_half_to_even_and_clamp(tiny_checkpoint):
    tokenizer = PromptTokenizer(Checkpoint(str(tiny_checkpoint)))
    history = np.zeros((16, 3), np.float32)
    history[0] = [-100.0, 100.0, 0.0]
    first = Checkpoint(str(tiny_checkpoint)).config.history.encode(history)[:3] - tokenizer.id_of("<i0>")
    assert first.tolist() == [128, 128 + 63, 128 + 32]  # 31.5 rounds to 32


def test_prompt_survives_the_tokenizer(tiny_checkpoint):
    tokenizer = PromptTokenizer(Checkpoint(str(tiny_checkpoint)))
    text = ALPAMAYO_1_5.render([[3]], cameras=[CAMERAS[1]])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids == tokenizer.id_of("<|image_pad|>")).sum() == 3
    with pytest.raises(ValueError, match="history placeholders; expected 48"):
        tokenizer.fuse_history(ids[:50], np.zeros((16, 3), np.float32))


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_checkpoint, tmp_path):
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    config["traj_token_start_idx"] += 1
    config["traj_token_ids"] = {name: token + 1 for name, token in config["traj_token_ids"].items()}
    config["vocab_size"] += 1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"<i0> is \d+, config.json says \d+"):
        PromptTokenizer(Checkpoint(str(broken)))
