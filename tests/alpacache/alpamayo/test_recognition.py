"""A checkpoint's family is told by what it holds, whatever its classes are named; contradictions are not settled."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.families import FAMILIES
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.recognition import Recognition, Sign, prompt_words, recognise_family
from alpacache.errors import CheckpointError

HELD, ABSENT = "the weights hold freqs and action_space.*", "the weights hold no freqs and no action_space.*"


def recognised(directory):
    return recognise_family(Checkpoint(str(directory)))


@pytest.fixture
def copies(tiny_checkpoint, tiny_checkpoint_15, tmp_path):
    """A copy of the tiny checkpoint of a family, with changes of its config."""

    def make(family, **changes):
        source = {"r1": tiny_checkpoint, "1.5": tiny_checkpoint_15}[family]
        out = shutil.copytree(source, tmp_path / f"copy-{family}")
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, **changes}))
        return out

    return make


def renamed(directory, package):
    text = (directory / "config.json").read_text()
    for other in ("alpamayo_r1", "alpamayo1_5"):
        text = text.replace(other, package)
    (directory / "config.json").write_text(text)
    return directory


def test_released_layouts_are_told_by_their_constants(tiny_checkpoint, tiny_checkpoint_15):
    r1, newer = recognised(tiny_checkpoint), recognised(tiny_checkpoint_15)
    assert (r1.family, newer.family) == (FAMILIES["r1"], FAMILIES["1.5"])
    assert r1.text == f"{HELD} (as r1's); its classes are named alpamayo_r1"
    assert newer.text == f"{ABSENT} (as 1.5's); its classes are named alpamayo1_5"


def test_15_under_the_names_of_r1_keeps_its_prompt(renamed_15):
    found = recognised(renamed_15)
    assert (found.named, found.family) == (FAMILIES["r1"], FAMILIES["1.5"])
    assert found.text == f"{ABSENT} (as 1.5's); its classes are named alpamayo_r1"
    text, _, _ = InputBuilder(Checkpoint(str(renamed_15))).prompt(
        ["camera_front_wide_120fov"], frames=2, height=128, width=256
    )
    assert text.count("Front camera: frame 0 <|vision_start|>") == 1


def test_r1_under_the_names_of_15_keeps_its_prompt(copies):
    found = recognised(renamed(copies("r1"), "alpamayo1_5"))
    assert (found.named, found.family) == (FAMILIES["1.5"], FAMILIES["r1"])


def test_what_the_config_says_of_the_prompt_agrees(copies):
    stated = {"include_camera_ids": True, "include_frame_nums": True}
    found = recognised(renamed(copies("1.5", **stated), "alpamayo_r1"))
    assert found.family is FAMILIES["1.5"]
    assert "config.json has include_camera_ids true (as 1.5's); config.json has include_frame_nums true" in found.text
    plain = recognised(copies("r1", include_camera_ids=False, include_frame_nums=False))
    assert plain.family is FAMILIES["r1"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("1.5", {"include_camera_ids": False, "include_frame_nums": False}),
        ("1.5", {"include_camera_ids": True, "include_frame_nums": False}),
        ("r1", {"include_camera_ids": True, "include_frame_nums": True}),  # a 1.5 that the public recipe fine-tuned
    ],
)
def test_a_contradiction_is_left_to_the_user(family, changes, copies):
    checkpoint = Checkpoint(str(copies(family, **changes)))
    builder = InputBuilder(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        _ = builder.format
    key, value = next(iter(changes.items()))
    for part in (
        f"does not tell which prompt it was trained with: {recognise_family(checkpoint).text}",
        "--no-camera-names",
    ):
        assert part in str(caught.value)
    assert f"config.json has {key} {str(value).lower()}" in str(caught.value)
    with pytest.raises(CheckpointError):
        _ = InputBuilder(checkpoint, camera_names=True).format
    for wanted, name in ((True, "1.5"), (False, "r1")):
        asked = InputBuilder(checkpoint, camera_names=wanted, frame_numbers=wanted)
        assert asked.format == FAMILIES[name].prompt == asked.family.prompt
    assert builder.processor["patch"] == 16  # nothing about pictures is in doubt


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens.json", "vlm/tokenizer_config.json"])
def test_names_of_tokens_tell_15(place, copies, tiny_checkpoint):
    marked = copies("r1")
    (marked / place).write_text('{"<|_padding_0|>": 5}')
    found = recognised(marked)
    assert found.family is None
    name = place.rsplit("/", 1)[-1]
    assert Sign(text=f"{name} names the token <|_padding_0|>", families=("1.5",)) in found.signs
    (marked / place).write_text('{"<|image_pre_tkn|>": 5}')  # R1's classes write this for 1.5, too
    assert recognised(marked).family is FAMILIES["r1"]


def test_half_of_the_constants_is_no_familys(copies):
    model = copies("r1")
    for shard in model.glob("*.safetensors"):
        tensors = {name: value for name, value in load_file(shard).items() if not name.startswith("action_space.")}
        save_file(tensors, shard, {"format": "pt"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: value for key, value in index["weight_map"].items() if "action_space" not in key}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    found = recognised(model)
    assert found.family is None
    assert "the weights hold freqs and no action_space.* (as no family's)" in found.text


def test_names_decide_where_nothing_else_can(copies):
    model = copies("1.5")
    for file in model.glob("model*"):
        file.unlink()
    found = recognised(model)
    assert found.family is FAMILIES["1.5"]
    assert found.text == "by the names of its classes, alpamayo1_5"


def test_other_families_are_known_by_name():
    assert Recognition(named=FAMILIES["r1"], signs=()).family is FAMILIES["r1"]
    assert prompt_words(FAMILIES["1.5"].prompt) == "cameras named, frames numbered"
    assert prompt_words(FAMILIES["r1"].prompt) == "cameras not named, frames not numbered"
