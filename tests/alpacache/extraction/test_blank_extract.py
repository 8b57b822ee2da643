"""`extract --blank`: what the VLM sees is what the public code would see of black frames."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.family import SPECIAL_TOKENS
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt import DIRECT, SYSTEM
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.cameras import SLOTS
from alpacache.driving.sample import SampleRef
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.sources.blank import with_blank
from alpacache.sources.registry import open_source
from cache_store import CacheReader, IdentityMismatchError, verify

pytestmark = pytest.mark.system  # whole extractions

LEFT, FRONT, RIGHT, TELE = SLOTS
REF = SampleRef(clip_id="synthetic-0-000000", t0_us=5_100_000)


def config(checkpoint, store, **changes):
    usual = {"source": "synthetic:2", "model": str(checkpoint), "store": str(store), "frames": 1, "device": "cpu"}
    return ExtractConfig(**usual | {"cameras": [FRONT], "blank": [LEFT, RIGHT, TELE]} | changes)


@pytest.fixture(scope="module")
def blanked(tiny_checkpoint, tmp_path_factory):
    store = tmp_path_factory.mktemp("blank") / "store"
    assert alpacache.extract(config(tiny_checkpoint, store)).extracted == 2
    return store


def black_sample(black, *, frames):
    """A sample of four recorded cameras, some of whose pictures are made black, as one does for the public code."""
    sample = open_source("synthetic:2").load(REF, cameras=SLOTS, frames=frames)
    pictures = sample.frames.copy()
    pictures[[SLOTS.index(name) for name in black]] = 0
    return replace(sample, frames=pictures)


def test_the_prefix_is_that_of_four_cameras_with_black_pictures(blanked, tiny_checkpoint):
    builder = InputBuilder(Checkpoint(str(tiny_checkpoint)))
    inputs = builder.build(black_sample([LEFT, RIGHT, TELE], frames=1))
    prefix = load_vlm(str(tiny_checkpoint), dtype=torch.bfloat16).prefill(
        inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw
    )
    stored = CacheReader(blanked).read(REF.sample_id)
    assert np.array_equal(stored["input_ids"], inputs.input_ids[: prefix.prefix_len])
    assert np.array_equal(stored["kv"][:, 0], prefix.keys.view(torch.uint16).numpy())
    assert np.array_equal(stored["kv"][:, 1], prefix.values.view(torch.uint16).numpy())
    assert list(stored["cameras"]) == list(SLOTS)
    assert stored["image_spans"].shape == (4, 2)


def test_black_pixels_are_minus_one_as_in_the_public_image_path(tiny_checkpoint):
    """(0 / 255 - 0.5) / 0.5, which no resizing changes."""
    inputs = InputBuilder(Checkpoint(str(tiny_checkpoint))).build(black_sample([TELE], frames=2))
    patches = len(inputs.pixel_values) // 8
    assert (inputs.pixel_values[6 * patches :] == -1).all()
    assert (inputs.pixel_values[: 6 * patches] != -1).any(dim=1).all()


@pytest.mark.parametrize("black", [SLOTS, [LEFT, RIGHT, TELE], [TELE]], ids=["all", "three", "one"])
def test_ids_and_pixels_are_those_of_the_public_code_on_black_frames(black, tiny_checkpoint):
    """It calls transformers' chat template, tokenizer and image processor, as here, on frames that were made black."""
    from transformers import AutoImageProcessor, AutoTokenizer

    checkpoint = Checkpoint(str(tiny_checkpoint))
    builder, tokenizer = InputBuilder(checkpoint), AutoTokenizer.from_pretrained(tiny_checkpoint / "vlm")
    tokenizer.add_tokens([f"<i{number}>" for number in range(checkpoint.config.traj_vocab_size)])
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    processor = AutoImageProcessor.from_pretrained(tiny_checkpoint / "vlm")
    shown = black_sample(black, frames=2)
    sample = shown
    if recorded := [name for name in SLOTS if name not in black]:
        sample = with_blank(open_source("synthetic:2").load(REF, cameras=recorded, frames=2), black)
    pictures = shown.frames.transpose(0, 1, 3, 4, 2).reshape(8, *shown.frames.shape[3:], 3)
    seen = processor(images=list(pictures), return_tensors="pt")
    history = f"<|traj_history_start|>{'<|traj_history|>' * 48}<|traj_history_end|>"
    user = [{"type": "image", "image": None}] * 8 + [{"type": "text", "text": history + DIRECT}]
    said = {"system": [{"type": "text", "text": SYSTEM}], "user": user}
    said["assistant"] = [{"type": "text", "text": "<|traj_future_start|>"}]
    messages = [{"role": role, "content": content} for role, content in said.items()]
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    tokens = int(seen["image_grid_thw"][0].prod()) // processor.merge_size**2
    text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    inputs = builder.build(sample)
    assert np.array_equal(inputs.input_ids, builder.tokenizer.fuse_history(ids, sample.history_xyz))
    assert torch.equal(torch.as_tensor(inputs.image_grid_thw), seen["image_grid_thw"])
    pixels, wanted = (torch.as_tensor(each).view(4, -1) for each in (inputs.pixel_values, seen["pixel_values"]))
    for name, mine, public in zip(SLOTS, pixels, wanted, strict=True):
        assert torch.equal(mine, public) if name in black else (mine - public).abs().max() < 0.05
        assert (mine == -1).all() == (name in black)


