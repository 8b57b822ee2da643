"""The fields of a cached sample, and how model tensors become stored arrays and back.

A sample's KV is one *stem* (system text, images, ego history) followed by *tails*. The array `kv` holds the stem and
the direct tail back to back, so that the usual prefix is one contiguous read; `stem_len` says where the tail begins.
Tails of reasoning rollouts are further fields, `tail.0.kv` and so on, which attach to the same stem; evaluation reads
them, and training that is asked to. Of a sample with a route, whose text stands behind the stem, so are the `TWINS` of
the direct tail. With a quantising codec, which the store's identity names, `kv` is the codec's flat bytes and
`kv_shape` tells the lengths.
"""

import io
import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.alpamayo.inputs import VLMInputs
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import Sample
from alpacache.driving.strata import Strata, classify
from alpacache.errors import BadClipError, DataError
from alpacache.finite import is_finite
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures, Tail
from alpacache.strict_json import plain
from cache_store import Field, FormatError, KVCodec
from cache_store.kv.layered import NOT_FINITE

KV_AXES = ("layer", "key_value", "kv_head", "token", "channel")
PREFIX_FIELDS = ("kv", "stem_len", "prefix_len", "rope_delta", "start_position")
"""Fields that make a prefix; with a quantising codec, `KV_SHAPE` as well."""
KV_SHAPE = "kv_shape"
LAYERS = "layers"
"""Key of a store's identity: the VLM's layers that it has keys and values of. Absent where it has those of all."""
_FINITE = " is finite"
"""Suffix of the flags, never stored, that say the array of that name is finite and may be stored; see `checked`."""
ROUTE = "route"
TWINS = UNROUTED, SWAPPED = ("unrouted", "swapped")
"""Names of the further direct tails of a sample with a route: without it, and with left for right in it where it
commands one of the two. A tail is the few dozen tokens behind the stem, so both take about a hundredth of a sample."""
POSE_FIELDS = ("history_xyz", "history_rot", "future_xyz", "future_rot")
_JPEG_HEIGHT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSample:
    """One sample's KV for the expert: its prefix, and the tails that follow the stem in reasoning rollouts."""

    sample_id: str
    prefix: PrefixFeatures | EncodedPrefix
    stem_len: int
    """Tokens of the prefix that tails attach to."""
    tails: tuple[Tail, ...] = ()
    """Decoded tails of as many reasoning rollouts as were read."""
    twin: Tail | None = None
    """The decoded tail of the one of `TWINS` that was asked for, if the sample has it."""

    def twin_prefix(self, device: torch.device | str = "cpu") -> PrefixFeatures:
        """The prefix with the twin's tail: the decoded stem and that tail."""
        assert self.twin is not None
        return self.decode(device).with_tail(self.stem_len, self.twin)

    def rollout_prefixes(self, device: torch.device | str = "cpu") -> list[PrefixFeatures]:
        """The prefix after each rollout: the decoded stem and a tail."""
        whole = self.decode(device)
        return [whole.with_tail(self.stem_len, tail) for tail in self.tails]

    def decode(self, device: torch.device | str = "cpu") -> PrefixFeatures:
        """The prefix with keys and values `[layers, kv_heads, prefix_len, head_dim]` in bfloat16, whatever the codec.

        Layers are those that were asked for of the data set, else those of the store: `PrefixFeatures.layers`.
        """
        prefix = self.prefix.to(device)
        if not isinstance(prefix, EncodedPrefix):
            return prefix
        try:
            return prefix.decode()
        except (FormatError, ValueError) as error:  # its checksums are right: it was written so
            raise DataError(f"sample {self.sample_id!r}: {error} Extract it again, or leave its store out.") from error


