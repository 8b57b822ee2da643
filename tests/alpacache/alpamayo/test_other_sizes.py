"""A checkpoint of 2 Super whose every size is another: nothing rests on the sizes of the tiny ones.

Five layers, three KV heads of 24 channels, nine query heads on an expert narrower than its attention, patches of 8,
deepstack after three blocks. What transformers makes of it in one plain forward is what cache, training and driver see.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert, load_vlm, tiny_checkpoint
from alpacache.alpamayo.backbone import vlm_config
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driver.driver import load_driver
from alpacache.driving.sample import SampleRef
from alpacache.evaluation.config import EvalConfig
from alpacache.exporting.config import ExportConfig
from alpacache.exporting.export import export
from alpacache.extraction.config import ExtractConfig
from alpacache.inference.prediction import predict_ahead
from alpacache.sources.registry import open_source
from alpacache.training.config import TrainConfig

pytestmark = pytest.mark.system  # the whole way

TEXT = {
    **{"hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": 5},
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24},
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 4, 4], "mrope_interleaved": True},
}
VISION = {"depth": 5, "hidden_size": 64, "intermediate_size": 80, "out_hidden_size": 72, "patch_size": 8}
EXPERT = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 9, "head_dim": 24}
AREA = 64 * 128
CAMERAS = ("camera_cross_left_120fov", "camera_front_wide_120fov", "camera_cross_right_120fov")
SOURCE, SAMPLES, FRAMES = "synthetic:40:fork", 2, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The checkpoint, in float32, its weights in three shards."""
    usual = tiny_checkpoint._vlm_config
    place = tmp_path_factory.mktemp("other") / "Other-2"

    def sizes(tokenizer):
        config = usual(tokenizer)
        config["text_config"] |= TEXT
        config["vision_config"] |= VISION | {"deepstack_visual_indexes": [0, 2, 3]}
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_checkpoint, "_vlm_config", sizes)
        patch.setattr(tiny_checkpoint, "EXPERT_SIZES", EXPERT)
        patch.setattr(tiny_checkpoint, "HISTORY_BINS", 30)
        patch.setattr(tiny_checkpoint, "FUTURE_BINS", 50)
        tiny_checkpoint.make_tiny_checkpoint(place, seed=5, dtype="float32", family="2", shards=3)
    for name in ("config.json", "preprocessor_config.json"):
        config = json.loads((place / name).read_text())
        changed = {"min_pixels": AREA, "max_pixels": AREA} if name == "config.json" else {"patch_size": 8}
        (place / name).write_text(json.dumps(config | changed))
    return str(place)


@pytest.fixture(scope="module")
def samples():
    source = open_source(SOURCE, cameras=CAMERAS)
    refs = [SampleRef(clip_id=clip_id, t0_us=5_100_000) for clip_id in source.clip_ids[:SAMPLES]]
    return [source.load(ref, cameras=CAMERAS, frames=FRAMES) for ref in refs]


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    """These samples without reasoning; the VLM in float32, stored as bfloat16."""
    return extracted(model, tmp_path_factory.mktemp("other") / "store")


def extracted(model, store, **changes):
    settings = {"source": SOURCE, "samples": SAMPLES, "cameras": CAMERAS, "frames": FRAMES, "split": "all"}
    alpacache.extract(ExtractConfig(model=model, store=str(store), device="cpu", **settings | changes))
    return str(store)


@torch.inference_mode()
def test_a_prefill_is_one_plain_forward(model, samples, relative_error):
    checkpoint = Checkpoint(model)
    vlm, inputs = load_vlm(checkpoint), [InputBuilder(checkpoint).build(sample) for sample in samples]
    whole = Qwen3VLForConditionalGeneration(vlm_config(checkpoint)).eval()
    shards = sorted(checkpoint.directory.glob("*.safetensors"))
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    state = {name.removeprefix("vlm."): tensor for name, tensor in stored.items() if name.startswith("vlm.")}
    whole.load_state_dict(state)
    for one, prefix in zip(inputs, vlm.prefill_batch(inputs), strict=True):
        ids = torch.from_numpy(one.input_ids)[None]
        kinds = (ids == vlm.model.config.image_token_id).int()
        out = whole.model(
            input_ids=ids,
            mm_token_type_ids=kinds,
            pixel_values=one.pixel_values,
            image_grid_thw=one.image_grid_thw,
            use_cache=True,
        )
        assert prefix.keys.shape == (5, 3, len(one.input_ids), 24)
        for number, layer in enumerate(out.past_key_values.layers):
            assert relative_error(prefix.keys[number], layer.keys[0]) <= 1e-5
            assert relative_error(prefix.values[number], layer.values[0]) <= 1e-5
        assert relative_error(prefix.hidden, out.last_hidden_state[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_the_expert_is_the_stock_one(model, store, causal, relative_error):
    data = CachedDataset([store], Checkpoint(model))
    prefixes = [data.load(index).prefix for index in range(SAMPLES)]
    experts = [load_expert(model, attention=kind).eval() for kind in ("prefix", "eager")]
    noise, t = torch.randn(SAMPLES, 2, 64, 2), torch.rand(SAMPLES, 2)
    fast, stock = (expert.velocity(noise, t, prefixes, causal=causal) for expert in experts)
    assert relative_error(fast, stock) <= 1e-5


def test_a_driver_is_evaluated_to_the_bit(model, store, samples):
    driver, source = load_driver(model, device="cpu", frames=FRAMES), open_source(SOURCE, cameras=CAMERAS)
    data, expert = CachedDataset([store], Checkpoint(model)), driver._expert
    settings = {"paths": 2, "flow_steps": (3,), "seed": 0, "batch_size": 1}
    predicted = {
        data.sample_id(one.indices[0]): one.actions[0, 0]
        for one in predict_ahead(expert, data, range(SAMPLES), **settings)
    }
    for sample in samples:
        live = driver.paths(driver.observer.see(sample, source.track(sample.ref.clip_id)), paths=2, flow_steps=3)
        assert np.array_equal(live.actions, predicted[sample.ref.sample_id].numpy())


@pytest.mark.ci
@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        ("int8", {"trainable": "lora"}),
        ("transform:3", {"trainable": "head"}),
        ("bf16", {"from_scratch": True, "expert_map": (4, 0), "expert_width": 24}),
    ],
)
def test_what_was_trained_is_judged_and_exported(codec, settings, model, tmp_path):
    """Routes and reasoning, three codecs; an export gives the losses and paths of the run."""
    store = extracted(model, tmp_path / "store", codec=codec, route="source")
    common = {"model": model, "device": "cpu"}
    run, out = str(tmp_path / "run"), str(tmp_path / "exported")
    alpacache.train(TrainConfig(stores=(store,), out=run, steps=2, batch_size=2, warmup=0, **settings, **common))
    exported = export(ExportConfig(model=model, checkpoint=run, out=out, expert_only="from_scratch" in settings))
    judging = {"paths": 2, "flow_steps": 2, "guidance": 2.0, "device": "cpu", "store": (store,)}
    ran = alpacache.evaluate(EvalConfig(model=model, checkpoint=run, out=str(tmp_path / "ran"), **judging))
    again = alpacache.evaluate(EvalConfig(model=out, out=str(tmp_path / "again"), **judging))
    assert exported.tensors
    for one, other in zip(ran.results, again.results, strict=True):
        assert np.allclose(one.models["trained"].pred_xyz, other.models["base"].pred_xyz, atol=1e-3)
        assert not np.allclose(one.models["trained"].pred_xyz, one.models["base"].pred_xyz, atol=1e-3)
