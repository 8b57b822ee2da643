"""What a codec's error of keys and values does to the expert: to its velocity, its loss and its gradient.

The same samples, noise and times go through the expert with keys and values as they are and as a codec leaves them. An
error of keys that nobody attends to costs nothing here, one of a key that the expert dwells on costs much: that is what
tells codecs apart. Gradients are those of single samples, as a batch's mean would hide errors that differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache import flow_matching, randomness
from alpacache.extraction.codec_learning import WholeSample
from alpacache.gpu.device import has_kernels
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures
from cache_store import KVCodec

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

DRAWS = 4
"""Noise draws of a sample, at times spread as in training."""
ROUNDING = "rounding"
"""Name of the row of keys and values that were rounded to bfloat16 once more."""
_MOVED = 1 / 12
"""Share of values that a second rounding moves by one step: its mean square is that of rounding, step^2 / 12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecErrors:
    """Errors that a codec makes in the expert, over all judged samples, against keys and values in bfloat16."""

    velocity: float
    """Relative L2 of the velocities of all samples and draws."""
    worst_velocity: float
    """The same of the sample for which it is largest."""
    loss: float
    """Mean flow loss."""
    loss_change: float
    """Share by which the mean loss differs from that on bfloat16."""
    gradient: float | None
    """Relative L2 of the gradients of single samples over all parameters of the expert; None where none was wanted."""
    gradient_cosine: float | None
    bytes_a_sample: float
    """Mean bytes of keys and values."""
    bits: float
    """Bits a value."""


@dataclass(slots=True)
class _Sums:
    """Sums over samples of one codec."""

    difference: float = 0.0
    velocity: float = 0.0
    worst: float = 0.0
    loss: float = 0.0
    gradient_difference: float = 0.0
    gradient_product: float = 0.0
    gradient: float = 0.0
    size: int = 0