def store_fields(
    *, hidden_states: bool, codec: KVCodec | None, rollouts: int = 0, views: bool = False, routes: bool = False
) -> list[Field]:
    """The schema of a store of VLM prefixes; without a codec they are bfloat16."""
    poses = [
        Field(name=f"{when}_{what}", dtype="float32", axes=("step", *axes), units=units, layout="packed")
        for when in ("history", "future")
        for what, axes, units in (("xyz", ("xyz",), "m, ego frame at t0"), ("rot", ("row", "column"), "1"))
    ]
    kv, *kv_shape = _kv_fields("", codec)
    fields = [
        kv,
        Field(name="input_ids", dtype="int64", axes=("token",), units="token id", layout="packed"),
        Field(name="image_spans", dtype="int64", axes=("image", "first_end"), units="token position", layout="packed"),
        Field(name="stem_len", dtype="int64", axes=(), units="tokens", layout="packed"),
        Field(name="prefix_len", dtype="int64", axes=(), units="tokens", layout="packed"),
        Field(name="rope_delta", dtype="int64", axes=(), units="positions", layout="packed"),
        Field(name="start_position", dtype="int64", axes=(), units="positions", layout="packed"),
        *kv_shape,
        *poses,
        Field(name="t0_us", dtype="int64", axes=(), units="us", layout="packed"),
        Field(name="view", dtype="int64", axes=(), units="1", layout="packed"),
        Field(name="frame_timestamps_us", dtype="int64", axes=("camera", "frame"), units="us", layout="packed"),
        Field(name="front_jpeg", dtype="uint8", axes=("byte",), units="JPEG", layout="packed", required=False),
        Field(name="clip_id", dtype="str", axes=(), units="", layout="text"),
        Field(name="cameras", dtype="str", axes=("camera",), units="", layout="text"),
        Field(name="prompt", dtype="str", axes=(), units="", layout="text"),
        Field(name="calibration", dtype="str", axes=(), units="JSON", layout="text", required=False),
    ]
    if hidden_states:
        axes, units = ("token", "channel"), "1, after the final norm"
        fields.insert(1, Field(name="hidden", dtype="bfloat16", axes=axes, units=units, layout="array"))
    if views:
        fields.append(Field(name="jitter", dtype="str", axes=(), units="JSON", layout="text", required=False))
    for number in range(rollouts):
        fields += _tail_fields(tail_name(number), codec)
    if routes:
        fields.append(Field(name=ROUTE, dtype="str", axes=(), units="", layout="text", required=False))
        for twin in TWINS:  # samples without a route have none
            fields += [replace(field, required=False) for field in _tail_fields(tail_name(twin), codec)]
    return fields


def _tail_fields(name: str, codec: KVCodec | None) -> list[Field]:
    return [
        *_kv_fields(name, codec),
        Field(name=f"{name}input_ids", dtype="int64", axes=("token",), units="token id", layout="packed"),
        Field(name=f"{name}start_position", dtype="int64", axes=(), units="positions", layout="packed"),
        Field(name=f"{name}text", dtype="str", axes=(), units="", layout="text"),
    ]


def _kv_fields(prefix: str, codec: KVCodec | None) -> list[Field]:
    """Fields of keys and values, and of their shape if encoded, with `prefix` before their names."""
    name, shape, units = f"{prefix}kv", f"{prefix}{KV_SHAPE}", "1, keys after rotary embedding"
    if codec is None:
        return [Field(name=name, dtype="bfloat16", axes=KV_AXES, units=units, layout="array")]
    return [
        Field(name=name, dtype="uint8", axes=("byte",), units=f"{units}, encoded", layout="array"),
        Field(name=shape, dtype="int64", axes=("kv_axis",), units=", ".join(KV_AXES), layout="packed"),
    ]


def tail_name(tail: int | str) -> str:
    """Beginning of the names of the fields of a rollout, by its number, or of one of `TWINS`."""
    return f"tail.{tail}."


def tail_count(fields: Container[str]) -> int:
    """Number of rollouts that have fields in a store, or arrays in a sample."""
    return next(number for number in count() if f"{tail_name(number)}kv" not in fields)


