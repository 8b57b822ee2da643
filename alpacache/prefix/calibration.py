"""Learns the codec `transform` from samples: bases, steps and tables.

Bases come from three quarters of the tokens, step, order and tables from the rest, so that what is promised is what
samples take that were not learnt from. Nothing here depends on the order in which a machine adds numbers being another
machine's: what is found is stored once, and every worker uses that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alpacache.errors import UsageError
from cache_store.kv.transform import (
    MAX_LOW,
    MIDDLE,
    ROUNDING,
    SIZES,
    SYMBOLS,
    TOTAL,
    TransformCodec,
    TransformGroup,
    TransformTables,
)

GROUP_CHANNELS = 2048
"""Layers are joined to groups of at most so many channels of keys and values: their basis is a matrix of this size."""
STREAM_COMPONENTS = 1024
"""Components of a token's stream, about: more streams decode faster and take 8 bytes each."""
TOKENS = 32768
"""Tokens that are looked at, at most; spread over all samples."""
LEAST_TOKENS = 64
_JUDGED = 2048
"""Tokens that step, order and tables come from, at most."""
_CLASSES, _OCTAVES, _FINEST = 48, 4, 12
"""Tables: four an octave of deviations, of which number 12 is of one step."""
_LEAST_DEVIATION = 0.33
"""In steps; components below it are not stored, which costs no bits at the same error."""
_LIMIT = 4.0
"""Largest squared error of a coded token, as a multiple of the median of the calibration's."""
_STREAM_BITS = 56
"""Place and state of a stream, less what the state holds of the codes."""
_POSITION_BITS, _SIZE_BITS = 96, 8
"""Positions of a token, and the size of its values in a layer."""
VALUE_WEIGHT = 1.0
"""Weight of an error of a value, as a share of its token's, against one of an attention logit."""
_SHRINKAGE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSample:
    """Keys and values of a sample to learn from."""

    kv: Tensor
    """bfloat16 `[layer, 2, head, token, channel]`, after rotary embedding."""
    positions: Tensor
    """`[3, token]`."""


def calibrate(
    samples: Sequence[KVSample],
    *,
    rate: float,
    angles: Tensor,
    axes: Tensor,
    device: torch.device,
    key_weights: Tensor | None = None,
    group_channels: int = GROUP_CHANNELS,
) -> TransformCodec:
    """Learn the codec that takes about `rate` bits a value; arguments and errors as of `learn` and `Learnt.codec`."""
    found = learn(
        samples, angles=angles, axes=axes, device=device, key_weights=key_weights, group_channels=group_channels
    )
    return found.codec(rate)


