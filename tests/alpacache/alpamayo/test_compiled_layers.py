"""Compiled layers: transformers' numbers to rounding, and one piece of code for all layers, rows and lengths."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.compiled_layers import TextWeights, VisionWeights, text_layer, vision_block
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import RolloutSampler
from alpacache.alpamayo.text_layers import LayerKV, run_layer
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.sources.registry import open_source

pytestmark = pytest.mark.system  # torch.compile

NAMES = {"input_ids": "input_ids_fused", "pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def prompts(tiny_checkpoint):
    """Eight samples of one and of two cameras: prompts of two lengths, images of one size."""
    builder, source = InputBuilder(Checkpoint(str(tiny_checkpoint))), open_source("synthetic:8")
    found = []
    for number, clip in enumerate(source.clip_ids):
        ref = SampleRef(clip_id=clip, t0_us=5_100_000)
        found.append(builder.build(source.load(ref, cameras=CAMERAS[: 1 + number % 2], frames=2)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_are_transformers_layers(dtype, tiny_checkpoint):
    """Bit for bit, before anything is compiled."""
    model, generator = load_vlm(str(tiny_checkpoint), dtype=dtype).model, torch.Generator().manual_seed(0)
    text, vision = model.language_model, model.visual
    hidden = torch.randn(2, 9, 128, generator=generator).to(dtype)
    angles = text.rotary_emb(hidden, torch.arange(9).expand(3, 2, 9))
    kv, layer = LayerKV(), text.layers[1]
    expected = run_layer(layer, hidden, angles, kv, None)
    epsilon, activation = text.config.rms_norm_eps, layer.mlp.act_fn
    found = text_layer(hidden, *angles, TextWeights.of(layer), epsilon=epsilon, activation=activation)
    for one, other in zip(found, (expected, kv.keys, kv.values), strict=True):
        assert torch.equal(one, other)
    patches, block = torch.randn(3 * 8, 96, generator=generator).to(dtype), vision.blocks[1]
    cos, sin = torch.randn(2, 3 * 8, 24, generator=generator)
    ends = torch.tensor([0, 24])
    expected = block(patches, cu_seqlens=ends, position_embeddings=(cos, sin), images=3)
    apart = (each.unflatten(0, (3, 8)) for each in (patches, cos, sin))
    settings = {"heads": block.attn.num_heads, "epsilon": block.norm1.eps, "activation": block.mlp.act_fn}
    assert torch.equal(vision_block(*apart, VisionWeights.of(block), **settings).flatten(0, 1), expected)


def test_nothing_is_compiled_again(tiny_checkpoint, prompts, relative_error):
    plain, compiled = (load_vlm(str(tiny_checkpoint), dtype=torch.float32) for _ in range(2))
    compiled.compile(backend="eager")
    for group in (prompts[:3], prompts[::2], prompts[1::2], prompts[:2], prompts[:1]):
        for found, expected in zip(compiled.prefill_batch(group), plain.prefill_batch(group), strict=True):
            assert found.prefix_len == expected.prefix_len
            for name in ("keys", "values", "hidden"):
                assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5
        assert counters["stats"]["unique_graphs"] == 2  # a text layer and a vision block


def test_one_prompt_at_a_time_is_compiled_too(tiny_checkpoint, prompts, relative_error):
    plain, compiled = (load_vlm(str(tiny_checkpoint), dtype=torch.float32) for _ in range(2))
    compiled.compile(backend="eager")
    for one in prompts[:3]:
        (found,), (expected,) = (vlm.prefill_batch([one]) for vlm in (compiled, plain))
        assert relative_error(found.keys, expected.keys) < 1e-5
        assert counters["stats"]["unique_graphs"] == 2


def test_weights_that_take_turns_in_one_layer_share_its_code(tiny_checkpoint, prompts):
    """As those of streamed layers do."""
    vlm, states = load_vlm(str(tiny_checkpoint), dtype=torch.float32), []
    vlm.compile(backend="eager")
    for _ in range(2):
        states.append(vlm.prefill_batch(prompts[:2])[0].keys)
        for layer in vlm.model.language_model.layers:
            layer.load_state_dict({name: 0.5 * tensor for name, tensor in layer.state_dict().items()})
        vlm.model.language_model.layers[0].mlp.down_proj.weight.data = torch.zeros(128, 256)
    assert not torch.equal(*states)
    assert counters["stats"]["unique_graphs"] == 2


def test_images_of_several_sizes_go_one_by_one(golden, golden_dir, golden_prefixes, relative_error):
    vlm = load_vlm(str(golden_dir))
    vlm.compile(backend="eager")
    clips = [SimpleNamespace(**{key: golden[f"clip{clip}.{name}"] for key, name in NAMES.items()}) for clip in range(3)]
    assert len({tuple(size) for one in clips for size in one.image_grid_thw.tolist()}) > 1
    for found, expected in zip(vlm.prefill_batch(clips), golden_prefixes, strict=True):
        assert relative_error(found.keys, expected.keys) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_rollouts_begin_with_compiled_prefixes(tiny_checkpoint, prompts):
    checkpoint, found = Checkpoint(str(tiny_checkpoint)), []
    builder = InputBuilder(checkpoint)
    for compiled in (False, True):
        vlm = load_vlm(checkpoint, dtype=torch.float32)
        if compiled:
            vlm.compile(backend="eager")
        sampler = RolloutSampler.load(checkpoint, vlm, builder)
        prefix = vlm.prefill_batch(prompts[:2])[0]
        found.append([tail.text for tail in sampler.sample(prefix, prompts[0].stem_len, rollouts=2, key="one")])
    assert found[0] == found[1]
    assert counters["stats"]["unique_graphs"] == 2


def test_where_nothing_can_be_compiled_it_runs_as_it_is(tiny_checkpoint, prompts, caplog, relative_error):
    def refuse(*_):
        raise RuntimeError("no compiler here")

    plain, compiled = (load_vlm(str(tiny_checkpoint), dtype=torch.float32) for _ in range(2))
    compiled.compile(backend=refuse)
    found, expected = (vlm.prefill_batch(prompts[:2])[0] for vlm in (compiled, plain))
    assert relative_error(found.keys, expected.keys) < 1e-5
    (warning,) = (record.message for record in caplog.records if record.name.startswith("alpacache"))
    assert "cannot be compiled on this machine" in warning
    assert "no compiler here" in warning


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own use of torch.jit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_no_less_exact(dtype, golden, golden_dir, golden_prefixes, relative_error, caplog):
    """In float32 to 1e-5 of what transformers gives, and as far from the public code; in bfloat16 nearer float32."""
    plain, compiled = (load_vlm(str(golden_dir), dtype=dtype) for _ in range(2))
    compiled.compile()
    clips = [SimpleNamespace(**{key: golden[f"clip{clip}.{name}"] for key, name in NAMES.items()}) for clip in (0, 0)]
    found, expected = (vlm.prefill_batch(clips)[0] for vlm in (compiled, plain))
    for name in ("keys", "values", "hidden"):
        exact = getattr(golden_prefixes[0], name)
        fused, eager = (relative_error(getattr(one, name), exact) for one in (found, expected))
        if dtype == torch.float32:
            assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5
            assert relative_error(getattr(found, name), golden[f"clip0.{name}"]) <= 1e-4
        else:
            assert 0 < fused <= eager
    assert counters["stats"]["unique_graphs"] == 2
    assert not [record for record in caplog.records if record.name.startswith("alpacache")]
