"""What benchmarks at a released geometry run on, with random weights: checkpoint, store, VLM, the recipe's step.

Nothing here can be downloaded where it runs, and 20 GB must not take a minute, so samples of a store are made distinct
by the order of their layers: every layer is valid wherever it stands, quantised or not. `small` is the same at 4 layers
of 256 channels, so that every benchmark can be tried on a CPU.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLTextConfig, Qwen3VLTextModel

from alpacache import flow_matching
from alpacache.alpamayo import ActionExpert, Checkpoint, load_expert
from alpacache.alpamayo.backbone import cache_argument, empty_weights, expert_config, vlm_config
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.alpamayo.families import FAMILIES as KNOWN_FAMILIES
from alpacache.alpamayo.family import SPECIAL_TOKENS
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prefix_attention import PREFIX_ATTENTION
from alpacache.alpamayo.projection import ActionInProjection
from alpacache.alpamayo.tiny_checkpoint import ACTION_CONSTANTS
from alpacache.cached_samples.features import KV_SHAPE, store_fields
from alpacache.cached_samples.identity import store_identity
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import FUTURE_STEPS, HISTORY_STEPS, SampleRef
from alpacache.prefix.calibration import KVSample, angles_of, calibrate, turned
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.transform import TransformTensorCodec
from cache_store import CODECS, CacheReader, CacheWriter, KVCodec, TransformCodec
from cache_store.writer import stored_identity

PREFIX_TOKENS = {1: (800, 880), 4: (2900, 3050), 6: (4500, 4636)}
"""Cameras -> shortest and longest prefix of the public prompts."""
CAMERA_SETS = {1: (1,), 4: (0, 1, 2, 6), 6: (0, 1, 2, 3, 5, 6)}
FAMILIES = ("r1", "2")
"""Families whose released geometry is known here."""
FRAMES = 4
IMAGE_TOKENS = 180
GRID = (1, 20, 36)
"""Patches of one image: time, rows, columns."""
PATCH_VALUES = 1536
KV_HEADS, HEAD_DIM = 8, 128
FUTURE_BINS, HISTORY_BINS = 3000, 1000
_BASE_TOKENS = {
    "<|im_start|>": -25,
    "<|im_end|>": -24,
    "<|vision_start|>": -17,
    "<|vision_end|>": -16,
    "<|image_pad|>": -14,
    "<|video_pad|>": -13,
}
"""Ids relative to `<i0>`."""
_TEXT_SIZES = {
    "r1": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "2": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
_EXPERT_SIZES = {
    "r1": {"hidden_size": 2048, "intermediate_size": 8256},
    "2": {"hidden_size": 1536, "intermediate_size": 6144},
}
_HEADS = {"num_attention_heads": 16, "head_dim": HEAD_DIM}
_TRAJECTORY = FUTURE_BINS + HISTORY_BINS
_LAYER = "vlm.model.language_model.layers."
_SHARDS = 4
_LENGTHS = 16
"""Distinct prefix lengths in a store; each is generated (and encoded) once."""
_WRITERS = 8
_LEARNT_FROM = 8
"""Samples that a codec is learnt from."""
_KEYS = [20.5, 5.17, 3.48, 2.74, 2.27, 1.93, 1.66, 1.43, 1.23, 1.06, 0.913, 0.778, 0.65, 0.532, 0.413, 0.278]
_VALUES = [16.5, 6.26, 4.66, 3.78, 3.2, 2.75, 2.4, 2.11, 1.86, 1.64, 1.44, 1.25, 1.08, 0.917, 0.746, 0.527]
"""Deviations of a layer, at quantiles from the first component to the last (SmolLM2-135M)."""


class RandomKV:
    """Keys and values as a codec finds them: Laplacian in a random basis, with deviations as measured on a small real
    language model; `kv` makes samples."""

    def __init__(self, layers: int, heads: int, channels: int, device: torch.device) -> None:
        self.layers, self.heads, self.channels, self.device = layers, heads, channels, device
        self._generator = torch.Generator(device).manual_seed(0)
        width = heads * channels
        self._mixes = [[self._mix(width, quantiles) for quantiles in (_KEYS, _VALUES)] for _ in range(layers)]
        half = channels // 2
        self.angles = (1e6 ** (-torch.arange(half, device=device) / half)).float()
        self.axes = torch.arange(half, device=device) % 3

    def _mix(self, width: int, quantiles: list[float]) -> Tensor:
        known = torch.tensor(quantiles, device=self.device).log()
        place = torch.linspace(0, len(known) - 1, width, device=self.device)
        lower = place.long().clamp(max=len(known) - 2)
        deviation = torch.lerp(known[lower], known[lower + 1], place - lower).exp()
        basis, _ = torch.linalg.qr(torch.randn(width, width, device=self.device, generator=self._generator))
        return deviation[:, None] * basis / 8

    def kv(self, tokens: int) -> tuple[Tensor, Tensor]:
        """bfloat16 `[layer, 2, head, token, channel]`, and positions `[3, token]` on the CPU."""
        positions = torch.stack([torch.arange(tokens), torch.arange(tokens) // 30, torch.arange(tokens) % 30])
        angle = angles_of(positions.to(self.device), self.angles, self.axes)
        made = torch.empty(self.layers, 2, self.heads, tokens, self.channels, device=self.device)
        for layer, mixes in enumerate(self._mixes):
            for kind, mix in enumerate(mixes):
                shape = (2, tokens, len(mix))
                uniform = torch.rand(shape, device=self.device, generator=self._generator).clamp(1e-7)
                laplace = (uniform[0].log() - uniform[1].log()) / math.sqrt(2)
                x = (laplace @ mix).view(tokens, self.heads, -1).transpose(0, 1)
                made[layer, kind] = turned(x, angle.cos(), angle.sin()) if kind == 0 else x
        return made.to(torch.bfloat16), positions


def camera_names(cameras: int) -> tuple[str, ...]:
    return tuple(CAMERAS[index] for index in CAMERA_SETS[cameras])


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_checkpoint(directory: Path, *, small: bool, with_vlm: bool = False, family: str = "r1") -> Path:
    """The public layout with a released geometry, kept if it is there already.

    For the VLM's weights one number stands, unless `with_vlm`: then they are there and the expert's are not.
    """
    if (directory / INDEX).is_file():
        return directory
    _write_small_files(directory, small=small, family=family)
    if with_vlm:
        vlm = random_vlm(directory, device())
        state = {f"vlm.{name}": tensor.to("cpu", torch.bfloat16) for name, tensor in vlm.state_dict().items()}
        del vlm
    else:
        state = _expert_state(small, family) | {"vlm.placeholder": torch.zeros(1)}
    names = sorted(state)
    files = [f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors" for shard in range(_SHARDS)]
    parts = {file: names[shard::_SHARDS] for shard, file in enumerate(files)}
    with ThreadPoolExecutor(_SHARDS) as pool:
        list(pool.map(lambda file: save_file({name: state[name] for name in parts[file]}, directory / file), files))
    total = sum(tensor.nbytes for tensor in state.values())
    weight_map = {name: file for file, part in parts.items() for name in part}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return directory


def write_vlm(directory: Path, *, small: bool, family: str, layers: int) -> Path:
    """A checkpoint without an expert whose text layers from number `layers` on are holes: no disk holds all of them.

    What would read a layer that is one reads number `n % layers` in its place, see `held_layers`.
    """
    _write_small_files(directory, small=small, family=family)
    config = vlm_config(Checkpoint(str(directory)))
    with empty_weights(torch.bfloat16, torch.device("meta")):
        model = Qwen3VLForConditionalGeneration(config)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        stored, part = f"vlm.{name}", "rest"
        if stored.startswith(_LAYER):
            part = f"layer-{int(stored.removeprefix(_LAYER).partition('.')[0]):02d}"
        if name != "lm_head.weight":
            parts.setdefault(part, {})[stored] = tensor
    generator, weight_map = torch.Generator(device()).manual_seed(1), {}
    for part, tensors in parts.items():
        file = f"model-{part}.safetensors"
        if part != "rest" and int(part.partition("-")[2]) >= layers:
            _write_holes(directory / file, tensors)
        else:
            made = {name: _random_like(name, tensor, generator).cpu() for name, tensor in tensors.items()}
            save_file(made, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    _write_json(directory / INDEX, {"weight_map": weight_map})
    return directory


def held_layers(names: list[str], layers: int) -> list[str]:
    """Names of units of a text model, those of layers that are holes in the files replaced by those of others."""
    found = []
    for name in names:
        begin, _, number = name.removesuffix(".").rpartition(".")
        found.append(f"{begin}.{int(number) % layers}." if number.isdecimal() else name)
    return found


def _write_holes(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of zeros that take no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    made = torch.empty(tensor.shape, dtype=torch.bfloat16, device=generator.device)
    if tensor.ndim > 1:
        return made.normal_(std=0.02, generator=generator)
    return made.fill_(0.0 if name.endswith("bias") else 1.0)


def _write_small_files(directory: Path, *, small: bool, family: str) -> None:
    """Configs, tokenizer and image processor where the family has them."""
    first, nested = 64 if small else 151_669, family == "2"
    companion = directory if nested else directory / "vlm"
    companion.mkdir(parents=True, exist_ok=True)
    _tokenizer(first).save(str(companion / "tokenizer.json"))
    _write_json(companion / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    if nested:
        _write_json(directory / "config.json", _nested_config(first, small=small))
    else:
        _write_json(companion / "config.json", _vlm_config(first, small=small))
        _write_json(directory / "config.json", _config(first, small=small))


def write_store(
    directory: Path, checkpoint_dir: Path, *, cameras: int, codec: str, samples: int, shortest: int, longest: int
) -> CacheReader:
    """A store as `extract` with `hidden_states="none"` would begin it, of distinct samples with random KV.

    A store that holds as many samples already is kept. Lengths are drawn from 16 between shortest and longest. Those of
    one length are alike with the codec transform, of which a layer is valid at its own place only.
    """
    checkpoint = Checkpoint(str(checkpoint_dir))
    names, lengths = camera_names(cameras), np.unique(np.linspace(shortest, longest, _LENGTHS).round().astype(int))
    if stored_identity(directory) is not None and len(reader := CacheReader(directory)) >= samples:
        return reader
    random = RandomKV(expert_config(checkpoint).num_hidden_layers, KV_HEADS, HEAD_DIM, device())
    definition: KVCodec | None = CODECS.get(codec)
    if (wanted := TransformCodec.named(codec)) is not None:
        definition = learnt(wanted.rate, random, int(lengths.mean()))
    identity = store_identity(
        checkpoint,
        InputBuilder(checkpoint),
        cameras=names,
        frames=FRAMES,
        codec=codec,
        calibrated=definition,
        dtype="bfloat16",
    )
    writer = CacheWriter(
        directory,
        fields=store_fields(hidden_states=False, codec=definition),
        identity=identity,
        provenance={"source": "random"},
        codec_tables=None if definition is None else definition.tables_bytes,
    )
    reader = CacheReader(directory)
    layers = dict(zip(lengths.tolist(), _random_layers(random, lengths.tolist(), definition), strict=True))

    def write(number: int) -> None:
        writer.write(*_sample(number, layers, names, random.layers, coded=definition is not None))

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, range(samples)))
    reader.refresh()
    return reader


def random_expert(where: torch.device, dtype: torch.dtype, *, small: bool, family: str = "r1") -> ActionExpert:
    """A released expert's geometry without a checkpoint; as from `load_expert` otherwise."""
    text, known = _vlm_config(1, small=small, family=family)["text_config"], KNOWN_FAMILIES[family]
    config = Qwen3VLTextConfig(**text | _expert_sizes(family, small=small))
    config._attn_implementation = PREFIX_ATTENTION
    hidden = _projections(family, small=small)["action_in_proj_cfg"]["hidden_size"]
    with empty_weights(dtype, where):
        model = Qwen3VLTextModel(config)
        del model.embed_tokens
        how = {"rounded_to": torch.bfloat16, "persistent_constants": known.stores_constants}
        projection = ActionInProjection(config.hidden_size, hidden_size=hidden, **how)
        space, out = UnicycleActionSpace(**ACTION_CONSTANTS), nn.Linear(config.hidden_size, 2)
        expert = ActionExpert(model, projection, out, space, rounds_target=known.rounds_target)
    _randomise(expert, torch.Generator(where).manual_seed(0))
    return expert


