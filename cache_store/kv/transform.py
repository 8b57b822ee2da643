"""The codec `transform`: neighbouring layers in a basis learnt once for a frozen model, and entropy-coded.

Keys and values of a frozen model say much the same in neighbouring heads and layers, and values follow from keys. A
group of layers is one vector a token: its keys before the rotary embedding, and its values, each layer's by their
size. In the basis of their principal components most of it is small, and is rounded to one step size. Codes go through
rANS with static tables, each token's in streams of its own, so that a GPU decodes all tokens at once. A token that the
basis does not fit is stored as it is: an error above the stated limit cannot happen, however unlike the calibration a
sample is.

Basis, steps and tables are `TransformTables`, bytes of some hundred MB for a released model, which a store holds once.
"""

import hashlib
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from cache_store.errors import FormatError
from cache_store.kv.layered import MANTISSAS, MAX_VALUE, NOT_FINITE, Floats, from_bfloat16, to_bfloat16
from cache_store.kv.learnt import LearntCodec

SYMBOLS, MIDDLE, TOTAL, PROBABILITY_BITS = 256, 127, 4096, 12
"""Symbols of a table, the one that means 0, and the sum of its frequencies; the last symbol is not used."""
LEAST_STATE = 1 << 16
"""States of a stream are from this on, below 2^32; it begins to be written, and ends to be read, with this one."""
ROUNDING = np.float32(0.42)
"""Added before rounding down: below a half, small components cost fewer bits at the same error."""
MAX_LOW, MAX_CLASSES = 8, 64
MAX_POSITION = 1 << 20
RATES = (0.5, 12.0)
"""Bits a value that may be asked for."""
_MAGIC, _VERSION = b"cstransf", 1
_HEADER = struct.Struct("<8s8I")
_MAX_AXIS = 4096
"""Upper bound of layers, heads and channels, so that no product of untrusted sizes is absurd."""
ALIGNED = 8
"""Multiple of components, and of a batch's tokens, that a GPU pads matrices to: its matrix units load 16 bytes at a
time, and a product of 1,793 components took 7 times as long as one of 1,800."""
_TOKENS_AT_ONCE, _GROUPS_AT_ONCE = 65536, 4
"""Tokens whose streams a GPU decodes in one go, of several groups if need be: with fewer it waits for memory. On an
H200 36 layers' take 4.3 ms one by one, 3.2 in twos and 2.2 in fours for 14,080 tokens; 5.9, 5.0 and 5.4 for 24,000."""
LARGEST = np.float32(60000)
"""Largest value in units of its channel's scale that is coded: products may be rounded to float16."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransformGroup:
    """The basis of neighbouring layers, whose vectors are `[layer, 2, head, channel]`, flat: N numbers a token."""

    mean: Floats
    """`[N]`, in the units of keys and of scaled values."""
    scale: Floats
    """`[N]`, above 0: units of a channel that one step of a component is, if it lies in the channel's direction."""
    basis: NDArray[np.float16]
    """`[N, K]`: the direction of each stored component."""
    classes: NDArray[np.uint8]
    """`[K]`: the table of each component."""
    limit: float
    """Largest squared error of a coded token, over all channels on average, in squared steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformTables:
    """All that a calibration finds: what turns keys, the basis of each group, and tables of codes."""

    layers: int
    heads: int
    channels: int
    together: int
    """Layers of a group; the last group may have fewer."""
    parts: int
    """Streams of a token in a group; stream p has the components p, p + parts, p + 2 parts ..."""
    angles: Floats
    """`[channels / 2]` radians by which a pair of channels turns from one position to the next."""
    axes: NDArray[np.uint8]
    """`[channels / 2]`: which of a token's three positions turns the pair."""
    low: NDArray[np.uint8]
    """`[classes]`: low bits of a code that are stored as they are."""
    shift: Floats
    """`[classes, 2]`: by how much values of codes of magnitude 1, and above, are nearer to 0."""
    frequency: NDArray[np.uint16]
    """`[classes, 256]`: frequencies of the codes' high bits from -127 on, 4096 together; 0: never written."""
    groups: tuple[TransformGroup, ...]

    def to_bytes(self) -> bytes:
        """The object that a store holds."""
        sizes = (self.layers, self.heads, self.channels, self.together, self.parts, len(self.low), len(self.groups))
        parts: list[bytes] = [_HEADER.pack(_MAGIC, _VERSION, *sizes)]
        parts += [np.array([group.basis.shape[1] for group in self.groups], "<u4").tobytes()]
        parts += [np.array([group.limit for group in self.groups], "<f4").tobytes()]
        arrays: list[tuple[NDArray[Any], str]] = [(self.angles, "<f4"), (self.shift, "<f4"), (self.frequency, "<u2")]
        arrays += [(self.axes, "u1"), (self.low, "u1")]
        for group in self.groups:
            arrays += [(group.mean, "<f4"), (group.scale, "<f4"), (group.basis, "<f2"), (group.classes, "u1")]
        return b"".join([*parts, *(np.ascontiguousarray(array, dtype).tobytes() for array, dtype in arrays)])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read an untrusted object; `FormatError` names `where` it stands unless every number in it makes sense."""
        try:
            return cls._parsed(_Pieces(data))
        except ValueError as error:
            raise FormatError(f"{where} is not what a calibration of the codec transform writes: {error}.") from error

    @classmethod
    def _parsed(cls, pieces: "_Pieces") -> Self:
        magic, version, *sizes = _HEADER.unpack(pieces.take(_HEADER.size, "u1").tobytes())
        if magic != _MAGIC or version != _VERSION:
            raise ValueError(f"it begins with {magic!r}, version {version}, not {_MAGIC!r}, version {_VERSION}")
        layers, heads, channels, together, parts, classes, count = sizes
        if not all(1 <= one <= _MAX_AXIS for one in (*sizes[:5], count)) or channels % 2 or classes > MAX_CLASSES:
            raise ValueError(f"sizes {sizes} are out of bounds")
        if not classes or parts > 8 or count != -(-layers // together):
            raise ValueError(f"sizes {sizes} do not fit together")
        kept, limits = pieces.take(count, "<u4"), pieces.take(count, "<f4")
        angles, shift = pieces.take(channels // 2, "<f4"), pieces.take(2 * classes, "<f4").reshape(classes, 2)
        frequency = pieces.take(classes * SYMBOLS, "<u2").reshape(classes, SYMBOLS)
        axes, low = pieces.take(channels // 2, "u1"), pieces.take(classes, "u1")
        groups = []
        for index in range(count):
            size, some = min(together, layers - index * together) * 2 * heads * channels, int(kept[index])
            if some > size:
                raise ValueError(f"group {index} has {some} components of {size} channels")
            mean, scale = pieces.take(size, "<f4"), pieces.take(size, "<f4")
            basis, of_class = pieces.take(size * some, "<f2").reshape(size, some), pieces.take(some, "u1")
            finite = np.isfinite(mean).all() and np.isfinite(scale).all() and np.isfinite(basis).all()
            if not finite or not (scale > 0).all() or not (of_class < classes).all() or not limits[index] > 0:
                raise ValueError(f"group {index} has numbers that are not finite, or classes without a table")
            groups.append(
                TransformGroup(mean=mean, scale=scale, basis=basis, classes=of_class, limit=float(limits[index]))
            )
        pieces.end()
        if (
            (frequency.sum(1, dtype=np.int64) != TOTAL).any()
            or frequency[:, -1].any()
            or not frequency[:, MIDDLE].all()
        ):
            raise ValueError("frequencies of a table do not add up to 4096, or have none for 0")
        if (low > MAX_LOW).any() or (axes > 2).any() or not np.isfinite(angles).all() or not np.isfinite(limits).all():
            raise ValueError("low bits, axes, angles or limits are out of bounds")
        if not ((shift >= -1) & (shift <= 1)).all():
            raise ValueError("shifts are out of bounds")
        return cls(
            layers=layers,
            heads=heads,
            channels=channels,
            together=together,
            parts=parts,
            angles=angles,
            axes=axes,
            low=low,
            shift=shift,
            frequency=frequency,
            groups=tuple(groups),
        )

    @cached_property
    def starts(self) -> NDArray[np.uint32]:
        """`[classes, 256]`: sum of the frequencies before each."""
        total: NDArray[np.uint32] = np.cumsum(self.frequency, 1, dtype=np.uint32) - self.frequency
        return total

    @cached_property
    def symbols(self) -> NDArray[np.uint8]:
        """`[classes, 4096]`: the symbol of each slot."""
        return np.stack([np.repeat(np.arange(SYMBOLS, dtype=np.uint8), row) for row in self.frequency])

    @cached_property
    def bounds(self) -> NDArray[np.int32]:
        """`[classes, 2]`: least and greatest code of a class that has frequencies throughout."""
        first = [MIDDLE - int(np.argmin(np.append(row[MIDDLE::-1] > 0, False))) + 1 for row in self.frequency]
        last = [MIDDLE + int(np.argmin(np.append(row[MIDDLE:] > 0, False))) - 1 for row in self.frequency]
        low = self.low.astype(np.int32)
        return np.stack([(np.array(first) - MIDDLE) << low, ((np.array(last) - MIDDLE + 1) << low) - 1], 1)

    def layers_of(self, group: int) -> range:
        """Layers of a group."""
        return range(group * self.together, min((group + 1) * self.together, self.layers))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise `ValueError` for keys and values of another geometry."""
        wanted = (self.layers, 2, self.heads, shape[3] if len(shape) == 5 else 0, self.channels)
        if tuple(shape) != wanted or not wanted[3]:
            raise ValueError(
                f"the codec was calibrated for [layer, 2, head, token, channel] of {list(wanted)}, got {list(shape)}."
            )