def sample_arrays(sample: Sample, inputs: VLMInputs) -> dict[str, Any]:
    """Stored values that are known before the VLM runs; they keep no frame alive."""
    arrays: dict[str, Any] = {
        "image_spans": inputs.image_spans,
        "stem_len": np.asarray(inputs.stem_len),
        **{name: getattr(sample, name) for name in POSE_FIELDS},
        "t0_us": np.asarray(sample.ref.t0_us),
        "view": np.asarray(sample.ref.view),
        "frame_timestamps_us": sample.frame_timestamps_us,
        "clip_id": sample.ref.clip_id,
        "cameras": list(sample.cameras),
        "prompt": inputs.text,
    }
    if FRONT_CAMERA in sample.cameras and FRONT_CAMERA not in sample.blank:
        arrays["front_jpeg"] = _jpeg(sample.frames[sample.cameras.index(FRONT_CAMERA), -1])
    if inputs.route is not None:
        arrays[ROUTE] = inputs.route
    for name in ("calibration", "jitter"):
        if (value := getattr(sample, name)) is not None:
            arrays[name] = json.dumps(plain(value), sort_keys=True, allow_nan=False)
    return arrays


def prefix_arrays(
    inputs: VLMInputs, prefix: PrefixFeatures, *, hidden_states: bool, codec: KVCodec | None
) -> dict[str, Any]:
    """Stored values that come from the prefix; large ones are tensors of the stored bits on the prefix's device.

    KV and hidden states are bfloat16 bits, lossless if the VLM ran in bfloat16; with a codec, KV is encoded. Nothing
    waits for the device: pass the values to `checked` once it is done.
    """
    arrays = _kv_arrays(prefix, codec) | prefix_counters(
        inputs,
        prefix_len=prefix.prefix_len,
        rope_delta=prefix.rope_delta,
        start_position=prefix.start_position,
    )
    if hidden_states:
        assert prefix.hidden is not None
        arrays |= _bf16_arrays("hidden", prefix.hidden)
    return arrays


def prefix_counters(inputs: VLMInputs, *, prefix_len: int, rope_delta: int, start_position: int) -> dict[str, Any]:
    """Stored values of a prefix beside its KV and hidden states."""
    return {
        "input_ids": inputs.input_ids[:prefix_len],
        "prefix_len": np.asarray(prefix_len),
        "rope_delta": np.asarray(rope_delta),
        "start_position": np.asarray(start_position),
    }


def tail_arrays(tails: Sequence[Tail], *, codec: KVCodec | None) -> dict[str, Any]:
    """Stored values of reasoning rollouts; like those of `prefix_arrays`, they go through `checked`."""
    return _tail_arrays(dict(enumerate(tails)), codec)


def twin_arrays(twins: Mapping[str, Tail], *, codec: KVCodec | None) -> dict[str, Any]:
    """Stored values of a routed sample's `TWINS`; like those of `prefix_arrays`, they go through `checked`."""
    return _tail_arrays(twins, codec)


def tail_counters(name: str, *, token_ids: NDArray[np.int64], start_position: int, text: str) -> dict[str, Any]:
    """Stored values of a tail beside its KV; `name`: beginning of its fields' names."""
    values = {"input_ids": token_ids, "start_position": np.asarray(start_position), "text": text}
    return {f"{name}{part}": value for part, value in values.items()}


def _tail_arrays(tails: Mapping[Any, Tail], codec: KVCodec | None) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name, tail in tails.items():
        begin = tail_name(name)
        arrays |= {f"{begin}{part}": value for part, value in _kv_arrays(tail, codec).items()}
        arrays |= tail_counters(begin, token_ids=tail.token_ids, start_position=tail.start_position, text=tail.text)
    return arrays