def random_vlm(checkpoint_dir: Path, where: torch.device) -> Qwen3VLForConditionalGeneration:
    """The frozen VLM of the checkpoint's geometry; bfloat16 on a GPU, as the recipe has it."""
    config = vlm_config(Checkpoint(str(checkpoint_dir)))
    config._attn_implementation = "sdpa"
    with empty_weights(torch.bfloat16 if where.type == "cuda" else torch.float32, where):
        vlm = Qwen3VLForConditionalGeneration(config)
    _randomise(vlm, torch.Generator(where).manual_seed(1))
    return vlm.requires_grad_(False).eval()


def prompt(
    vlm: Qwen3VLForConditionalGeneration, *, cameras: int, batch: int, generator: torch.Generator
) -> tuple[dict[str, Any], int]:
    """What the VLM is given, as long as the stores' prefixes are on average, and the position of what follows."""
    length, images, config = sum(PREFIX_TOKENS[cameras]) // 2, cameras * FRAMES, vlm.config
    image = [config.vision_start_token_id, *[config.image_token_id] * IMAGE_TOKENS, config.vision_end_token_id]
    text = [5] * (length - len(image) * images)
    ids = torch.tensor([text[:30] + image * images + text[30:]], device=vlm.device).repeat(batch, 1)
    patches = (batch * images * GRID[1] * GRID[2], PATCH_VALUES)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(patches, generator=generator, device=vlm.device, dtype=vlm.dtype),
        "image_grid_thw": torch.tensor([GRID] * (batch * images), device=vlm.device),
    }
    return inputs, length - images * (IMAGE_TOKENS - GRID[2] // 2)


def recipe_step(
    vlm: Qwen3VLForConditionalGeneration, expert: ActionExpert, *, cameras: int, batch: int, labels: bool
) -> Callable[[], None]:
    """One step of the public recipe: VLM, expert on its cache through stock attention, clipping, fused AdamW in bf16.

    The prompt has the mean length of the stores' prefixes. `labels` has the VLM compute logits and loss of the whole
    vocabulary, as its forward with labels does; without them only the last token's logits.
    """
    where, generator = expert.device, torch.Generator(expert.device).manual_seed(2)
    inputs, start = prompt(vlm, cameras=cameras, batch=batch, generator=generator)
    inputs |= {"labels": inputs["input_ids"]} if labels else {"logits_to_keep": 1}
    positions = (torch.arange(FUTURE_STEPS, device=where) + start).expand(3, batch, -1)
    action, noise = (torch.randn(batch, FUTURE_STEPS, 2, generator=generator, device=where) for _ in range(2))
    t = torch.rand(batch, generator=generator, device=where)
    optimizer = torch.optim.AdamW(expert.parameters(), lr=1e-4, weight_decay=0.0, fused=where.type == "cuda")

    def step() -> None:
        with torch.no_grad():
            cache = getattr(vlm(**inputs, use_cache=True), cache_argument(vlm))
        with torch.autocast(where.type, torch.bfloat16, enabled=expert.dtype == torch.bfloat16):
            output = expert.expert(
                inputs_embeds=expert.action_in_proj(flow_matching.interpolate(action, noise, t), t),
                position_ids=positions,
                attention_mask=None,
                use_cache=True,
                is_causal=False,
                **{cache_argument(expert.expert): cache},
            )
            velocity = expert.action_out_proj(output.last_hidden_state)
        flow_matching.loss(velocity, action, noise, rounds_target=expert.rounds_target).mean().backward()
        nn.utils.clip_grad_norm_(expert.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_recipe(
    checkpoint_dir: Path, cameras: list[int], *, batches: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Rows of the recipe at rising batch, up to the first that is slower for a sample or does not fit.

    A time is the shortest of `rounds` pairs of steps, the first pair left out.
    """
    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    vlm = random_vlm(checkpoint_dir, where)
    expert = load_expert(str(checkpoint_dir), dtype=dtype, device=where, attention="sdpa").train()
    rows: list[dict[str, Any]] = []
    for count in cameras:
        best = 0.0
        for batch in batches:
            ways = (True, False) if batch == 1 else (False,)
            found = [_time_recipe(vlm, expert, count, batch, labels=labels, rounds=rounds) for labels in ways]
            rows += (done := [row for row in found if row is not None])
            if not done or (fastest := max(row["samples_s"] for row in done)) < best:
                break
            best = fastest
    return rows


def _time_recipe(
    vlm: Qwen3VLForConditionalGeneration, expert: ActionExpert, cameras: int, batch: int, *, labels: bool, rounds: int
) -> dict[str, Any] | None:
    """None if the step does not fit."""
    cuda = expert.device.type == "cuda"
    expert.zero_grad(set_to_none=True)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        step = recipe_step(vlm, expert, cameras=cameras, batch=batch, labels=labels)
        for _ in range(rounds):
            started = time.perf_counter()
            step()
            step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / 2)
    except torch.OutOfMemoryError:
        return None
    step_s = min(seconds[1:])
    row = {"cameras": cameras, "medium": "recipe", "batch": batch, "draws": 1, "optimizer": "adamw"}
    return {
        **row,
        "step_ms": step_s * 1e3,
        "samples_s": batch / step_s,
        "draws_s": batch / step_s,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        "note": "VLM's loss of the vocabulary included" if labels else "",
    }


def _expert_state(small: bool, family: str) -> dict[str, Tensor]:
    """Random bfloat16 tensors under the public state-dict names, on the CPU."""
    known, state = KNOWN_FAMILIES[family], {}
    if known.stores_constants:
        state = {f"action_space.{name}": torch.tensor(value) for name, value in ACTION_CONSTANTS.items()}
    state |= random_expert(device(), torch.bfloat16, small=small, family=family).state_dict()
    prefix = known.expert_prefix
    return {prefix + name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


@torch.no_grad()
def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of standard deviation 0.02, gains 1, biases 0."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def learnt(rate: float, random: RandomKV, tokens: int) -> TransformCodec:
    """The codec `transform` of this rate, with tables for such keys and values."""
    samples = [
        KVSample(kv=kv.cpu(), positions=places) for kv, places in (random.kv(tokens) for _ in range(_LEARNT_FROM))
    ]
    return calibrate(samples, rate=rate, angles=random.angles, axes=random.axes, device=random.device)


def _random_layers(random: RandomKV, lengths: list[int], codec: KVCodec | None) -> Iterator[NDArray[Any]]:
    """For each prefix length the stored form of random KV, by layers; with the codec `transform` in one piece."""
    generator = torch.Generator(random.device).manual_seed(3)
    for length in lengths:
        if isinstance(codec, TransformCodec):
            kv, positions = random.kv(length)
            yield TransformTensorCodec(codec).encode(kv, positions).cpu().numpy()[None]
            continue
        shape = (random.layers, 2, KV_HEADS, length, HEAD_DIM)
        kv = torch.randn(shape, generator=generator, device=random.device, dtype=torch.bfloat16)
        if codec is not None:
            data = tensor_codec(codec).encode(kv).cpu().numpy()
            yield data.reshape(random.layers, -1)  # a named codec has the same bits in every layer
        else:
            yield kv.bfloat16().view(torch.uint16).cpu().numpy()
    if random.device.type == "cuda":
        torch.cuda.empty_cache()


def _sample(
    number: int, layers: dict[int, NDArray[Any]], cameras: tuple[str, ...], count: int, *, coded: bool
) -> tuple[str, dict[str, Any]]:
    """Id and stored values: layers of a random length in a random order, on an arc of its own."""
    rng = np.random.default_rng(number)
    ref = SampleRef(clip_id=f"clip{number:04d}", t0_us=5_100_000)
    length = int(rng.choice(list(layers)))
    stored, images = layers[length], len(cameras) * FRAMES
    kv = np.take(stored, rng.permutation(len(stored)), axis=0)
    rope_delta = -(length * 17 // 20)  # what images of 180 tokens that span 18 positions come to
    values: dict[str, Any] = {
        "kv": kv.reshape(-1) if coded else kv,
        "input_ids": rng.integers(0, 64, length),
        "image_spans": np.linspace(0, length - 60, 2 * images).astype(np.int64).reshape(images, 2),
        "stem_len": np.asarray(length - 12),
        "prefix_len": np.asarray(length),
        "rope_delta": np.asarray(rope_delta),
        "start_position": np.asarray(length + rope_delta),
        **_arc(speed_mps=rng.uniform(5, 20), curvature=rng.uniform(-0.01, 0.01)),
        "t0_us": np.asarray(ref.t0_us),
        "view": np.asarray(ref.view),
        "frame_timestamps_us": np.tile(ref.t0_us + np.arange(-FRAMES + 1, 1) * 100_000, (len(cameras), 1)),
        "clip_id": ref.clip_id,
        "cameras": list(cameras),
        "prompt": "",
    }
    if coded:
        values[KV_SHAPE] = np.array([count, 2, KV_HEADS, length, HEAD_DIM])
    return ref.sample_id, values


def _arc(*, speed_mps: float, curvature: float) -> dict[str, NDArray[np.float32]]:
    """History and future of a drive at constant speed and curvature (1/m), ego frame at t0."""
    poses = {}
    for when, steps in (("history", np.arange(-HISTORY_STEPS + 1, 1)), ("future", np.arange(1, FUTURE_STEPS + 1))):
        way = speed_mps * 0.1 * steps
        heading = way * curvature
        chord, half = way * np.sinc(heading / 2 / np.pi), heading / 2
        flat = np.zeros_like(way)
        poses[f"{when}_xyz"] = np.stack([chord * np.cos(half), chord * np.sin(half), flat], -1).astype(np.float32)
        cos, sin, one = np.cos(heading), np.sin(heading), flat + 1
        rows = [[cos, -sin, flat], [sin, cos, flat], [flat, flat, one]]
        poses[f"{when}_rot"] = np.moveaxis(np.array(rows), -1, 0).astype(np.float32)
    return poses


def _tokenizer(first: int) -> Tokenizer:
    """As many tokens as precede `<i0>`, the special ones at their ids; any text between them is one unknown token."""
    names = {first + place: name for name, place in _BASE_TOKENS.items()}
    vocabulary = {names.get(number, f"<filler {number}>"): number for number in range(first)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<filler 0>"))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
    return tokenizer


def _vlm_config(first: int, *, small: bool, family: str = "r1") -> dict[str, Any]:
    text = _TEXT_SIZES[family]
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
    vision["deepstack_visual_indexes"] = [8, 16, 24]  # type: ignore[assignment]
    if small:
        text = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
        vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
        vision["deepstack_visual_indexes"] = [0]  # type: ignore[assignment]
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        **{key: first + _BASE_TOKENS[name] for key, name in ids.items()},
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": first,
            **text,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "rope_theta": 5e6,
            "rope_scaling": rope,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **vision,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "in_channels": 3,
        },
    }


def _expert_sizes(family: str, *, small: bool) -> dict[str, int]:
    """Settings of the expert's text model that differ from the VLM's."""
    return ({"hidden_size": 256} if small else _EXPERT_SIZES[family]) | _HEADS


def _projections(family: str, *, small: bool) -> dict[str, Any]:
    """Blocks of the action space and the two projections."""
    package = KNOWN_FAMILIES[family].package
    space = f"{package}.action_space.UnicycleAccelCurvatureActionSpace"
    return {
        "action_space_cfg": {"_target_": space, **ACTION_CONSTANTS, "dt": 0.1, "n_waypoints": FUTURE_STEPS},
        "action_in_proj_cfg": {
            "_target_": f"{package}.models.action_in_proj.PerWaypointActionInProjV2",
            "hidden_size": 512 if not small else 64,
            "num_enc_layers": 2,
            "num_fourier_feats": 20,
            "max_freq": 100.0,
        },
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
    }


def _nested_config(first: int, *, small: bool) -> dict[str, Any]:
    """`config.json` of 2 Super, as far as anything reads it."""
    ids = {name: first + _TRAJECTORY + place for place, name in enumerate(SPECIAL_TOKENS)}
    ends = {"pad": "", "start": "_start", "end": "_end"}
    placed = {f"{of}_{kind}": ids[f"<|traj_{of}{end}|>"] for of in ("history", "future") for kind, end in ends.items()}
    vlm = _vlm_config(first, small=small, family="2")
    vocabulary = -(-(first + _TRAJECTORY + len(SPECIAL_TOKENS)) // 128) * 128
    vlm["text_config"] |= {"vocab_size": vocabulary, "eos_token_id": first + _BASE_TOKENS["<|im_end|>"]}
    return {
        "model_type": "alpamayo2_super",
        "dtype": "bfloat16",
        "min_pixels": 163_840,
        "max_pixels": 196_608,
        "history_vocab_size": HISTORY_BINS,
        "future_vocab_size": FUTURE_BINS,
        "tokens_per_history_traj": 45,
        "traj_ids": {"history_id0": first, "future_id0": first + HISTORY_BINS, **placed},
        "future_traj_tokenizer_cfg": {"num_bins": FUTURE_BINS},
        "hist_traj_tokenizer_cfg": {"num_bins": HISTORY_BINS, "pad_origin_at_beginning": False},
        "vlm_config": vlm,
        "expert_config": {
            "llm_config": {**vlm["text_config"], **_expert_sizes("2", small=small)},
            **_projections("2", small=small),
        },
    }


def _config(first: int, *, small: bool) -> dict[str, Any]:
    """`config.json` of R1, as far as anything reads it."""
    traj = _TRAJECTORY
    ids = {name: first + traj + place for place, name in enumerate(SPECIAL_TOKENS)}
    kinds = ("history", "future", "history_start", "future_start", "history_end", "future_end")
    return {
        "model_type": "alpamayo_r1",
        "vlm_name_or_path": "vlm",
        "dtype": "bfloat16",
        "min_pixels": 163_840,
        "max_pixels": 196_608,
        "vocab_size": first + traj + len(SPECIAL_TOKENS),
        "traj_vocab_size": traj,
        "traj_token_start_idx": first,
        "traj_token_ids": {kind: ids[f"<|traj_{kind}|>"] for kind in kinds},
        "traj_tokenizer_cfg": {"num_bins": FUTURE_BINS},
        "hist_traj_tokenizer_cfg": {"_target_": "DeltaTrajectoryTokenizer", "num_bins": HISTORY_BINS},
        **_projections("r1", small=small),
        "expert_cfg": _expert_sizes("r1", small=small),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
