"""Two-part attention against stock attention: concatenate, expand, softmax."""

import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alpacache import flow_matching
from alpacache.alpamayo import load_expert
from alpacache.alpamayo.prefix_attention import PrefixCall, _layer_attention, attend
from alpacache.prefix.calibration import KVSample, calibrate
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.packed import pack
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures
from cache_store import CODECS, TransformCodec
from cache_store.kv.transform import TransformTables

HEADS, KV_HEADS = 4, 2
SCALE = 0.3


class ScratchPrefix:
    """Hands out the one buffer that it overwrites at each call, as a decoder of quantised layers would."""

    def __init__(self, keys, values, lengths):
        self.stored = (keys, values)
        self.scratch = (torch.empty_like(keys[0]), torch.empty_like(values[0]))
        self.lengths = torch.tensor(lengths, device=keys.device)
        self.starts = self.lengths
        self.asked = []

    def layer(self, index):
        self.asked.append(index)
        for scratch, stored in zip(self.scratch, self.stored, strict=True):
            scratch.copy_(stored[index])
        return self.scratch


def make_case(lengths, draws, *, dtype=torch.float64, device="cpu", heads=HEADS, kv_heads=KV_HEADS, tokens=5, dim=8):
    """Query, key and value as the text model lays them out, a prefix of two layers, and a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    rows, longest = len(lengths) * draws, max(lengths)
    own = [normal(rows, tokens, count, dim).transpose(1, 2) for count in (heads, kv_heads, kv_heads)]
    prefix = ScratchPrefix(*(normal(2, len(lengths), kv_heads, longest, dim) for _ in range(2)), lengths)
    return [tensor.requires_grad_() for tensor in own], prefix, normal(rows, tokens, heads, dim).transpose(1, 2)


def two_part(own, prefix, grad, *, causal, scale=SCALE):
    """Output and gradients of the first layer; the second is asked for in between, so that scratch is overwritten."""
    call = PrefixCall(prefix=prefix, causal=causal)
    output = attend(*own, call, 0, scale)
    prefix.layer(1)
    return [output, *torch.autograd.grad(output, own, grad)]


def stock_mask(prefix, draws, tokens, causal):
    longest = prefix.stored[0].shape[3]
    valid = torch.arange(longest, device=prefix.lengths.device) < prefix.lengths[:, None]
    valid = valid.repeat_interleave(draws, 0)[:, None, None].expand(-1, 1, tokens, -1)
    own = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device)
    return torch.cat([valid, (own.tril() if causal else own).expand(*valid.shape[:2], -1, -1)], dim=-1)


def stock(own, prefix, grad, *, causal, scale=SCALE, sdpa=False):
    query, key, value = own
    draws = len(query) // len(prefix.lengths)
    mask = stock_mask(prefix, draws, query.shape[2], causal)
    keys, values = (
        torch.cat([stored[0].repeat_interleave(draws, 0).to(tensor.dtype), tensor], dim=2).repeat_interleave(
            query.shape[1] // key.shape[1], 1
        )
        for stored, tensor in zip(prefix.stored, (key, value), strict=True)
    )
    if sdpa:
        output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    else:
        output = (query @ keys.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ values
    return [output, *torch.autograd.grad(output, own, grad)]


CASES = [([6, 6, 6], 1), ([6, 6], 4), ([6, 1, 3], 1), ([1, 6, 4], 4), ([1], 1)]


@pytest.mark.parametrize(("lengths", "draws"), CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_output_and_gradients_equal_stock(lengths, draws, causal, dtype, bound, relative_error):
    case = make_case(lengths, draws, dtype=dtype)
    for got, expected in zip(two_part(*case, causal=causal), stock(*case, causal=causal), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= bound


def test_bfloat16_stays_within_its_rounding(relative_error):
    own, prefix, grad = make_case([6, 1, 3], 2, dtype=torch.bfloat16)
    got = two_part(own, prefix, grad, causal=False)
    exact = stock([tensor.detach().double().requires_grad_() for tensor in own], prefix, grad.double(), causal=False)
    for tensor, expected in zip(got, exact, strict=True):
        assert tensor.dtype == torch.bfloat16
        assert relative_error(tensor, expected) <= 5e-3


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    own, prefix, _ = make_case([3, 1], 2, tokens=2, dim=4)
    call = PrefixCall(prefix=prefix, causal=causal)
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, call, 1, SCALE), own)


def test_prefix_is_asked_for_twice_and_never_kept():
    own, prefix, grad = make_case([6, 3], 2)
    for stored in prefix.stored:
        stored.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = attend(*own, PrefixCall(prefix=prefix, causal=False), 1, SCALE)
    output.backward(grad)
    assert prefix.asked == [1, 1]
    assert all(stored.grad is None for stored in prefix.stored)
    scratch = {tensor.data_ptr() for tensor in prefix.scratch}
    assert kept
    assert all(tensor.data_ptr() not in scratch and tensor.numel() <= own[0].numel() for tensor in kept)


def test_refuses_what_does_not_fit():
    own, prefix, _ = make_case([4, 4], 1)
    call = PrefixCall(prefix=prefix, causal=False)
    with pytest.raises(ValueError, match="hand the prefix over"):
        attend(*(tensor.float() for tensor in own), call, 0, SCALE)
    with pytest.raises(ValueError, match="do not fit"):
        attend(*(tensor[:1] for tensor in own), call, 0, SCALE)


def expert_loss(expert, golden, prefixes, *, causal):
    """Loss and parameter gradients of a ragged batch with two draws a sample."""
    cases = [
        {name: golden[f"clip{clip}.{name}"] for name in ("action", "noise", "noisy_action", "t")} for clip in (0, 2)
    ]
    stacked = {name: torch.stack([case[name] for case in cases]) for name in cases[0]}
    expert.zero_grad()
    velocity = expert.velocity(stacked["noisy_action"], stacked["t"], [prefixes[0], prefixes[2]], causal=causal)
    loss = flow_matching.loss(velocity, stacked["action"][:, None], stacked["noise"]).mean()
    loss.backward()
    return loss, {name: weight.grad.clone() for name, weight in expert.named_parameters()}


@pytest.fixture(scope="module")
def experts(golden_dir):
    return {name: load_expert(str(golden_dir), attention=name) for name in ("prefix", "sdpa", "eager")}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_expert_trains_as_with_stock_attention(causal, reference, experts, golden, golden_prefixes, relative_error):
    loss, grads = expert_loss(experts["prefix"], golden, golden_prefixes, causal=causal)
    expected_loss, expected = expert_loss(experts[reference], golden, golden_prefixes, causal=causal)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) <= 1e-5, name


def test_checkpointing_changes_nothing(golden_dir, experts, golden, golden_prefixes, relative_error):
    _, expected = expert_loss(experts["prefix"], golden, golden_prefixes, causal=False)
    expert = load_expert(str(golden_dir)).train()
    for layer in expert.expert.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    _, grads = expert_loss(expert, golden, golden_prefixes, causal=False)
    assert all(relative_error(grads[name], grad) <= 1e-6 for name, grad in expected.items())


def test_autocast_equals_stock_within_bfloat16(golden_dir, golden, golden_prefixes, relative_error):
    """float32 queries from rotary embedding, bfloat16 values and prefix."""
    noisy, t = golden["clip0.noisy_action"][None], golden["clip0.t"][None]
    exact = load_expert(str(golden_dir)).velocity(noisy, t, golden_prefixes[:1])
    errors = {}
    for name in ("prefix", "sdpa"):
        velocity = load_expert(str(golden_dir), dtype=torch.bfloat16, attention=name).velocity(
            noisy, t, golden_prefixes[:1]
        )
        assert velocity.dtype == torch.bfloat16
        errors[name] = relative_error(velocity, exact)
    assert errors["prefix"] <= 1.2 * errors["sdpa"]


def test_masks_and_unknown_names_are_refused(golden_dir, experts):
    with pytest.raises(ValueError, match="expected one of prefix, sdpa, eager"):
        load_expert(str(golden_dir), attention="flash")
    embeds = torch.zeros(1, 4, experts["prefix"].expert.config.hidden_size)
    with pytest.raises(ValueError, match="needs prefix_call"):
        experts["prefix"].expert(inputs_embeds=embeds, use_cache=False)


@contextmanager
def waiting_refused():
    """An error for every call that waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype, once
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_expert_on_the_gpu(golden_dir, golden, golden_prefixes, relative_error):
    """The whole expert under autocast, ragged, without waiting for the device once the prefixes are there."""
    noisy, t = (torch.stack([golden[f"clip{clip}.{name}"] for clip in (0, 2)]) for name in ("noisy_action", "t"))
    ragged = [golden_prefixes[0], golden_prefixes[2]]
    exact = load_expert(str(golden_dir)).velocity(noisy, t, ragged)
    noisy, t = noisy.cuda(), t.cuda()
    errors = {}
    for name in ("prefix", "sdpa"):
        expert = load_expert(str(golden_dir), dtype=torch.bfloat16, device="cuda", attention=name)
        batch = expert.batch(ragged)
        velocity = expert.velocity(noisy, t, batch)
        assert velocity.dtype == torch.bfloat16
        errors[name] = relative_error(velocity.cpu(), exact)
        if name == "prefix":
            with waiting_refused():
                expert.velocity(noisy, t, batch).float().square().mean().backward()
    assert errors["prefix"] <= 1.5 * errors["sdpa"]