def test_it_is_part_of_the_identity_and_the_store_is_sound(blanked, tiny_checkpoint, tmp_path):
    reader = CacheReader(blanked)
    assert (reader.identity["cameras"], reader.identity["blank"]) == (list(SLOTS), [LEFT, RIGHT, TELE])
    assert verify(blanked, deep=True).damaged == ()
    alpacache.extract(config(tiny_checkpoint, tmp_path / "plain", blank=[], samples=1))
    assert "blank" not in CacheReader(tmp_path / "plain").identity
    with pytest.raises(IdentityMismatchError, match=f"shows {FRONT}, black pictures for {LEFT}, {RIGHT}, {TELE}, this"):
        alpacache.extract(config(tiny_checkpoint, blanked, cameras=SLOTS, blank=[]))
    with pytest.raises(IdentityMismatchError, match=f"pass --cameras {FRONT}, or another --store"):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "plain"))


def test_a_black_front_camera_leaves_no_picture(tiny_checkpoint, tmp_path):
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", cameras=[LEFT], blank=[FRONT], samples=1))
    reader = CacheReader(tmp_path / "store")
    assert "front_jpeg" not in reader.fields_of(reader.sample_ids[0])


def test_misplaced_cameras_are_refused_before_anything_is_written(tiny_checkpoint, tiny_checkpoint_15, tmp_path):
    with pytest.raises(UsageError, match=f"{FRONT}: in --cameras and in --blank"):
        config(tiny_checkpoint, tmp_path / "store", blank=[FRONT])
    with pytest.raises(UsageError, match=f"{FRONT} would stand in the place of {LEFT}"):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "store", blank=[TELE]))
    assert not (tmp_path / "store").exists()
    alpacache.extract(config(tiny_checkpoint_15, tmp_path / "named", blank=[TELE], samples=1))
    stored = CacheReader(tmp_path / "named").read(REF.sample_id)
    assert "Front telephoto camera: frame 0 " in str(stored["prompt"])


@pytest.mark.ci
def test_training_and_evaluation_say_where_the_pictures_differ(blanked, tiny_checkpoint, tmp_path, caplog):
    from alpacache.evaluation.config import EvalConfig
    from alpacache.training.config import TrainConfig

    alpacache.extract(config(tiny_checkpoint, tmp_path / "plain", blank=[]))
    settings = {"stores": [str(blanked)], "model": str(tiny_checkpoint), "out": str(tmp_path / "run"), "device": "cpu"}
    alpacache.train(TrainConfig(**settings, val=str(tmp_path / "plain"), steps=1, batch_size=1))
    assert f"plain shows {FRONT}, and training sees {FRONT}, black pictures for {LEFT}, {RIGHT}, {TELE}" in caplog.text
    caplog.clear()
    judged = {"model": str(tiny_checkpoint), "checkpoint": str(tmp_path / "run"), "paths": 1, "flow_steps": 1}
    alpacache.evaluate(EvalConfig(store=[str(tmp_path / "plain")], out=str(tmp_path / "eval"), device="cpu", **judged))
    assert f"'trained' was trained on {FRONT}, black pictures for {LEFT}, {RIGHT}, {TELE}, and --store" in caplog.text
    data = CachedDataset([blanked], Checkpoint(str(tiny_checkpoint)))
    assert data.pictures == {f"{FRONT}, black pictures for {LEFT}, {RIGHT}, {TELE}"}
