"""The VLM's prefill at full size, random weights: layers as transformers has them, and compiled in several ways.

A row is one way with one camera set, as many samples as `extract` takes at once, pixels page-locked. `samples_s` is the
whole of `prefill_batch`, `over_eager` its ratio to the first row's. `text_ms` and `vision_ms` are all layers and the
whole tower alone, `layer_ms` and `block_ms` one of them, `host_ms` how long Python took to launch everything.
`start_s` is what the first prefill takes longer than others, with nothing kept from earlier runs; `restart_s` the same
where the compiler finds its files. `graphs` counts pieces of compiled code after prefills of other lengths
and rows. Errors are relative L2 differences from the same weights in float32: `layer_error` of what one layer adds,
`keys_error` and `values_error` over all layers of a whole prefill, `hidden_error` behind the last.
`bench_prefill_turns.py` tells ways apart that differ by less than two runs do.
"""

import copy
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import full_size
import numpy as np
import torch
import torch._functorch.config
import torch._inductor.config
from benchmark_report import arguments, finish, hardware_name
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from alpacache.alpamayo import Checkpoint, FrozenVLM, PrefixFeatures, compiled_layers
from alpacache.alpamayo.backbone import cache_argument
from alpacache.alpamayo.text_layers import LayerKV, run_layer
from alpacache.planning.time_model import prefill_batch

TOKENS = {1: 809, 4: 2993}
"""Cameras -> length of R1's prompt."""
QUICK_TOKENS, QUICK_GRID = {1: 60, 4: 200}, (1, 4, 6)
WAYS = ("eager", "compiled", "cudnn", "joined", "transformers", "fixed sizes", "joined cudnn")
"""`eager`: layer by layer as transformers has them; `transformers`: its own forward over all. `compiled`: as `extract`
does it; the others differ from that in one thing each: attention is cuDNN's, query, key and value are one product and
gate and up another, or lengths are no symbols."""
MORE_WAYS = ("gelu", "padded 96", "cudnn joined gelu")
"""Measured if asked for: the tower's activation in the product's epilogue, its heads padded, several at once."""
PROFILED = ("eager", "compiled", "cudnn", "gelu", "padded 96", "cudnn joined gelu")
EVERYWHERE = WAYS[:4]
"""Ways that are measured with each camera set by default; the others with the first."""
_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def make_vlm(checkpoint_dir: Path) -> FrozenVLM:
    """Random weights in bfloat16."""
    model = full_size.random_vlm(checkpoint_dir, full_size.device()).model.to(torch.bfloat16)
    return FrozenVLM(model, future_start_id=Checkpoint(str(checkpoint_dir)).config.traj_token_ids["future_start"])