def _kv_arrays(part: PrefixFeatures | Tail, codec: KVCodec | None) -> dict[str, Any]:
    kv = torch.stack([part.keys, part.values], dim=1)
    if codec is None:
        return _bf16_arrays("kv", kv)
    data, encodable = tensor_codec(codec).encode_at(kv, part.positions)
    return {"kv": data, KV_SHAPE: np.array(kv.shape, np.int64), f"kv{_FINITE}": _flag(encodable)}


def kv_layer(kv: Tensor, layer: int, codec: KVCodec | None) -> tuple[Tensor, Tensor]:
    """Stored bytes of one layer of several samples of one length, `[samples, size]`, and which may be stored.

    Args:
        kv: `[samples, 2, kv_heads, T, head_dim]`.
    """
    return bf16_rows(kv) if codec is None else tensor_codec(codec).encode_layer(kv, layer)


def bf16_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes `[samples, size]` of `[samples, ...]` as bfloat16, rounded to nearest even, and which are finite."""
    rounded = tensor.detach().to(torch.bfloat16).contiguous().flatten(1)
    least, greatest = torch.aminmax(rounded, dim=1)
    return rounded.view(torch.uint8), least.isfinite() & greatest.isfinite()


def kv_bytes(shape: tuple[int, ...], codec: KVCodec | None) -> int:
    """Stored bytes of keys and values `[layers, 2, kv_heads, T, head_dim]`."""
    return math.prod(shape) * 2 if codec is None else codec.encoded_bytes(shape)


def kv_values(
    begin: str, data: NDArray[np.uint8], shape: tuple[int, ...], codec: KVCodec | None, good: Tensor
) -> dict[str, Any]:
    """Values of the field of keys and values whose name has this beginning, out of the bytes of all layers.

    `good`: flag on the host whether all may be stored; like those of `prefix_arrays`, they go through `checked`.
    """
    if codec is None:
        return bf16_values(f"{begin}kv", data, shape, good)
    return {f"{begin}kv": data, f"{begin}{KV_SHAPE}": np.array(shape, np.int64), f"{begin}kv{_FINITE}": good}


def bf16_values(name: str, data: NDArray[np.uint8], shape: tuple[int, ...], good: Tensor) -> dict[str, Any]:
    """Values of a bfloat16 field out of its bytes."""
    return {name: data.view(np.uint16).reshape(shape), f"{name}{_FINITE}": good}


def _bf16_arrays(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor's bits as bfloat16, rounded to nearest even, and whether they are finite."""
    rounded = tensor.detach().to(torch.bfloat16).contiguous()
    return {name: rounded.view(torch.uint16), f"{name}{_FINITE}": _flag(is_finite(rounded))}


def _flag(value: Tensor) -> Tensor:
    """A flag on its way to the host now, so that reading it does not wait for work enqueued after it."""
    return value.to("cpu", non_blocking=True)


