"""Which family a checkpoint belongs to, and what a family decides."""

import json
from pathlib import Path

import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.families import FAMILIES, recognise
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.errors import CheckpointError

PLACE = Path("model/config.json")


def block(package):
    return {"action_space_cfg": {"_target_": f"{package}.action_space.X"}, "out": {"_target_": "torch.nn.Linear"}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (block("alpamayo_r1"), "r1"),
        (block("alpamayo1_5"), "1.5"),
        ({"model_type": "alpamayo1_5"} | block("alpamayo_r1"), "r1"),  # the public SFT recipe of 1.5 rewrites targets
        ({"model_type": "alpamayo_r1"} | block("somebodys_fork"), "r1"),
        ({"model_type": "alpamayo1_5", "vocab_size": 3}, "1.5"),
        ({"model_type": "alpamayo2_super"} | block("alpamayo2_super"), "2"),
        (block("alpamayo2_super"), "2"),
    ],
)
def test_a_family_is_recognised_by_its_classes_then_by_its_type(config, expected):
    assert recognise(config, PLACE) is FAMILIES[expected]


def test_an_unknown_family_is_refused_by_name(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        recognise({"model_type": "alpamayo9"} | block("alpamayo9"), PLACE)
    assert str(caught.value) == (
        "model/config.json is not of a model family that alpacache knows: model_type is 'alpamayo9', its _target_ "
        "entries name alpamayo9; supported: alpamayo1_5 (1.5), alpamayo_r1 (r1), "
        "alpamayo2_super (2)."
    )
    with pytest.raises(
        CheckpointError, match="model_type is 'qwen3_vl', its _target_ entries name no class of a model"
    ):
        recognise(json.loads((tiny_checkpoint / "vlm/config.json").read_text()), PLACE)


def test_a_family_decides_the_prompt_unless_told_otherwise(tiny_checkpoint, tiny_checkpoint_15):
    r1, newer = Checkpoint(str(tiny_checkpoint)), Checkpoint(str(tiny_checkpoint_15))
    assert InputBuilder(r1).format == FAMILIES["r1"].prompt
    assert InputBuilder(newer).format == FAMILIES["1.5"].prompt
    asked = InputBuilder(newer, frame_numbers=False).format
    assert (asked.camera_names, asked.frame_numbers) == (True, False)