@dataclass(slots=True)
class CodecJudge:
    """Sums up, sample by sample, what codecs do to one expert."""

    expert: "ActionExpert"
    codecs: Mapping[str, KVCodec | None]
    """Codecs by name, each with its tables; None is bfloat16, which has no errors."""
    gradients: bool
    """Measure gradients too; they take twice the memory of the expert's weights."""
    seed: int = 0
    samples: int = 0
    values: int = 0
    _sums: dict[str, _Sums] = field(default_factory=dict)
    _reference: _Sums = field(default_factory=_Sums)

    def add(self, sample: WholeSample) -> None:
        """Judge all codecs on one sample."""
        device = self.expert.device
        kv = sample.kv.to(device)
        exact = self._through(sample, _plain(sample, kv))
        self.samples, self.values = self.samples + 1, self.values + kv.numel()
        self._reference.loss += exact.loss
        self._reference.velocity += _square(exact.velocity)
        self._reference.gradient += sum(map(_square, exact.gradient))
        self._reference.size += 2 * kv.numel()
        moved = _rounded_again(kv, randomness.generator("codecs", self.seed, sample.sample_id))
        self._add(ROUNDING, exact, self._through(sample, _plain(sample, moved)), 2 * kv.numel())
        for name, codec in self.codecs.items():
            if codec is None:
                self._add(name, exact, exact, 2 * kv.numel())
            else:
                data = _encoded(codec, kv, sample.positions)
                self._add(name, exact, self._through(sample, _coded(sample, data, codec)), data.numel())

    def errors(self) -> dict[str, CodecErrors]:
        """Errors by name of codec, `ROUNDING` first."""
        exact, found = self._reference, {}
        for name, sums in self._sums.items():
            gradient = cosine = None
            if self.gradients:
                gradient = math.sqrt(sums.gradient_difference / exact.gradient)
                cosine = sums.gradient_product / math.sqrt(exact.gradient * sums.gradient)
            found[name] = CodecErrors(
                velocity=math.sqrt(sums.difference / exact.velocity),
                worst_velocity=sums.worst,
                loss=sums.loss / self.samples,
                loss_change=sums.loss / exact.loss - 1,
                gradient=gradient,
                gradient_cosine=cosine,
                bytes_a_sample=sums.size / self.samples,
                bits=sums.size * 8 / self.values,
            )
        return found

    def _through(self, sample: WholeSample, prefix: PrefixFeatures | EncodedPrefix) -> "_Felt":
        """Run the expert on a prefix."""
        expert = self.expert
        history_xyz, history_rot, future_xyz, future_rot = sample.poses
        action = expert.action_space.to_action(history_xyz, history_rot, future_xyz, future_rot)
        key = ("codecs", self.seed, sample.sample_id)
        noise = randomness.noise(*key, draws=DRAWS)[None].to(expert.device)
        t = randomness.times(*key, draws=DRAWS, schedule="beta")[None].to(expert.device)
        action = action[None, None].to(expert.device)
        with torch.set_grad_enabled(self.gradients):
            velocity = expert.velocity(flow_matching.interpolate(action, noise, t), t, [prefix])
            loss = flow_matching.loss(velocity, action, noise, rounds_target=expert.rounds_target).mean()
            gradient: Sequence[Tensor] = ()
            if self.gradients:
                wanted = [parameter for parameter in expert.parameters() if parameter.requires_grad]
                gradient = [part for part in torch.autograd.grad(loss, wanted, allow_unused=True) if part is not None]
        return _Felt(velocity=velocity.detach().float(), loss=float(loss.detach()), gradient=gradient)

    def _add(self, name: str, exact: "_Felt", found: "_Felt", size: int) -> None:
        sums = self._sums.setdefault(name, _Sums())
        difference, whole = _square(found.velocity - exact.velocity), _square(exact.velocity)
        sums.difference += difference
        sums.worst = max(sums.worst, math.sqrt(difference / whole))
        sums.loss += found.loss
        sums.size += size
        for one, other in zip(exact.gradient, found.gradient, strict=True):
            sums.gradient_difference += float(torch.linalg.vector_norm(other.float() - one.float())) ** 2
            sums.gradient_product += float((other.float() * one.float()).sum())
            sums.gradient += _square(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Felt:
    """Velocity, loss and gradient of the expert on one prefix."""

    velocity: Tensor
    loss: float
    gradient: Sequence[Tensor]


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float())) ** 2


def _plain(sample: WholeSample, kv: Tensor) -> PrefixFeatures:
    return PrefixFeatures(
        keys=kv[:, 0],
        values=kv[:, 1],
        hidden=None,
        rope_delta=sample.rope_delta,
        prefix_len=kv.shape[3],
        start_position=sample.start_position,
    )


def _encoded(codec: KVCodec, kv: Tensor, positions: Tensor | None) -> Tensor:
    data, size = tensor_codec(codec).encode_at(kv, positions)
    return data if codec.fixed_size else data[: int(size)]


def _coded(sample: WholeSample, data: Tensor, codec: KVCodec) -> PrefixFeatures | EncodedPrefix:
    """A prefix as training has it: decoded by kernels where there are any."""
    encoded = EncodedPrefix(
        data=data,
        codec=codec,
        shape=tuple(sample.kv.shape),
        rope_delta=sample.rope_delta,
        prefix_len=sample.kv.shape[3],
        start_position=sample.start_position,
    )
    return encoded if has_kernels(data.device) else encoded.decode()


def _rounded_again(kv: Tensor, generator: torch.Generator) -> Tensor:
    """Each value moved to one of its two neighbours in bfloat16 with the chance that makes the error one of rounding.

    Keys and values are what rounding has left: this is what another rounding of the same numbers may leave as well.
    """
    chance = torch.rand(kv.shape, generator=generator).to(kv.device)
    step = (chance < _MOVED / 2).float() - (chance > 1 - _MOVED / 2).float()
    exact = kv.float()
    exponent = torch.frexp(exact).exponent - 8
    return torch.where(exact == 0, exact, exact + torch.ldexp(step, exponent)).to(kv.dtype)