def stored_layers(identity: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The VLM's layers that a store was extracted with, rising; None where that was all."""
    layers = identity.get(LAYERS)
    return tuple(layers) if isinstance(layers, list) else None


def from_arrays(
    sample_id: str,
    arrays: Mapping[str, NDArray[Any]],
    *,
    codec: KVCodec | None = None,
    twin: str | None = None,
    layers: tuple[int, ...] | None = None,
) -> CachedSample:
    """The sample of these stored arrays, its prefix still encoded; tensors share memory with the arrays.

    `layers`: the VLM's that keys and values are of, where the arrays do not hold all; `codec` is for these.
    """
    counters: dict[str, Any] = {name: int(arrays[name]) for name in ("rope_delta", "prefix_len", "start_position")}
    prefix: PrefixFeatures | EncodedPrefix
    if codec is None:
        kv = from_bf16_bits(arrays["kv"])
        prefix = PrefixFeatures(keys=kv[:, 0], values=kv[:, 1], hidden=None, layers=layers, **counters)
    else:
        data, shape = torch.from_numpy(arrays["kv"]), _kv_shape(arrays, "", layers)
        if len(shape) != 5 or min(shape) < 1 or shape[3] != counters["prefix_len"]:
            raise DataError(
                f"sample {sample_id!r} has keys and values {list(shape)} and {counters['prefix_len']} tokens, which "
                "do not go together. Extract it again, or leave its store out."
            )
        prefix = EncodedPrefix(data=data, codec=codec, shape=shape, layers=layers, **counters)
    stem_len, tails = int(arrays["stem_len"]), tuple(_tails(arrays, codec, layers))
    has_twin = twin is not None and f"{tail_name(twin)}kv" in arrays
    other = _tail(arrays, tail_name(twin), codec, layers) if twin is not None and has_twin else None
    return CachedSample(sample_id=sample_id, prefix=prefix, stem_len=stem_len, tails=tails, twin=other)


def _kv_shape(arrays: Mapping[str, NDArray[Any]], name: str, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of the keys and values that encoded arrays hold."""
    shape: tuple[int, ...] = tuple(arrays[f"{name}{KV_SHAPE}"].tolist())
    return shape if layers is None else (len(layers), *shape[1:])


def _tails(arrays: Mapping[str, NDArray[Any]], codec: KVCodec | None, layers: Sequence[int] | None) -> Iterator[Tail]:
    for name in map(tail_name, range(tail_count(arrays))):
        yield _tail(arrays, name, codec, layers)


def _tail(arrays: Mapping[str, NDArray[Any]], name: str, codec: KVCodec | None, layers: Sequence[int] | None) -> Tail:
    if codec is None:
        kv = from_bf16_bits(arrays[f"{name}kv"])
    else:
        shape = _kv_shape(arrays, name, layers)
        kv = tensor_codec(codec).decode(torch.from_numpy(arrays[f"{name}kv"]), shape)
    return Tail(
        keys=kv[:, 0],
        values=kv[:, 1],
        token_ids=arrays[f"{name}input_ids"],
        start_position=int(arrays[f"{name}start_position"]),
        text=str(arrays[f"{name}text"]),
    )


def checked(sample_id: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The values to store out of those of `prefix_arrays` and `tail_arrays`, once the device has computed them.

    Encoded bytes whose number the device has found are cut to that. Raises `BadClipError` for values that are not
    finite, or KV that could not be quantised.
    """
    for name in (key.removesuffix(_FINITE) for key, good in arrays.items() if key.endswith(_FINITE) and not good):
        problem = NOT_FINITE if f"{name.removesuffix('kv')}{KV_SHAPE}" in arrays else f"{name} has NaN or infinity."
        raise BadClipError("not_finite", f"{sample_id}: {problem} Check the VLM's weights and the clip's pictures.")
    values = {name: value for name, value in arrays.items() if not name.endswith(_FINITE)}
    for key, good in arrays.items():
        if key.endswith(_FINITE) and good.dtype not in (torch.bool, np.bool_):  # how many bytes, not whether
            name = key.removesuffix(_FINITE)
            values[name] = values[name][: int(good)]
    return values


def from_bf16_bits(bits: NDArray[np.uint16]) -> Tensor:
    """A bfloat16 tensor that shares memory with its bits."""
    return torch.from_numpy(bits).view(torch.bfloat16)


def _jpeg(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A small JPEG of one frame `[3, H, W]`, for pictures only."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    if image.height > _JPEG_HEIGHT:
        width = round(image.width * _JPEG_HEIGHT / image.height)
        image = image.resize((width, _JPEG_HEIGHT), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def stored_strata(sample_id: str, poses: Mapping[str, Any]) -> Strata:
    """Strata of a stored sample's path, by `POSE_FIELDS`. Raises `DataError` where its poses are not finite."""
    try:
        return classify(**poses)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise DataError(
            f"sample {sample_id!r}: its {reason}. No recording gives such a sample; extract it again into a new store."
        ) from error