class _Pieces:
    """Arrays that lie one after the other in untrusted bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int, dtype: str) -> NDArray[Any]:
        end = self._at + count * np.dtype(dtype).itemsize
        if end > len(self._data):
            raise ValueError(f"it has {len(self._data)} bytes, and more would have to follow")
        found = np.frombuffer(self._data, dtype, count, self._at)
        self._at = end
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"it has {len(self._data)} bytes, {len(self._data) - self._at} too many")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """Where the parts of a sample's bytes begin."""

    groups: int
    parts: int
    layers: int
    tokens: int

    @property
    def states(self) -> int:
        """uint32 `[group, part, token]`, behind int32 positions `[3, token]`."""
        return 12 * self.tokens

    @property
    def ends(self) -> int:
        """uint32 `[group, part, token]`: words before the end of each stream."""
        return self.states + 4 * self.groups * self.parts * self.tokens

    @property
    def scales(self) -> int:
        """uint8 `[layer, token]`: the size of a token's values."""
        return self.ends + 4 * self.groups * self.parts * self.tokens

    @property
    def words(self) -> int:
        """uint16 words of all streams."""
        end = self.scales + self.layers * self.tokens
        return end + -end % 4


@dataclass(frozen=True, slots=True)
class TransformCodec(LearntCodec):
    """About `rate` bits a value, by tables that a calibration found; without them only sizes can be estimated."""

    kind: ClassVar[str] = "transform"
    heavy: ClassVar[bool] = True

    rate: float
    """Bits a value that the calibration aimed at, all that belongs to a sample counted."""
    sha256: str = ""
    """SHA-256 of the tables' bytes; empty while there are none."""
    tables: TransformTables | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, rate: float, tables: TransformTables) -> Self:
        """The codec of these tables."""
        return cls(rate, hashlib.sha256(tables.to_bytes()).hexdigest(), tables)

    @classmethod
    def named(cls, name: str) -> Self | None:
        """The codec without tables that a name such as `transform:2.2` asks for; None for other names.

        Raises `ValueError` with what is allowed for a rate out of bounds.
        """
        kind, _, rate = name.partition(":")
        if kind != cls.kind:
            return None
        if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,2})?", rate) or not RATES[0] <= float(rate) <= RATES[1]:
            raise ValueError(f"transform:RATE with {RATES[0]} to {RATES[1]:g} bits a value, to two decimals")
        return cls(float(rate))

    @property
    def name(self) -> str:
        """The one name of a rate: `transform:2` of `transform:2.0` too."""
        return f"{self.kind}:{self.rate:g}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "version": _VERSION, "rate": self.rate, "tables_sha256": self.sha256}

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> Self:
        keys = {"kind", "version", "rate", "tables_sha256"}
        if document.keys() != keys:
            raise FormatError(f"{where}: a transform codec has exactly the keys {', '.join(sorted(keys))}.")
        version, rate, sha256 = (document[key] for key in ("version", "rate", "tables_sha256"))
        if type(version) is not int or version != _VERSION:
            raise FormatError(f"{where}: transform codec of version {version!r}; this library reads {_VERSION}.")
        if type(rate) not in (int, float) or not RATES[0] <= rate <= RATES[1]:
            raise FormatError(f"{where}: the rate of a transform codec is {RATES[0]} to {RATES[1]:g}, got {rate!r}.")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise FormatError(f"{where}: tables_sha256 is 64 hex digits, got {sha256!r}.")
        return cls(float(rate), sha256)

    @property
    def tables_bytes(self) -> bytes | None:
        return None if self.tables is None else self.tables.to_bytes()

    @property
    def width(self) -> int:
        return len(self.calibrated.groups[0].mean)

    def with_tables(self, read: Callable[[str], bytes], where: str) -> Self:
        data = read(self.sha256)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise FormatError(f"{where}: the codec's tables are damaged; copy the store anew, or extract again.")
        return type(self)(self.rate, self.sha256, TransformTables.from_bytes(data, where))

    def encoded_bytes(self, shape: tuple[int, ...]) -> int:
        """The most that a sample takes: a header, and every token stored as it is."""
        if self.tables is None:
            return self.expected_bytes(shape)
        self.tables.check_shape(shape)
        return self.sections(shape).words + 2 * math.prod(shape)

    def least_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes before the words, which a kernel reads by the number of tokens alone."""
        return self.sections(shape).words

    def expected_bytes(self, shape: tuple[int, ...]) -> int:
        return math.ceil(math.prod(shape) * self.rate / 8)

    def decoding_bytes(self, shape: tuple[int, ...], *, all_layers: bool = False) -> int:
        """The tables, and components of a group, or of some, and channels of one in float16.

        Estimated where there are no tables yet.
        """
        if self.tables is None:
            width = kept = 2 * shape[2] * shape[4]
            stored = shape[0] * width * kept * 2
        else:
            width, kept = max(group.basis.shape for group in self.tables.groups)
            stored = sum(group.basis.nbytes + 2 * (ALIGNED + 4) * len(group.mean) for group in self.tables.groups)
            stored += len(self.tables.low) * (TOTAL + 8 * SYMBOLS)
        together = min(self.groups_at_once(shape[3]), shape[0]) if all_layers else 1
        return stored + 2 * (shape[3] + ALIGNED) * (width + together * (kept + ALIGNED))

    def groups_at_once(self, tokens: int) -> int:
        """Groups whose streams a device decodes in one go, for so many tokens of all samples."""
        return max(1, min(_GROUPS_AT_ONCE, _TOKENS_AT_ONCE // max(1, tokens)))

    def sections(self, shape: tuple[int, ...]) -> Sections:
        """Where the parts of a sample's bytes begin."""
        tables = self.calibrated
        return Sections(groups=len(tables.groups), parts=tables.parts, layers=tables.layers, tokens=shape[3])

    @property
    def calibrated(self) -> TransformTables:
        """The tables. Raises `ValueError` where there are none."""
        if self.tables is None:
            raise ValueError("this codec has no tables yet: a calibration finds them from samples.")
        return self.tables

    def encode(self, bits: NDArray[np.uint16], positions: NDArray[Any] | None = None) -> NDArray[np.uint8]:
        """Encoded bytes of bfloat16 bits; `ValueError` unless all are finite and below 2^125.

        `positions`: `[3, token]`, at which the rotary embedding turned the keys, by default 0, 1, 2 ... on each axis;
        with wrong ones a sample takes more bits, and decodes as well.
        """
        tables, shape = self.calibrated, bits.shape
        tables.check_shape(shape)
        values = from_bfloat16(bits)
        if not (np.abs(values) < MAX_VALUE).all():
            raise ValueError(NOT_FINITE)
        places = _checked_positions(positions, shape[3])
        cos, sin = turns(tables, places)
        values[:, 0] = turned(values[:, 0], cos, -sin)
        sizes = value_sizes(values[:, 1])
        values[:, 1] /= SIZES[sizes][:, None, :, None]
        streams = [encode_group(tables, index, values, bits) for index in range(len(tables.groups))]
        states = np.stack([states for states, _, _ in streams])
        ends = np.cumsum(np.stack([used for _, used, _ in streams]).reshape(-1), dtype=np.uint32)
        sections = self.sections(shape)
        data = np.zeros(sections.words + 2 * int(ends[-1]), np.uint8)
        for begin, array, dtype in (
            (0, places, "<i4"),
            (sections.states, states, "<u4"),
            (sections.ends, ends, "<u4"),
            (sections.scales, sizes, "u1"),
            (sections.words, np.concatenate([words for _, _, words in streams]), "<u2"),
        ):
            raw = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            data[begin : begin + len(raw)] = raw
        return data

    def decode(self, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint16]:
        self.check_size(data.shape, shape)
        used = self.sections(shape).words + 2 * len(self.streams(data, shape).words)
        if used != len(data):
            raise FormatError(
                f"streams of {list(shape)} take {used} bytes, and there are {len(data)}; the sample is damaged, "
                "extract it again."
            )
        kv = np.empty(shape, np.uint16)
        for index in range(len(self.calibrated.groups)):
            layers = self.calibrated.layers_of(index)
            kv[layers.start : layers.stop] = self.decode_group(data, index, shape)
        return kv

    def decode_group(self, data: NDArray[np.uint8], index: int, shape: tuple[int, ...]) -> NDArray[np.uint16]:
        """bfloat16 bits `[layer, 2, head, token, channel]` of one group's layers; anything may follow the sample.

        Raises `FormatError` for streams that do not decode.
        """
        tables = self.calibrated
        group, layers, tokens = tables.groups[index], tables.layers_of(index), shape[3]
        sections, streams = self.sections(shape), self.streams(data, shape)
        codes = np.zeros((tokens, len(group.classes)), np.float16)
        raw = streams.states[index, 0] == 0
        for part in range(tables.parts):
            lanes = slice(part, None, tables.parts)
            ends, begins = streams.ends[index, part], streams.begins[index, part]
            found = decode_lanes(tables, group.classes[lanes], streams.states[index, part], begins, ends, streams.words)
            codes[:, lanes] = np.where(raw[:, None], 0, found)
        flat = (codes.astype(np.float32) @ group.basis.astype(np.float32).T) * group.scale + group.mean
        x = flat.reshape(tokens, len(layers), 2, tables.heads, tables.channels).transpose(1, 2, 3, 0, 4)
        sizes = data[sections.scales : sections.scales + tables.layers * tokens].reshape(tables.layers, tokens)
        x[:, 1] *= SIZES[sizes[layers.start : layers.stop]][:, None, :, None]
        cos, sin = turns(tables, streams.positions)
        x[:, 0] = turned(x[:, 0], cos, sin)
        found_bits = to_bfloat16(np.ascontiguousarray(x))
        for token in np.flatnonzero(raw):
            words = streams.words[streams.begins[index, 0, token] : streams.ends[index, 0, token]]
            found_bits[:, :, :, token] = words.reshape(len(layers), 2, tables.heads, tables.channels)
        return found_bits

    def streams(self, data: NDArray[np.uint8], shape: tuple[int, ...]) -> "Streams":
        """Read a sample's streams from its bytes. Raises `FormatError` for what cannot be."""
        tables, sections = self.calibrated, self.sections(shape)
        tables.check_shape(shape)
        if len(data) < sections.words:
            raise FormatError(f"{list(shape)} takes at least {sections.words} bytes in this codec, got {len(data)}.")
        lanes = (sections.groups, sections.parts, sections.tokens)
        positions = data[: sections.states].copy().view("<i4").reshape(3, -1)
        states = data[sections.states : sections.ends].copy().view("<u4").reshape(lanes)
        ends = data[sections.ends : sections.scales].copy().view("<u4").astype(np.int64)
        begins = np.concatenate([[0], ends[:-1]])
        count = int(ends[-1])
        if (ends < begins).any() or sections.words + 2 * count > len(data):
            raise FormatError(
                f"streams of {list(shape)} end beyond their bytes, or before they begin; the sample is damaged, "
                "extract it again."
            )
        ends, begins = ends.reshape(lanes), begins.reshape(lanes)
        raw = states[:, :1] == 0
        stored = np.zeros(lanes, np.int64)
        sizes = np.array([len(group.mean) for group in tables.groups])
        stored[:, 0] = np.where(raw[:, 0], sizes[:, None], 0)
        wrong = ((states < LEAST_STATE) != raw) | (raw & (ends - begins != stored))
        if wrong.any() or (positions < 0).any() or (positions >= MAX_POSITION).any():
            raise FormatError(
                f"states, lengths or positions of streams of {list(shape)} are none that are written; "
                "the sample is damaged, extract it again."
            )
        words = data[sections.words : sections.words + 2 * count].copy().view("<u2")
        return Streams(positions=positions, states=states, begins=begins, ends=ends, words=words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """The streams of a sample."""

    positions: NDArray[np.int32]
    states: NDArray[np.uint32]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    words: NDArray[np.uint16]


SIZES: Floats = np.ldexp(MANTISSAS[::2][np.arange(256) % 8], (np.arange(256) // 8 - 16).astype(np.int32)).astype(
    np.float32
)
"""Sizes of a token's values, by their byte: eighths of octaves from 2^-16 on."""


def value_sizes(values: Floats) -> NDArray[np.uint8]:
    """`[layer, token]`: the byte of the root of the mean square of `[layer, head, token, channel]`."""
    square = np.square(values.astype(np.float64)).mean((1, 3))
    byte = np.rint(4 * np.log2(np.maximum(square, 2.0**-32))) + 128
    sizes: NDArray[np.uint8] = np.clip(byte, 0, 255).astype(np.uint8)
    return sizes


def turns(tables: TransformTables, positions: NDArray[Any]) -> tuple[Floats, Floats]:
    """Cosine and sine `[token, channel / 2]` of the angles at these positions."""
    angle = positions[tables.axes].T.astype(np.float32) * tables.angles
    return np.cos(angle), np.sin(angle)


def turned(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """`[..., token, channel]` with each pair of channels, half of all apart, turned."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def quantised(components: Floats, bounds: NDArray[np.int32]) -> NDArray[np.int32]:
    """Codes of components in steps, `[token, component]`, moved to within what their classes can write."""
    size = np.minimum(np.abs(components), np.float32(2**20))
    codes = (np.sign(components) * np.floor(size + ROUNDING)).astype(np.int32)
    return np.clip(codes, bounds[:, 0], bounds[:, 1])


def dequantised(codes: NDArray[np.int32], shift: Floats) -> NDArray[np.float16]:
    """The values that codes `[..., component]` stand for, in steps; `shift`: `[component, 2]`."""
    size = np.abs(codes).astype(np.float32)
    size -= np.where(size == 1, shift[:, 0], np.where(size > 1, shift[:, 1], np.float32(0)))
    return (np.sign(codes) * size).astype(np.float16)


def encode_group(
    tables: TransformTables, index: int, values: Floats, bits: NDArray[np.uint16]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint16]]:
    """States and words used `[part, token]`, and the words, part after part, of one group of a sample.

    `values` are keys turned back and scaled values, `bits` what they were, `[layer, 2, head, token, channel]`.
    """
    group, layers = tables.groups[index], tables.layers_of(index)
    part = slice(layers.start, layers.stop)
    flat = values[part].transpose(3, 0, 1, 2, 4).reshape(values.shape[3], -1)
    basis = group.basis.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is stored as it is
        x = (flat - group.mean) / group.scale
        codes = quantised(np.nan_to_num(x @ basis), tables.bounds[group.classes])
        back = dequantised(codes, tables.shift[group.classes]).astype(np.float32) @ basis.T
        error = np.square(x - back).mean(1)
        coded = (error <= group.limit) & (np.abs(back).max(1, initial=0) < LARGEST)
    lanes = [
        encode_lanes(tables, group.classes[p :: tables.parts], codes[:, p :: tables.parts]) for p in range(tables.parts)
    ]
    coded &= sum(used for _, used, _ in lanes) < flat.shape[1]
    exact = bits[part].transpose(3, 0, 1, 2, 4).reshape(len(flat), -1)
    states = np.stack([np.where(coded, states, 0) for states, _, _ in lanes])
    lengths = np.stack([np.where(coded, used, 0) for _, used, _ in lanes])
    words = []
    for p, (_, used, written) in enumerate(lanes):
        if p == 0:
            lengths[0, ~coded] = flat.shape[1]
        for token in range(len(flat)):
            if coded[token]:
                words.append(written[token, : used[token]])
            elif p == 0:
                words.append(exact[token])
    return states.astype(np.uint32), lengths, np.concatenate(words)


def encode_lanes(
    tables: TransformTables, classes: NDArray[np.uint8], codes: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint16]]:
    """Final states and words used `[token]`, and words `[token, most]`, of codes `[token, component]`.

    The last component is written first, so that the first is read first, and the last word of a stream is read first.
    """
    tokens, steps = codes.shape
    state = np.full(tokens, LEAST_STATE, np.uint64)
    words, used = np.zeros((tokens, 2 * steps + 1), np.uint16), np.zeros(tokens, np.int64)
    rows, sixteen, bits = np.arange(tokens), np.uint64(16), np.uint64(PROBABILITY_BITS)

    def make_room(limit: NDArray[np.uint64] | np.uint64) -> None:
        nonlocal state
        full = state >= limit
        words[rows, used] = state & np.uint64(0xFFFF)  # kept where the place moves on
        used[full] += 1
        state = np.where(full, state >> sixteen, state)

    for step in reversed(range(steps)):
        of_class = int(classes[step])
        low = int(tables.low[of_class])
        if low:
            make_room(np.uint64(1 << 32 - low))
            state = state << np.uint64(low) | (codes[:, step] & ((1 << low) - 1)).astype(np.uint64)
        symbol = (codes[:, step] >> low) + MIDDLE
        frequency = tables.frequency[of_class, symbol].astype(np.uint64)
        make_room(frequency << np.uint64(32 - PROBABILITY_BITS))
        state = (state // frequency << bits) + state % frequency + tables.starts[of_class, symbol]
    return state, used, words


def decode_lanes(
    tables: TransformTables,
    classes: NDArray[np.uint8],
    states: NDArray[np.uint32],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    words: NDArray[np.uint16],
) -> NDArray[np.float16]:
    """Values `[token, component]` in steps; those of tokens whose state is 0 mean nothing.

    Raises `FormatError` for a stream that needs words beyond its own, leaves some, or does not end as it was begun.
    """
    live = states >= LEAST_STATE
    state, at = np.where(live, states, LEAST_STATE).astype(np.uint64), np.where(live, ends, begins)
    codes = np.empty((len(states), len(classes)), np.int32)
    padded = np.append(words, np.uint16(0))

    def refill() -> None:
        nonlocal state, at
        empty = state < LEAST_STATE
        at = at - empty
        if (at < begins)[live].any():
            raise FormatError(
                "a stream of keys and values needs more words than it has; the sample is damaged, extract it again."
            )
        word = padded[np.maximum(at, 0)].astype(np.uint64)
        state = np.where(empty, state << np.uint64(16) | word, state)

    for step, of_class in enumerate(classes.tolist()):
        slot = (state & np.uint64(TOTAL - 1)).astype(np.int64)
        symbol = tables.symbols[of_class, slot]
        frequency, start = tables.frequency[of_class, symbol], tables.starts[of_class, symbol]
        state = frequency.astype(np.uint64) * (state >> np.uint64(PROBABILITY_BITS)) + (slot - start).astype(np.uint64)
        refill()
        code = symbol.astype(np.int32) - MIDDLE
        if low := int(tables.low[of_class]):
            code = code << low | (state & np.uint64((1 << low) - 1)).astype(np.int32)
            state >>= np.uint64(low)
            refill()
        codes[:, step] = code
    if (state[live] != LEAST_STATE).any() or (at != begins)[live].any():
        raise FormatError(
            "a stream of keys and values does not end as it was begun; the sample is damaged, extract it again."
        )
    return dequantised(codes, tables.shift[classes])


def _checked_positions(positions: NDArray[Any] | None, tokens: int) -> NDArray[np.int32]:
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens), (3, tokens))
    if positions.shape != (3, tokens) or (positions < 0).any() or (positions >= MAX_POSITION).any():
        raise ValueError(f"positions are [3, {tokens}] from 0 to {MAX_POSITION - 1}, got {list(positions.shape)}.")
    return positions.astype(np.int32)