def prompts(vlm: FrozenVLM, *, cameras: int, batch: int, shorter: int = 0) -> list[Any]:
    """Samples with random pixels; `shorter` by so many tokens of text."""
    small = vlm.device.type == "cpu"
    tokens, size = (QUICK_TOKENS, QUICK_GRID) if small else (TOKENS, full_size.GRID)
    config, images, patches = vlm.model.config, cameras * full_size.FRAMES, size[1] * size[2]
    image = [config.vision_start_token_id, *[config.image_token_id] * (patches // 4), config.vision_end_token_id]
    text = [5] * (tokens[cameras] - len(image) * images - shorter)
    generator, found = torch.Generator().manual_seed(cameras), []
    for _ in range(batch):
        pixels = torch.randn(images * patches, full_size.PATCH_VALUES, generator=generator).to(vlm.dtype)
        pixels = pixels if small else pixels.pin_memory()
        ids, grid = np.array(text[:20] + image * images + text[20:]), torch.tensor([size] * images)
        found.append(SimpleNamespace(input_ids=ids, pixel_values=pixels, image_grid_thw=grid))
    return found


@torch.inference_mode()
def whole_forward(vlm: FrozenVLM, inputs: Sequence[Any]) -> list[PrefixFeatures]:
    """`prefill_batch` of prompts of one length by transformers' own forward, which `extract` had before."""
    model, rows = vlm.model, [torch.from_numpy(one.input_ids) for one in inputs]
    found = [vlm._positions(row, one.image_grid_thw) for row, one in zip(rows, inputs, strict=True)]
    ids, cache = torch.stack(rows), DynamicCache(config=model.config.text_config)
    pixels = torch.cat([one.pixel_values.to(vlm.device, non_blocking=True) for one in inputs])
    output = model(
        input_ids=ids.to(vlm.device),
        pixel_values=pixels,
        image_grid_thw=torch.cat([one.image_grid_thw for one in inputs]).to(vlm.device),
        position_ids=torch.stack([positions for positions, _ in found], 1).to(vlm.device),
        mm_token_type_ids=(ids == model.config.image_token_id).int().to(vlm.device),
        use_cache=True,
        **{cache_argument(model): cache},
    )
    length = ids.shape[1]
    return [
        PrefixFeatures(
            keys=torch.stack([layer.keys[number] for layer in cache.layers]),
            values=torch.stack([layer.values[number] for layer in cache.layers]),
            hidden=output.last_hidden_state[number],
            rope_delta=delta,
            prefix_len=length,
            start_position=delta + length,
        )
        for number, (_, delta) in enumerate(found)
    ]


class Joined:
    """Text layers whose query, key and value are one product of matrices, and gate and up another."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[Tensor, ...]] = {}

    def of(self, layer: Any) -> tuple[Tensor, ...]:
        if id(layer) not in self._weights:
            attention, mlp = layer.self_attn, layer.mlp
            into = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            self._weights[id(layer)] = (
                layer.input_layernorm.weight,
                torch.cat(into),
                attention.q_norm.weight,
                attention.k_norm.weight,
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                mlp.down_proj.weight,
            )
        return self._weights[id(layer)]

    @staticmethod
    def layer(
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        weights: tuple[Tensor, ...],
        *,
        epsilon: float,
        activation: Callable[[Tensor], Tensor],
        add: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda to, values, weight: to + F.linear(values, weight),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `compiled_layers.text_layer`."""
        norm, into, query_norm, key_norm, output, post_norm, gate_up, down = weights
        rms, rotated = compiled_layers._rms_norm, compiled_layers._rotated
        width = query_norm.shape[0]
        queries = output.shape[1] // width
        groups = (into.shape[0] // width - queries) // 2
        all_heads = F.linear(rms(hidden, norm, epsilon), into).unflatten(2, (-1, width))
        query, key, value = all_heads.split([queries, groups, groups], dim=2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query = rotated(rms(query, query_norm, epsilon).transpose(1, 2), cos, sin)
        key = rotated(rms(key, key_norm, epsilon).transpose(1, 2), cos, sin)
        value = value.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = add(hidden, attended.transpose(1, 2).flatten(2), output)
        gate, up = F.linear(rms(hidden, post_norm, epsilon), gate_up).chunk(2, dim=-1)
        return add(hidden, activation(gate) * up, down), key, value


def other_block(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Any,
    *,
    heads: int,
    epsilon: float,
    activation: Any,
    gelu: bool,
    width: int = 0,
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """`vision_block` with the activation in the product's epilogue, heads padded to a width, or queries and keys turned
    together by something else.
    """
    norm = partial(F.layer_norm, normalized_shape=(hidden.shape[-1],), eps=epsilon)
    inner = norm(hidden, weight=weights.norm1, bias=weights.norm1_bias)
    qkv = F.linear(inner, weights.qkv, weights.qkv_bias).view(*hidden.shape[:2], 3, heads, -1)
    query, key, value = qkv.transpose(1, 3).unbind(2)
    size = query.shape[-1]
    if turn is None:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query, key = (compiled_layers._rotated(each.float(), cos, sin).to(hidden.dtype) for each in (query, key))
    else:
        both = turn(qkv[:, :, :2].float(), cos[:, :, None, None], sin[:, :, None, None]).to(hidden.dtype)
        query, key = both.transpose(1, 3).unbind(2)
    if width:
        query, key, value = (F.pad(each, (0, width - size)) for each in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=size**-0.5)[..., :size]
    hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), weights.output, weights.output_bias)
    inner = norm(hidden, weight=weights.norm2, bias=weights.norm2_bias)
    if gelu and inner.is_cuda:  # elsewhere this product's activation is the exact one
        flat = torch._addmm_activation(weights.inner_bias, inner.flatten(0, 1), weights.inner.t(), use_gelu=True)
        inner = flat.view(*inner.shape[:2], -1)
    else:
        inner = activation(F.linear(inner, weights.inner, weights.inner_bias))
    return hidden + F.linear(inner, weights.outer, weights.outer_bias)


def profile(call: Callable[[], Any]) -> None:
    """Print which kernels take the time of a prefill."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        _synchronise()
    total: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total.setdefault(event.name, []).append(event.device_time)
    busy = sum(map(sum, total.values()))
    print(f"  kernels {busy / 1e3:.1f} ms", flush=True)
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))[:24]:
        each = f"{len(times):5d} x {sum(times) / len(times):8.1f} us"
        print(f"  {sum(times) / 1e3:8.2f} ms {each}  {name[:110]}", flush=True)


@contextmanager
def changed(way: str, joined: Joined) -> Iterator[None]:
    """Within it layers compile and run as this way has them."""
    with ExitStack() as stack:
        if "cudnn" in way:
            stack.enter_context(sdpa_kernel(list(_FIRST), set_priority=True))
        if "gelu" in way or "padded" in way:
            width = int(way.split()[1]) if "padded" in way else 0
            block = partial(other_block, gelu="gelu" in way, width=width)
            stack.enter_context(mock.patch.object(compiled_layers, "vision_block", block))
        if "joined" in way:
            stack.enter_context(mock.patch.object(compiled_layers, "TextWeights", joined))
            stack.enter_context(mock.patch.object(compiled_layers, "text_layer", Joined.layer))
        yield


def tower_parts(vlm: FrozenVLM) -> list[Any]:
    """Modules of the tower whose forward `vlm.compile` replaces."""
    return [vlm.model.visual.patch_embed, *vlm.model.visual.blocks]


def run_plain(vlm: FrozenVLM) -> None:
    """Undo `vlm.compile`."""
    vlm._run_layer = run_layer
    for module in tower_parts(vlm):
        module.__dict__.pop("forward", None)


@contextmanager
def going(way: str, vlm: FrozenVLM, backend: str, kept: Path) -> Iterator[None]:
    """Within it `vlm` goes this way; the compiler keeps its files in `kept`."""
    torch._dynamo.reset()
    counters.clear()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(kept)}))
        if way == "fixed sizes":
            stack.enter_context(mock.patch.object(torch._dynamo, "mark_dynamic"))
        stack.enter_context(changed(way, Joined()))
        stack.enter_context(mock.patch.object(torch._inductor.config, "fx_graph_cache", way == "compiled"))
        stack.enter_context(mock.patch.object(torch._functorch.config, "enable_autograd_cache", way == "compiled"))
        try:
            if way not in ("eager", "transformers"):
                kept.mkdir(exist_ok=True)
                vlm.compile(backend=backend)
            yield
        finally:
            run_plain(vlm)


def seconds(call: Callable[[], Any], *, rounds: int) -> float:
    """The median round's, the device's work included."""
    found = []
    for _ in range(rounds):
        _synchronise()
        started = time.perf_counter()
        call()
        _synchronise()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@torch.inference_mode()
def parts(vlm: FrozenVLM, inputs: Sequence[Any], *, rounds: int) -> dict[str, float]:
    """Milliseconds of text model, vision tower, and one layer of each."""
    model: Any = vlm.model
    text, visual, grids = model.language_model, model.visual, torch.cat([one.image_grid_thw for one in inputs])
    pixels = torch.cat([one.pixel_values.to(vlm.device) for one in inputs])
    rows = vlm.begin(inputs).prompts
    hidden = rows.hidden

    def whole_text() -> None:
        rows.hidden = hidden.clone()
        for number, layer in enumerate(text.layers):
            rows.advance(number, layer, LayerKV())

    def one_layer() -> None:
        rows.run_layer(text.layers[-1], hidden, rows.angles, LayerKV(), None)

    patches = visual.patch_embed(pixels)
    cos = torch.randn(len(pixels), visual.config.hidden_size // visual.config.num_heads, device=vlm.device)
    ends = torch.tensor([0, len(pixels)])

    def block() -> None:
        visual.blocks[-1](patches, cu_seqlens=ends, position_embeddings=(cos, cos), images=len(grids))

    calls = {
        "text_ms": whole_text,
        "vision_ms": lambda: visual(pixels, grid_thw=grids.to(vlm.device)),
        "layer_ms": one_layer,
        "block_ms": block,
        "patch_embed_ms": lambda: visual.patch_embed(pixels),
    }
    for call in calls.values():
        call()
    return {name: 1e3 * seconds(call, rounds=rounds) for name, call in calls.items()}


@torch.inference_mode()
def layer_error(vlm: FrozenVLM, exact: Any, inputs: Sequence[Any], run: Callable[..., Tensor]) -> float:
    """Error of what the first layer adds to its input."""
    rows = vlm.begin(inputs).prompts
    text: Any = vlm.model.language_model
    after = run(text.layers[0], rows.hidden, rows.angles, LayerKV(), None).float()
    cos, sin = (angles.float() for angles in rows.angles)
    expected = run_layer(exact.language_model.layers[0], rows.hidden.float(), (cos, sin), LayerKV(), None)
    return float((after - expected).norm() / (expected - rows.hidden.float()).norm())


def errors(found: Sequence[PrefixFeatures], exact: Sequence[PrefixFeatures]) -> dict[str, float]:
    result = {}
    for name in ("keys", "values", "hidden"):
        difference = total = 0.0
        for one, other in zip(found, exact, strict=True):
            expected = getattr(other, name).to(getattr(one, name).device)
            difference += float((getattr(one, name).float() - expected).square().sum(dtype=torch.float64))
            total += float(expected.square().sum(dtype=torch.float64))
        result[f"{name}_error"] = (difference / total) ** 0.5
    return result


def measure(
    way: str,
    vlm: FrozenVLM,
    exact: FrozenVLM,
    cameras: int,
    reference: Sequence[PrefixFeatures],
    *,
    kept: Path,
    quick: bool,
) -> dict[str, Any]:
    """A row."""
    batch = len(reference)
    inputs, rounds = prompts(vlm, cameras=cameras, batch=batch), 1 if quick else 7
    row: dict[str, Any] = {"way": way, "cameras": cameras, "batch": batch, "tokens": len(inputs[0].input_ids)}
    backend, compiled = "eager" if quick else "inductor", way not in ("eager", "transformers")
    is_new = not kept.exists()
    prefill = whole_forward if way == "transformers" else FrozenVLM.prefill_batch
    with going(way, vlm, backend, kept):
        first = seconds(lambda: prefill(vlm, inputs), rounds=1)
        row |= errors(prefill(vlm, inputs), reference)
        each = seconds(lambda: prefill(vlm, inputs), rounds=rounds)
        started = time.perf_counter()
        found = prefill(vlm, inputs)
        row["host_ms"] = 1e3 * (time.perf_counter() - started)
        del found
        row |= {"batch_ms": 1e3 * each, "samples_s": batch / each, **parts(vlm, inputs, rounds=rounds)}
        row["layer_error"] = layer_error(vlm, exact.model, inputs, vlm._run_layer)
        if vlm.device.type == "cuda" and way in PROFILED:
            profile(lambda: prefill(vlm, inputs))
        if compiled:
            row["start_s" if is_new else "restart_s"] = first - each
            for shorter, rows in ((3, batch), (5, max(2, batch - 1)), (0, 1)):
                prefill(vlm, prompts(vlm, cameras=cameras, batch=rows, shorter=shorter))
            row["graphs"] = counters["stats"]["unique_graphs"]
    return row


def run(vlm: FrozenVLM, options: Any, kept: Path) -> Iterator[Mapping[str, Any]]:
    """Rows, those that matter most first."""
    exact = FrozenVLM(copy.deepcopy(vlm.model).float(), future_start_id=vlm.future_start_id)
    ways = [(cameras, way) for cameras in options.cameras for way in options.ways if way in EVERYWHERE]
    ways += [(options.cameras[0], way) for way in options.ways if way not in EVERYWHERE]
    references: dict[int, list[PrefixFeatures]] = {}
    first: dict[int, float] = {}
    for cameras, way in ways:
        if time.perf_counter() > options.until:
            print(f"no time is left for {way} with {cameras} cameras", flush=True)
            continue
        _tidy()
        if cameras not in references:
            batch = 2 if options.quick else prefill_batch(cameras=cameras, frames=full_size.FRAMES)
            references[cameras] = exact.prefill_batch(prompts(vlm, cameras=cameras, batch=batch))
        given = {"kept": kept / way.replace(" ", "-"), "quick": options.quick}
        try:
            row = measure(way, vlm, exact, cameras, references[cameras], **given)
        except Exception as error:  # one way less; the others are measured
            told = " ".join(f"{type(error).__name__}: {error}".split())
            yield {"way": way, "cameras": cameras, "note": told[:300]}
            continue
        row["over_eager"] = row["samples_s"] / first.setdefault(cameras, row["samples_s"])
        yield row


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4], choices=sorted(TOKENS))
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=WAYS + MORE_WAYS, help="the first is compared with"
    )
    parser.add_argument("--seconds", type=float, default=3600, help="begin no row later than that")
    options = parser.parse_args()
    options.until = time.perf_counter() + options.seconds
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(full_size, "_expert_state", return_value={"vlm.placeholder": torch.zeros(1)}):
            checkpoint_dir = full_size.write_checkpoint(Path(folder) / "model", small=options.quick)
        vlm = make_vlm(checkpoint_dir)
        for row in run(vlm, options, Path(folder)):
            print(json.dumps(row), flush=True)
            rows.append(row)
    finish("prefill", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()