def learn(
    samples: Sequence[KVSample],
    *,
    angles: Tensor,
    axes: Tensor,
    device: torch.device,
    key_weights: Tensor | None = None,
    group_channels: int = GROUP_CHANNELS,
) -> "Learnt":
    """Find the bases of samples of one frozen model, from which codecs of any rate follow.

    Args:
        angles: float32 `[channel / 2]` radians by which the rotary embedding turns a pair of channels a position.
        axes: `[channel / 2]`, by which of the three positions.
        key_weights: mean squares of the queries' channels `[layer, head, channel]`, or broadcast to that, alike for the
            two channels of a pair; None: all 1.

    Raises `UsageError` where the samples have too few tokens.
    """
    kv = samples[0].kv
    layers, _, heads, _, channels = kv.shape
    together = max(1, min(layers, group_channels // (2 * heads * channels)))
    weights = (
        torch.ones(layers, heads, channels) if key_weights is None else key_weights.expand(layers, heads, channels)
    )
    each = max(1, TOKENS // len(samples))
    chosen = [_Chosen(one, each) for one in samples]
    if sum(len(one.tokens) for one in chosen) < LEAST_TOKENS:
        raise UsageError("the codec transform learns from 64 tokens at least; take more --samples, or another --codec.")
    spectra = []
    for first in range(0, layers, together):
        group = slice(first, min(first + together, layers))
        x, learnt = _vectors(chosen, group, angles.to(device), axes.to(device))
        scale = torch.ones_like(x[0]).view(-1, 2, heads, channels)
        scale[:, 0] = weights[group].to(device).clamp(min=1e-6).rsqrt()
        scale[:, 1] = VALUE_WEIGHT**-0.5
        spectra.append(_Spectrum.of(x, learnt, scale.flatten()))
    return Learnt(
        layers=layers,
        heads=heads,
        channels=channels,
        together=together,
        angles=angles.float().cpu(),
        axes=axes.to(torch.uint8).cpu(),
        spectra=tuple(spectra),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """Bases of one model's keys and values, before a rate is chosen."""

    layers: int
    heads: int
    channels: int
    together: int
    """Layers of a group."""
    angles: Tensor
    axes: Tensor
    spectra: "tuple[_Spectrum, ...]"

    def codec(self, rate: float) -> TransformCodec:
        """The codec of about `rate` bits a value. Raises `UsageError` for fewer than streams themselves take."""
        layers, heads, channels, together = self.layers, self.heads, self.channels, self.together
        step, found = _step_for(rate, self.spectra, 2 * heads * channels, layers)
        used = sorted({int(one) for classes, _ in found for one in classes.tolist()} | {_FINEST})
        place = torch.full((_CLASSES,), -1)
        place[torch.tensor(used)] = torch.arange(len(used))
        counts, shift = _count(self.spectra, found, step)
        low = _low_bits(torch.tensor(used))
        deviations = 2.0 ** ((torch.tensor(used).double() - _FINEST) / _OCTAVES)
        frequency = np.stack(
            [
                _frequencies(count, float(deviation) / 2 ** int(bits))
                for count, deviation, bits in zip(counts[used], deviations, low, strict=True)
            ]
        )
        tables = TransformTables(
            layers=layers,
            heads=heads,
            channels=channels,
            together=together,
            parts=max(1, math.ceil(2 * together * heads * channels / STREAM_COMPONENTS - 0.5)),
            angles=self.angles.numpy(),
            axes=self.axes.numpy(),
            low=low.to(torch.uint8).numpy(),
            shift=shift[used].float().numpy(),
            frequency=frequency,
            groups=tuple(
                _group(spectrum, classes, order, place, shift, step)
                for spectrum, (classes, order) in zip(self.spectra, found, strict=True)
            ),
        )
        return TransformCodec.of(rate, tables)


class _Chosen:
    """Tokens of a sample that are looked at: evenly spread, without the first, which attention dwells on."""

    def __init__(self, sample: KVSample, most: int) -> None:
        count = sample.kv.shape[3]
        stride = max(1, -(-(count - 1) // most))
        self.tokens = torch.arange(1, count, stride)
        self.kv = sample.kv[:, :, :, self.tokens.to(sample.kv.device)]
        self.positions = sample.positions[:, self.tokens.to(sample.positions.device)]


def _vectors(chosen: Sequence[_Chosen], layers: slice, angles: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `[token, channels]` of a group, keys turned back and values by their size; which are learnt from."""
    vectors, learnt, device = [], [], angles.device
    for number, one in enumerate(chosen):
        part = one.kv[layers].to(device).float()
        angle = angles_of(one.positions.to(device), angles, axes)
        part[:, 0] = turned(part[:, 0], angle.cos(), -angle.sin())
        part[:, 1] /= sizes_on(device)[value_sizes(part[:, 1]).long()][:, None, :, None]
        vectors.append(part.permute(3, 0, 1, 2, 4).flatten(1))
        held = number % 4 == 3 if len(chosen) > 3 else torch.arange(len(one.tokens)) % 4 == 3
        learnt.append(~torch.as_tensor(held).expand(len(one.tokens)))
    return torch.cat(vectors), torch.cat(learnt).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spectrum:
    """A group's basis, before the step is known."""

    mean: Tensor
    scale: Tensor
    """Units of a channel that one unit of a component is."""
    basis: Tensor
    """float32 `[N, N]`, by falling deviation."""
    components: Tensor
    """float32 `[token, N]` of tokens that were not learnt from."""

    @classmethod
    def of(cls, x: Tensor, learnt: Tensor, scale: Tensor) -> "_Spectrum":
        mean = x[learnt].mean(0)
        z = (x - mean) / scale
        seen = z[learnt]
        square = (seen.T @ seen).double() / len(seen)
        square.diagonal().add_(_SHRINKAGE * square.diagonal().mean() + 1e-12)
        _, basis = torch.linalg.eigh(square)
        basis = basis.flip(1).float()
        held = z[~learnt]
        held = held[:: -(-len(held) // _JUDGED)]
        return cls(mean=mean, scale=scale, basis=basis, components=held @ basis)


_Found = list[tuple[Tensor, Tensor]]
"""Classes of each group's stored components, from the widest on, and which of all components they are."""


def _step_for(rate: float, spectra: Sequence[_Spectrum], width: int, layers: int) -> tuple[float, _Found]:
    """The step at which tokens that were not learnt from take so many bits a value, and the components stored then."""
    low, high, values = -40.0, 40.0, layers * width
    aim = rate * values - _POSITION_BITS - _SIZE_BITS * layers
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _bits(spectra, _kept(spectra, 2**middle), 2**middle) > aim else (low, middle)
        if high - low < 0.003:
            break
    step = 2**high
    found = _kept(spectra, step)
    if _bits(spectra, found, step) > aim + 0.02 * rate * values:
        raise UsageError(
            f"{rate:g} bits a value are too few for this model, whose streams and positions take most of them. Take a "
            "higher transform:RATE."
        )
    return step, found


def _kept(spectra: Sequence[_Spectrum], step: float) -> _Found:
    found = []
    for one in spectra:
        deviation = one.components.square().mean(0).sqrt() / step
        classes = (
            (torch.round(_OCTAVES * torch.log2(deviation.clamp(min=1e-9))) + _FINEST).clamp(0, _CLASSES - 1).long()
        )
        order = torch.argsort(classes, descending=True, stable=True)
        order = order[deviation[order] >= _LEAST_DEVIATION]
        found.append((classes[order].cpu(), order))
    return found


def _low_bits(classes: Tensor) -> Tensor:
    """Low bits that are stored as they are, so that 127 high codes reach 12 deviations and more."""
    return torch.floor((classes.double() - _FINEST) / _OCTAVES - math.log2(5)).clamp(0, MAX_LOW).long()


def _coded(spectrum: _Spectrum, order: Tensor, classes: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Components in steps, their codes, and their low bits `[component]`."""
    y = spectrum.components[:, order] / step
    low = _low_bits(classes).to(y.device)
    codes = (y.sign() * torch.floor(y.abs() + float(ROUNDING))).long()
    return y, codes.clamp(min=-(MIDDLE << low), max=(MIDDLE << low)), low


def _bits(spectra: Sequence[_Spectrum], found: _Found, step: float) -> float:
    """Bits of a token by tables of its classes, streams and all."""
    counts, tokens, extra = torch.zeros(_CLASSES * SYMBOLS, dtype=torch.float64), 0, 0.0
    for spectrum, (classes, order) in zip(spectra, found, strict=True):
        _, codes, low = _coded(spectrum, order, classes, step)
        tokens = len(codes)
        cells = (codes >> low) + MIDDLE + SYMBOLS * classes.to(codes.device)
        counts += torch.bincount(cells.flatten(), minlength=_CLASSES * SYMBOLS).double().cpu()
        extra += float(low.sum()) + _STREAM_BITS * max(1, math.ceil(len(spectrum.mean) / STREAM_COMPONENTS - 0.5))
    rows = counts.view(_CLASSES, SYMBOLS)
    share = rows / rows.sum(1, keepdim=True).clamp(min=1)
    bits = -(rows * torch.log2(share.clamp(min=1e-30))).sum() / max(tokens, 1)
    return float(bits) + extra


def _count(spectra: Sequence[_Spectrum], found: _Found, step: float) -> tuple[Tensor, Tensor]:
    """Counts `[classes, 256]` of high codes, and `[classes, 2]` by how much values are nearer to 0 than codes say."""
    counts = torch.zeros(_CLASSES * SYMBOLS, dtype=torch.float64)
    over, among = torch.zeros(_CLASSES, 2, dtype=torch.float64), torch.zeros(_CLASSES, 2, dtype=torch.float64)
    for spectrum, (classes, order) in zip(spectra, found, strict=True):
        y, codes, low = _coded(spectrum, order, classes, step)
        cells = (codes >> low) + MIDDLE + SYMBOLS * classes.to(codes.device)
        counts += torch.bincount(cells.flatten(), minlength=_CLASSES * SYMBOLS).double().cpu()
        size, nearer = codes.abs(), codes.abs() - y.abs()
        for place, of_size in enumerate((size == 1, size > 1)):
            over[:, place].index_add_(0, classes, (nearer * of_size).sum(0).double().cpu())
            among[:, place].index_add_(0, classes, of_size.sum(0).double().cpu())
    return counts.view(_CLASSES, SYMBOLS), (over / among.clamp(min=1)).clamp(-0.5, 0.5)


def _frequencies(counts: Tensor, deviation: float) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
    """4096 in all, of codes up to twelve deviations, none 0: what was counted, and a little of Laplace's."""
    code = np.arange(SYMBOLS - 1) - MIDDLE
    reach = min(MIDDLE, max(3, math.ceil(12 * deviation)))
    spread = np.exp(-math.sqrt(2) * np.abs(code) / max(deviation, 0.3)) * (np.abs(code) <= reach)
    counted = counts.numpy()[:-1] * (np.abs(code) <= reach)
    share = counted + (16 + 0.002 * counted.sum()) * spread / spread.sum()
    found = np.where(np.abs(code) <= reach, np.maximum(1, np.rint(share / share.sum() * TOTAL)), 0).astype(np.int64)
    while missing := TOTAL - int(found.sum()):
        most = int(np.argmax(found))
        found[most] += max(missing, -int(found[most]) // 2)
    return np.append(found, 0).astype(np.uint16)


def _group(
    spectrum: _Spectrum, classes: Tensor, order: Tensor, place: Tensor, shift: Tensor, step: float
) -> TransformGroup:
    y, codes, _ = _coded(spectrum, order, classes, step)
    size = codes.abs().float()
    nearer = shift.float()[classes].to(y.device)
    size = size - torch.where(size == 1, nearer[:, 0], torch.where(size > 1, nearer[:, 1], 0.0))
    coded = (codes.sign() * size - y).square().sum(1)
    dropped = (spectrum.components / step).square().sum(1) - y.square().sum(1)
    error = (coded + dropped.clamp(min=0)) / len(spectrum.mean)
    return TransformGroup(
        mean=spectrum.mean.cpu().numpy(),
        scale=(spectrum.scale * step).cpu().numpy(),
        basis=spectrum.basis[:, order].cpu().to(torch.float16).numpy(),
        classes=place[classes].to(torch.uint8).numpy(),
        limit=_LIMIT * float(error.median()) + 1e-6,
    )


def angles_of(positions: Tensor, angles: Tensor, axes: Tensor) -> Tensor:
    """float32 `[token, channel / 2]` by which keys at positions `[3, token]` are turned."""
    return positions[axes.long()].T.float() * angles


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[..., token, channel]` with each pair of channels, half of all apart, turned."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def value_sizes(values: Tensor) -> Tensor:
    """uint8 `[layer, token]`: the byte of the size of a token's `[layer, head, token, channel]`."""
    square = values.double().square().mean((1, 3))
    return (torch.round(4 * torch.log2(square.clamp(min=2.0**-32))) + 128).clamp(0, 255).to(torch.uint8)


def sizes_on(device: torch.device) -> Tensor:
    """`SIZES` on a device."""
    return torch.from_numpy(SIZES).to(device)
