"""Cached samples for stage two: one or several stores as one indexed set."""

import json
import math
import operator
import reprlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.features import (
    KV_SHAPE,
    POSE_FIELDS,
    PREFIX_FIELDS,
    ROUTE,
    UNROUTED,
    CachedSample,
    from_arrays,
    stored_layers,
    stored_strata,
    tail_count,
    tail_name,
)
from alpacache.cached_samples.identity import check_same_model, model_differences, refuse_differences, store_codec
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.cached_samples.sample_choice import ChosenSamples, SampleChoice
from alpacache.driving.cameras import FRONT_CAMERA, camera_words, changes_of
from alpacache.driving.route import command_of
from alpacache.driving.sample import Floats, SampleRef
from alpacache.driving.strata import STRATA, Strata, Turn
from alpacache.errors import DataError, UsageError
from alpacache.layer_choice import layers_text
from alpacache.prefix.layout import PrefixLayout, TailRoom
from cache_store import CacheReader, KVCodec, SampleReadError, differences
from cache_store.concurrency import in_order
from cache_store.kv.layered import LayeredCodec
from cache_store.sample_read import Ranges

_SHARED = ("prompt", "processor", "dtype", "codec", "codec_definition")
_POSE_THREADS = 4
_MOST_TOKENS = 2**24
"""More than any prefix has."""
_TRIED = 16
"""Samples that are looked at for one that can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumShare:
    """Part of a data set that is in one stratum."""

    samples: int
    share: float
    """Part of an epoch's places."""


