"""Two-part attention against stock attention: concatenate, expand, softmax."""

import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alpacache import flow_matching
from alpacache.alpamayo import load_expert
from alpacache.alpamayo import partial_attention as part
from alpacache.alpamayo.prefix_attention import PrefixCall, attend

HEADS, KV_HEADS = 4, 2
SCALE = 0.3


class ScratchPrefix:
    """Hands out the one buffer that it overwrites at each call, as a decoder of quantised layers would."""

    def __init__(self, keys, values, lengths):
        self.stored = (keys, values)
        self.scratch = (torch.empty_like(keys[0]), torch.empty_like(values[0]))
        self.lengths = torch.tensor(lengths, device=keys.device)
        self.starts = self.lengths
        self.ragged = min(lengths) < keys.shape[3]
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


def flash_dense(query, keys, values, dropout, causal, debug, *, scale):
    """What torch's kernel does, for the CPU: grouped heads, square causal mask, output strided by token."""
    group = query.shape[1] // keys.shape[1]
    assert dropout == 0
    assert not causal or query.shape[2] == keys.shape[2]
    repeated = [tensor.repeat_interleave(group, 1) for tensor in (keys, values)]
    output, lse = part.explicit(query, *repeated, scale, causal=causal)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, lse, None, None, query.shape[2], keys.shape[2], torch.zeros(2), torch.zeros(0), None


def flash_dense_backward(grad, query, keys, values, output, lse, _q, _k, max_q, max_k, dropout, causal, *state, scale):
    group = query.shape[1] // keys.shape[1]
    assert (max_q, max_k, len(state)) == (query.shape[2], keys.shape[2], 2)
    assert lse.is_contiguous()
    repeated = [tensor.repeat_interleave(group, 1) for tensor in (keys, values)]
    grads = part.explicit_backward(grad, query, *repeated, output, lse, scale, causal=causal)
    return grads[0], *(tensor.unflatten(1, (-1, group)).sum(2) for tensor in grads[1:])


def spans(cumulative):
    assert cumulative.dtype == torch.int32
    return [slice(*pair) for pair in zip(cumulative.tolist(), cumulative[1:].tolist(), strict=False)]


def flash_ragged(query, keys, values, queries_at, keys_at, max_q, max_k, dropout, causal, debug, *, scale):
    output, lse = torch.full_like(query, torch.nan), torch.full((1, len(query)), torch.nan, dtype=query.dtype)
    for rows, columns in zip(spans(queries_at), spans(keys_at), strict=True):
        if rows.start < rows.stop:
            assert rows.stop - rows.start <= max_q
            assert columns.stop - columns.start <= max_k
            parts = [
                tensor[None, span, 0][None] for tensor, span in ((query, rows), (keys, columns), (values, columns))
            ]
            output[rows, 0], lse[0, rows] = (result[0, 0] for result in part.explicit(*parts, scale))
    return output, lse, torch.zeros(2), torch.zeros(0), None


def flash_ragged_backward(
    grad, query, keys, values, output, lse, queries_at, keys_at, max_q, max_k, dropout, causal, *state, scale
):
    query_grad = torch.full_like(query, torch.nan)
    for rows, columns in zip(spans(queries_at), spans(keys_at), strict=True):
        if rows.start < rows.stop:
            across = [tensor[None, rows, 0][None] for tensor in (grad, query, output)]
            along = [tensor[None, columns, 0][None] for tensor in (keys, values)]
            result = part.explicit_backward(*across[:2], *along, across[2], lse[None, :, rows], scale, frozen=True)
            query_grad[rows, 0] = result[0][0, 0]
    return query_grad, torch.zeros_like(keys), torch.zeros_like(values)


@pytest.mark.parametrize(("lengths", "draws"), CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_are_called_right(lengths, draws, causal, monkeypatch, relative_error):
    """The CUDA path's folding and walk through padding, with the kernels' contracts played on the CPU."""
    monkeypatch.setattr(part, "has_flash", lambda query: True)
    for name in ("flash_dense", "flash_dense_backward", "flash_ragged", "flash_ragged_backward"):
        monkeypatch.setattr(part, f"_{name}", globals()[name])
    case = make_case(lengths, draws)
    for got, expected in zip(two_part(*case, causal=causal), stock(*case, causal=causal), strict=True):
        assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize("ragged", [False, True])
def test_calls_fit_the_kernels_schemas(ragged, monkeypatch):
    """Shapes alone, by torch's own meta kernels."""
    monkeypatch.setattr(part, "has_flash", lambda query: True)
    own, prefix, grad = make_case([9, 4 if ragged else 9], 2, dtype=torch.bfloat16, device="meta", dim=32)
    for causal in (False, True):
        output, *grads = two_part(own, prefix, grad, causal=causal)
        assert output.shape == own[0].shape
        assert [tensor.shape for tensor in grads] == [tensor.shape for tensor in own]


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


def full_size(lengths, draws):
    """The released expert's shapes in bfloat16 on the GPU."""
    return make_case(lengths, draws, dtype=torch.bfloat16, device="cuda", heads=16, kv_heads=8, tokens=64, dim=128)


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
GPU_CASES = [([256, 256], 1), ([809, 809], 4), ([809, 1, 333], 1), ([1, 100, 64, 65], 4), ([1], 1), ([3050] * 4, 1)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("lengths", "draws"), GPU_CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_are_as_exact_as_sdpa(lengths, draws, causal, relative_error):
    own, prefix, grad = full_size(lengths, draws)
    assert part.has_flash(own[0])
    scale = 128**-0.5
    got = two_part(own, prefix, grad, causal=causal, scale=scale)
    usual = stock(own, prefix, grad, causal=causal, scale=scale, sdpa=True)
    own64 = [tensor.detach().double().requires_grad_() for tensor in own]
    exact = stock(own64, prefix, grad.double(), causal=causal, scale=scale)
    for name, tensor, sdpa, expected in zip(("output", "dq", "dk", "dv"), got, usual, exact, strict=True):
        error = relative_error(tensor, expected)
        assert error <= 1e-2, name
        assert error <= 1.5 * relative_error(sdpa, expected), name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves serve the capture and plain calls
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_never_wait_and_replay_as_a_graph(causal, relative_error):
    """Captured once, then replayed with other lengths and other contents of the same buffers."""
    own, prefix, grad = full_size([300, 1, 77], 2)
    two_part(own, prefix, grad, causal=causal)
    torch.cuda.synchronize()
    with waiting_refused():
        two_part(own, prefix, grad, causal=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = two_part(own, prefix, grad, causal=causal)
    with torch.no_grad():
        own[0].mul_(-1)
        prefix.stored[0].mul_(-1)
        prefix.lengths.copy_(torch.tensor([2, 300, 129]))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, two_part(own, prefix, grad, causal=causal), strict=True):
        assert relative_error(got.cpu(), expected.cpu()) <= 1e-3


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