@pytest.mark.parametrize("codec", ["bf16", "int8", "transform:5"])
def test_compiling_does_not_look_into_what_is_cached(codec):
    """A codec's tables of numpy arrays ended in an error of torch.compile, and lengths would be compiled for."""
    samples = [
        KVSample(kv=torch.randn(2, 2, KV_HEADS, 96, 16).bfloat16(), positions=torch.arange(96).expand(3, -1))
        for _ in range(4)
    ]
    known = CODECS.get(codec)
    if codec.startswith("transform"):
        angles, axes = torch.linspace(1, 0.01, 8), torch.zeros(8, dtype=torch.long)
        found = calibrate(samples, rate=5, angles=angles, axes=axes, device=torch.device("cpu"))
        known = TransformCodec.of(5, TransformTables.from_bytes(found.calibrated.to_bytes(), "here"))  # as a store's
    compilations, first = [], 0

    def backend(graph, inputs):
        compilations.append(len(inputs))
        return graph.forward

    def layer(module, query, key, value, **how):
        found, _ = _layer_attention(module, 2 * query, key, value, None, scaling=0.25, **how)
        return 2 * found

    compiled = torch.compile(layer, backend=backend)
    module = torch.nn.Module()
    module.prefix_layer = 1
    for length in (90, 61, 33):
        kv = samples[0].kv[:, :, :, :length]
        lengths = {"prefix_len": length, "start_position": length, "rope_delta": 0}
        if known is None:
            prefix = PrefixFeatures(keys=kv[:, 0], values=kv[:, 1], hidden=None, **lengths)
        else:
            data = tensor_codec(known).encode(kv)
            prefix = EncodedPrefix(data=data, codec=known, shape=tuple(kv.shape), **lengths)
        call = PrefixCall(prefix=pack([prefix], device=torch.device("cpu"), dtype=torch.bfloat16), causal=False)
        own = [torch.randn(1, heads, 5, 16).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)]
        wanted, got = (work(module, *own, prefix_call=call) for work in (layer, compiled))
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        first = first or len(compilations)
    assert len(compilations) == first