class CachedDataset:
    """The committed samples of the given stores, in order of store and id; all of them, or those that are chosen.

    Nothing that reads from it can tell the chosen samples from stores that hold no others. `load` is safe in threads.
    """

    def __init__(
        self,
        stores: Sequence[str | Path],
        checkpoint: Checkpoint,
        *,
        choice: PrefixChoice | None = None,
        samples: SampleChoice | None = None,
    ) -> None:
        """Open the stores; `choice` says which prefix a ring brings of a sample, by default the direct one.

        Raises `UsageError` where there is no store, where stores do not go together, or lack the rollouts that are to
        be chosen from, and for `samples` that choose none, `SampleReadError` where a sample cannot be read that a
        condition asks about.
        """
        if not stores:
            raise UsageError("stores is empty; expected a directory or s3://BUCKET/PREFIX, or several.")
        self.choice = choice or PrefixChoice()
        readers = [CacheReader(store) for store in stores]
        # What needs no look at the model comes first: that takes seconds of imports.
        if self.choice.route_dropout and not any(ROUTE in reader.fields for reader in readers):
            raise UsageError(
                f"no sample of {', '.join(map(str, stores))} has a route that could be dropped. Extract them with "
                "`alpacache extract --route`, or leave --route-dropout out."
            )
        if self.choice.prefix != "direct":
            for store, reader in zip(stores, readers, strict=True):
                _check_rollouts(str(store), reader, self.choice.prefix)
        for store, reader in zip(stores, readers, strict=True):
            check_same_model(checkpoint, reader.identity, store=str(store))
        # The VLM, its prompt and how KV is stored must be the same; cameras, frames and routes may differ.
        models = [reader.identity["model"] for reader in readers]
        shared = [_shared(reader.identity) for reader in readers]
        for store, model, identity in zip(stores, models, shared, strict=True):
            what = f"store {store} cannot be mixed with {stores[0]}"
            remedy = "Train on one of them, or extract the other again with the same settings."
            lines = [f"model.{line}" for line in model_differences(models[0], model)]
            refuse_differences(lines + differences(shared[0], identity), what, remedy)
        self.codec: KVCodec | None = store_codec(readers[0].identity, store=str(stores[0]))
        """Codec of every sample; None for plain bfloat16."""
        self.prefix_fields = PREFIX_FIELDS if self.codec is None else (*PREFIX_FIELDS, KV_SHAPE)
        self.layers: tuple[int, ...] | None = None
        """The VLM's layers whose keys and values are read; None: all that the stores have. See `of_layers`."""
        self._shapes: dict[CacheReader, tuple[int, ...]] = {}
        self._ranges: dict[tuple[CacheReader, tuple[int, ...]], list[tuple[int, int]]] = {}
        self.rollouts = min(tail_count(reader.fields) for reader in readers)
        """Number of reasoning rollouts that every sample has tails of."""
        self.nameless = [error for reader in readers for error in reader.unreadable if not error.sample_id]
        """Errors of commit records so damaged that not even the sample's id can be told: those samples are absent."""
        self._index = [(reader, sample_id) for reader in readers for sample_id in reader.sample_ids]
        if not self._index:
            raise UsageError(f"no committed sample in {', '.join(map(str, stores))}; run `alpacache extract` first.")
        ends = np.cumsum([len(reader.sample_ids) for reader in readers]).tolist()
        self.store_ranges = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        """Each store's sample indices."""
        self.all_ids = [self.ids[places.start : places.stop] for places in self.store_ranges]
        """Ids of all samples of each store, chosen or not."""
        self._threads = max(reader.threads for reader in readers)
        """Number of small reads worth having in flight."""
        self._strata: dict[tuple[CacheReader, str], Strata | SampleReadError] = {}
        self.chosen: ChosenSamples | None = None
        """How the samples were chosen; None for all."""
        if samples is not None and samples.text:
            self._choose(samples)

    def _choose(self, samples: SampleChoice) -> None:
        """Drop all samples but the chosen ones."""
        self.chosen = chosen = samples.resolve(self)
        self._index = [self._index[index] for index in chosen.indices.tolist()]
        ends = [int(np.searchsorted(chosen.indices, places.stop)) for places in self.store_ranges]
        self.store_ranges = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def __len__(self) -> int:
        return len(self._index)

    def sample_id(self, index: int) -> str:
        return self._index[index][1]

    def of_layers(self, layers: Sequence[int]) -> "CachedDataset":
        """The same samples with keys and values of these of the VLM's layers alone, rising; no others are fetched.

        Chunks of a store are fetched whole, because that is what their checksums are of. Raises `UsageError` for what
        is no rising choice of layers, and naming the layers that a store, or this data set, does not have.
        """
        layers = _rising(layers)
        if self.layers is not None and (left_out := sorted(set(layers) - set(self.layers))):
            raise UsageError(
                f"this data set has layers {layers_text(self.layers)} of the VLM alone; `of_layers` left "
                f"{layers_text(left_out)} out before. Ask the data set that it was made from."
            )
        if layers == self.layers:
            return self
        readers = self._readers
        for reader in readers:
            held = self.held_by(reader)
            if lost := sorted(set(layers) - set(held)):
                raise UsageError(
                    f"store {reader.path} has keys and values of layers {layers_text(held)} of the VLM; layers "
                    f"{layers_text(lost)} are asked for as well. Extract into another store with these layers "
                    "(`alpacache extract --layers`), or `train --from-scratch` an expert for those that are there."
                )
        if all(layers == self.held_by(reader) for reader in readers):
            return self
        if self.codec is not None and not isinstance(self.codec, LayeredCodec):
            raise UsageError(
                f"{readers[0].path}: its codec {self.codec.kind!r} decodes all layers together; none can be left out. "
                "Train an expert that attends to all of them, or extract into another store with --layers."
            )
        chosen = copy(self)
        for name in ("layout", "_sizes", "longest", "tail_room"):
            chosen.__dict__.pop(name, None)
        chosen.layers, chosen._ranges = layers, {}
        return chosen

    @property
    def held_layers(self) -> tuple[int, ...]:
        """The VLM's layers that every store has keys and values of, rising."""
        return tuple(sorted(set.intersection(*(set(self.held_by(reader)) for reader in self._readers))))

    @property
    def _readers(self) -> list[CacheReader]:
        """The stores that have a sample."""
        return [self._index[places.start][0] for places in self.store_ranges if places]

    def held_by(self, reader: CacheReader) -> tuple[int, ...]:
        """The VLM's layers that a store has keys and values of, rising. Raises `DataError` where it cannot be so."""
        count, named = self._shape_in(reader)[0], stored_layers(reader.identity)
        if named is None:
            return tuple(range(count))
        rising = all(type(layer) is int and layer >= 0 for layer in named) and list(named) == sorted(set(named))
        if len(named) != count or not rising:
            raise DataError(
                f"store {reader.path} says in its identity that it has layers {str(list(named))[:200]}, and its "
                f"samples have {count} of them. Its zarr.json was changed; extract it again."
            )
        return named

    def _shape_in(self, reader: CacheReader) -> tuple[int, ...]:
        """Shape of the keys and values of a sample of a store, the first that can be read."""
        if reader not in self._shapes:
            places = next(places for places in self.store_ranges if places and self._index[places.start][0] is reader)
            error: SampleReadError | None = None
            for index in places:
                try:
                    self._shapes[reader] = self._kv_shape(index)
                    break
                except SampleReadError as failed:
                    error = error or failed
            else:
                assert error is not None
                raise error
        return self._shapes[reader]

    def ranges(self, reader: CacheReader, sample_id: str, fields: Sequence[str]) -> Ranges:
        """What is read of those of the fields that are keys and values; empty where they are read whole.

        Raises `DataError` for a sample of other layers than its store has.
        """
        if self.layers is None:
            return {}
        return {
            name: self._kv_ranges(reader, sample_id, reader.shape(sample_id, name))
            for name in fields
            if name.endswith("kv")
        }

    def _kv_ranges(self, reader: CacheReader, sample_id: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Ranges of axis 0 of keys and values of this stored shape: layers, or bytes of a codec."""
        if (known := self._ranges.get((reader, shape))) is not None:
            return known
        assert self.layers is not None
        held = self.held_by(reader)
        places, starts = [held.index(layer) for layer in self.layers], list(range(len(held) + 1))
        if self.codec is not None:
            assert isinstance(self.codec, LayeredCodec)
            _, _, kv_heads, _, head_dim = self._shape_in(reader)
            whole = PrefixLayout(layers=len(held), kv_heads=kv_heads, head_dim=head_dim, codec=self.codec)
            tokens = bisect_left(range(_MOST_TOKENS), shape[0], lo=1, key=whole.size_bytes)
            starts = list(self.codec.layer_starts(whole.shape(tokens)))
        if shape[0] != starts[-1]:
            what = "layers" if self.codec is None else "bytes"
            raise DataError(
                f"sample {sample_id!r} has keys and values of {shape[0]} {what}, which is not what the {len(held)} "
                f"layers of {reader.path} take. Extract it again, or leave its store out."
            )
        ranges: list[tuple[int, int]] = []
        for place in places:
            if ranges and ranges[-1][1] == starts[place]:
                ranges[-1] = ranges[-1][0], starts[place + 1]
            else:
                ranges.append((starts[place], starts[place + 1]))
        self._ranges[reader, shape] = ranges
        return ranges

    def shape_read(self, reader: CacheReader, stored: Sequence[int]) -> tuple[int, ...]:
        """Shape of what is read of a sample with keys and values `[layer, 2, kv_head, token, channel]`."""
        if self.layers is None or stored[0] != len(self.held_by(reader)):
            return tuple(stored)
        return (len(self.layers), *stored[1:])

    @property
    def ids(self) -> list[str]:
        """Ids of all samples, by index."""
        return [sample_id for _, sample_id in self._index]

    @property
    def vlm(self) -> dict[str, str] | None:
        """The VLM that the features come from, if `extract --vlm` put it in place of the model's own."""
        model = self._index[0][0].identity["model"]
        return {"id": model["vlm"], "weights_sha256": model["vlm_weights_sha256"]} if "vlm" in model else None

    @property
    def plain(self) -> list[int]:
        """Indices of the samples of view 0, the unchanged pictures, which models are judged on.

        Raises `UsageError` if there are none.
        """
        plain = [index for index, (_, sample_id) in enumerate(self._index) if SampleRef.parse(sample_id).view == 0]
        if not plain:
            stores = ", ".join(dict.fromkeys(str(reader.path) for reader, _ in self._index))
            raise UsageError(f"no sample of view 0 in {stores}; models are judged on it, extract it too.")
        return plain

    @property
    def pictures(self) -> set[str]:
        """What the VLM saw in the stores, in words: cameras, and black pictures in the place of some."""
        return {words for reader in {reader for reader, _ in self._index} if (words := camera_words(reader.identity))}

    @property
    def changes(self) -> set[tuple[str, ...]]:
        """What was done to the pictures of the stores since they were recorded."""
        return {tuple(changes_of(reader.identity)) for reader in {reader for reader, _ in self._index}}

    def locate(self, index: int) -> tuple[CacheReader, str]:
        """The store that has a sample, and the sample's id there."""
        return self._index[index]

    def tails_of(self, index: int) -> tuple[str, ...]:
        """Beginnings of the names of the fields of those tails that may be chosen for a sample: the one without its
        route, which not every sample has, and those of rollouts.
        """
        return tuple(map(tail_name, (*self._twins, *range(self._rollouts_of(index)))))

    def tail_at(self, index: int, position: int) -> int | None:
        """Place in `tails_of` of the tail that a sample has at a place of the global order; None: its direct prefix."""
        if self.choice.is_direct:
            return None
        sample_id, epoch = self.sample_id(index), position // len(self)
        if self._twins and self.tail_bytes[index, 0] and self.choice.drops_route(sample_id, epoch):
            return 0
        chosen = self.choice.tail(sample_id, epoch, rollouts=self._rollouts_of(index))
        return None if chosen is None else chosen + len(self._twins)

    @property
    def _twins(self) -> tuple[str, ...]:
        """Tails that may be chosen beside those of rollouts."""
        return (UNROUTED,) if self.choice.route_dropout else ()

    def _rollouts_of(self, index: int) -> int:
        """Number of rollouts that may be chosen for a sample."""
        return 0 if self.choice.prefix == "direct" else tail_count(self._index[index][0].fields)

    def load(self, index: int, *, tails: int = 0, twin: str | None = None) -> CachedSample:
        """Read one sample's prefix, the tails of its first `tails` reasoning rollouts, and one of `TWINS` if it has it.

        Raises `UsageError` where its store has fewer rollouts, `SampleReadError` where a stored byte is not as
        committed or cannot be read.
        """
        reader, sample_id = self._index[index]
        held = tail_count(reader.fields) if tails else 0
        if not 0 <= tails <= held:
            raise UsageError(
                f"tails is {tails}; store {reader.path} has {held} reasoning rollouts of each sample. Ask for at most "
                "as many, or extract more into another store (`alpacache extract --reasoning rollout --rollouts N`)."
            )
        names = tuple(map(tail_name, range(tails)))
        fields = [name for name in reader.fields if name.startswith(names)]
        if twin is not None:
            fields += [name for name in reader.fields_of(sample_id) if name.startswith(tail_name(twin))]
        names_read = (*self.prefix_fields, *fields)
        arrays = reader.read(sample_id, names_read, ranges=self.ranges(reader, sample_id, names_read))
        layers = self.layers
        if layers is None and stored_layers(reader.identity) is not None:
            layers = self.held_by(reader)
        return from_arrays(sample_id, arrays, codec=self.layout.codec, twin=twin, layers=layers)

    @property
    def routed(self) -> bool:
        """True if samples of any store may have a route."""
        return any(ROUTE in self._index[places.start][0].fields for places in self.store_ranges if places)

    def route(self, index: int) -> str | None:
        """The route in a sample's prompt; None if there is none."""
        reader, sample_id = self._index[index]
        if ROUTE not in reader.fields or ROUTE not in reader.fields_of(sample_id):
            return None
        return str(reader.read(sample_id, fields=[ROUTE])[ROUTE])

    def has_twin(self, index: int, twin: str) -> bool:
        """Tell whether a sample has one of `TWINS`."""
        reader, sample_id = self._index[index]
        return f"{tail_name(twin)}kv" in reader.fields_of(sample_id)

    def poses(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A sample's history and future, xyz (m, ego frame at t0) and rotations each; reads no keys and values."""
        reader, sample_id = self._index[index]
        arrays = reader.read(sample_id, fields=POSE_FIELDS)
        history_xyz, history_rot, future_xyz, future_rot = (torch.from_numpy(arrays[name]) for name in POSE_FIELDS)
        return history_xyz, history_rot, future_xyz, future_rot

    def start_position(self, index: int) -> int:
        """Position of a sample's first action token behind its direct prefix; reads no keys and values."""
        reader, sample_id = self._index[index]
        return int(reader.read(sample_id, fields=["start_position"])["start_position"])

    @cached_property
    def layout(self) -> PrefixLayout:
        """Layout of any sample's KV bytes. Raises `UsageError` if the stores do not share one."""
        geometries = {}
        for places in filter(None, self.store_ranges):
            path = self._index[places.start][0].path
            stored = self._any_kv_shape([index for index in places if index not in self.unreadable])
            geometries[path] = self.shape_read(self._index[places.start][0], stored)[::2]
        if len(set(geometries.values())) > 1:
            lines = [f"{path}: {shape}" for path, shape in geometries.items()]
            raise UsageError("stores of different layers, heads or channels cannot be mixed:\n  " + "\n  ".join(lines))
        layers, kv_heads, head_dim = next(iter(geometries.values()))
        codec = self.codec
        if self.layers is not None and isinstance(codec, LayeredCodec):  # all stores have the same codec and layers
            held = self.held_by(self._readers[0])
            codec = codec.of_layers([held.index(layer) for layer in self.layers])
        varies = codec is not None and not codec.fixed_size
        most = int(self._sizes[0].max()) if varies else None
        return PrefixLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=codec, most_bytes=most)

    @property
    def unreadable(self) -> dict[int, SampleReadError]:
        """Samples whose commit record cannot be read, and why; reads every record once, about 0.1 ms each."""
        return self._sizes[1]

    @property
    def kv_bytes(self) -> NDArray[np.int64]:
        """Bytes of each sample's keys and values, of an `unreadable` one as many as the largest has."""
        return self._sizes[0][:, 0]

    @property
    def tail_bytes(self) -> NDArray[np.int64]:
        """`[samples, rollouts]`: bytes of the tails that may be chosen, 0 for those that a sample does not have."""
        return self._sizes[0][:, 1:]

    @cached_property
    def _sizes(self) -> tuple[NDArray[np.int64], dict[int, SampleReadError]]:
        """Bytes `[samples, 1 + rollouts]` of each sample's prefix and tails, and the errors of the unreadable."""

        def size(index: int) -> list[int] | SampleReadError:
            reader, sample_id = self._index[index]
            try:
                there = reader.fields_of(sample_id)
                fields = [f"{name}kv" for name in ("", *self.tails_of(index))]
                return [self._kv_elements(reader, sample_id, name) if name in there else 0 for name in fields]
            except SampleReadError as error:
                return error

        answers = list(in_order(size, range(len(self)), self._threads))
        errors = {index: value for index, value in enumerate(answers) if isinstance(value, SampleReadError)}
        if len(errors) == len(answers):
            raise next(iter(errors.values()))
        sizes = np.zeros((len(answers), max(len(value) for value in answers if isinstance(value, list))), np.int64)
        for index, value in enumerate(answers):
            if isinstance(value, list):
                sizes[index, : len(value)] = value
        sizes[list(errors)] = sizes.max(0)
        return sizes * (torch.bfloat16.itemsize if self.codec is None else 1), errors

    def _kv_elements(self, reader: CacheReader, sample_id: str, name: str) -> int:
        """Bytes, or bfloat16 numbers, that are read of keys and values."""
        shape = reader.shape(sample_id, name)
        if self.layers is None:
            return math.prod(shape)
        return sum(end - first for first, end in self._kv_ranges(reader, sample_id, shape)) * math.prod(shape[1:])

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prefix that may come, with tails a few more (`TailRoom.longest`)."""
        return self._most_tokens(0) if self.tail_room is None else self.tail_room.longest

    @cached_property
    def tail_room(self) -> TailRoom | None:
        """Lengths of the longest stored prefix and the longest tail; None where only direct prefixes come."""
        if self.choice.is_direct:
            return None
        parts = [part for part in range(1, self._sizes[0].shape[1]) if self._sizes[0][:, part].any()]
        if not parts:
            raise UsageError("no sample has a route that could be dropped; leave --route-dropout out.")
        return TailRoom(stored=self._most_tokens(0), tail=max(map(self._most_tokens, parts)))

    def _most_tokens(self, part: int) -> int:
        """Tokens of the longest prefix (part 0) or tail, which is the one of most bytes where bytes go with tokens."""
        tails = ["", *self._twins, *range(self._sizes[0].shape[1])]
        sizes, name = self._sizes[0][:, part], tail_name(tails[part]) if part else ""
        readable = [index for index in range(len(self)) if index not in self.unreadable and sizes[index]]
        if self.codec is None:
            return self._kv_shape(max(readable, key=sizes.__getitem__), name)[3]
        if self.codec.fixed_size:
            return bisect_left(range(_MOST_TOKENS), int(sizes.max()), key=self.layout.size_bytes)

        def tokens(index: int) -> int:
            try:
                return self._kv_shape(index, name)[3]
            except SampleReadError:  # its turn will tell; the others are none the worse
                return 0

        return max(in_order(tokens, readable, self._threads))

    @cached_property
    def turns(self) -> list[Turn | SampleReadError]:
        """Turn stratum of each sample's recorded path, or why it cannot be read; reads the poses alone."""
        found = self.known_strata(range(len(self)))
        return [one if isinstance(one, SampleReadError) else one.turn for one in found]

    def known_strata(self, indices: Sequence[int]) -> list[Strata | SampleReadError]:
        """Strata of some samples' recorded paths, or why one cannot be read; reads the poses alone, and once."""

        def read(place: tuple[CacheReader, str]) -> Strata | SampleReadError:
            reader, sample_id = place
            try:
                return stored_strata(sample_id, reader.read(sample_id, fields=POSE_FIELDS))
            except SampleReadError as error:
                return error

        places = [self._index[index] for index in indices]
        new = [place for place in places if place not in self._strata]
        found = in_order(read, new, max(_POSE_THREADS, self._threads))
        self._strata |= dict(zip(new, found, strict=True))
        return [self._strata[place] for place in places]

    def strata_of(self, indices: Sequence[int]) -> list[Strata]:
        """Strata of some samples' recorded paths. Raises the error of the first that cannot be read."""
        strata = []
        for one in self.known_strata(indices):
            if isinstance(one, SampleReadError):
                raise one
            strata.append(one)
        return strata

    def commands_of(self, indices: Sequence[int]) -> list[str]:
        """What the routes of some samples command. Raises `UsageError` where no sample can have a route."""
        if not self.routed:
            raise UsageError("no store was extracted with routes, so no sample has a command to be chosen by.")
        routes = in_order(self.route, indices, max(_POSE_THREADS, self._threads))
        return [command_of(route) for route in routes]

    def share_strata(self, due: Floats | None = None) -> dict[str, StratumShare]:
        """Samples of each stratum that has any, in the order of `STRATA`; unreadable samples are in none.

        `due` `[samples]`: places that each has in an epoch; by default one.
        """
        known = self.known_strata(range(len(self)))
        labels = [one.labels if isinstance(one, Strata) else () for one in known]
        due = np.ones(len(self)) if due is None else due
        rows = {name: [row for row, names in enumerate(labels) if name in names] for name in STRATA}
        return {
            name: StratumShare(samples=len(those), share=float(due[those].sum() / due.sum()))
            for name, those in rows.items()
            if those
        }

    def error_of(self, index: int) -> SampleReadError | None:
        """Read all that models need of a sample, and return what is wrong with it, if anything is."""
        reader, sample_id = self._index[index]
        wanted = self.tails_of(index)
        try:
            tails = [name for name in reader.fields_of(sample_id) if wanted and name.startswith(wanted)]
            fields = (*self.prefix_fields, *POSE_FIELDS, *tails)
            reader.read(sample_id, fields, ranges=self.ranges(reader, sample_id, fields))
        except SampleReadError as error:
            return error
        return None

    def refuse_unreadable(self) -> None:
        """Raise the first error of a commit record that cannot be read, if there is one."""
        for error in (*self.nameless, *self.unreadable.values()):
            raise error

    def front_picture(self, index: int) -> tuple[bytes | None, dict[str, Any] | None]:
        """The front camera's small JPEG and its calibration, each None if the sample has none."""
        reader, sample_id = self._index[index]
        there = {"front_jpeg", "calibration"}.intersection(reader.fields_of(sample_id))
        arrays = reader.read(sample_id, fields=sorted(there))
        cameras = json.loads(str(arrays["calibration"])) if "calibration" in there else None
        lens = cameras.get(FRONT_CAMERA) if isinstance(cameras, dict) else None
        jpeg = arrays["front_jpeg"].tobytes() if "front_jpeg" in there else None
        return jpeg, lens if isinstance(lens, dict) else None

    def _any_kv_shape(self, indices: Sequence[int]) -> tuple[int, ...]:
        """The shape of the first of these samples that can be read. Raises the error of one if none of several can."""
        error: SampleReadError | None = None
        for index in indices[:_TRIED]:
            try:
                return self._kv_shape(index)
            except SampleReadError as failed:
                error = failed
        raise error or next(iter(self.unreadable.values()))

    def _kv_shape(self, index: int, name: str = "") -> tuple[int, ...]:
        """`[layer, 2, kv_head, token, channel]` of a sample's prefix, or of the tail whose fields begin with `name`."""
        reader, sample_id = self._index[index]
        if self.codec is None:
            return reader.shape(sample_id, f"{name}kv")
        field = f"{name}{KV_SHAPE}"
        return tuple(reader.read(sample_id, fields=[field])[field].tolist())


def _rising(layers: Sequence[int]) -> tuple[int, ...]:
    """`layers` as whole numbers. Raises `UsageError` unless there are some, and each is above the one before."""
    try:
        numbers = () if bool in map(type, layers) else tuple(map(operator.index, layers))
    except TypeError:
        numbers = ()
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise UsageError(f"layers is {reprlib.repr(layers)}; expected layer numbers from 0, rising, as in (0, 6, 12).")
    return numbers


def _check_rollouts(store: str, reader: CacheReader, prefix: str) -> None:
    """Raise `UsageError` for a store without rollouts where they are to be trained on."""
    if not tail_count(reader.fields):
        raise UsageError(
            f"store {store} has no reasoning rollouts, and the prefix is to be {prefix!r}. Extract its samples into "
            "another store with `alpacache extract --reasoning rollout`, or pass --prefix direct."
        )


def _shared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that stores of one dataset have in common."""
    shared = {key: identity.get(key) for key in _SHARED}
    if isinstance(prompt := shared["prompt"], Mapping):
        shared["prompt"] = {key: value for key, value in prompt.items() if key != "route"}
    return shared
