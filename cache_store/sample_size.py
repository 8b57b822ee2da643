"""What a sample will take in a store, before its large arrays exist: for plans, from shapes alone."""

import math
from collections.abc import Mapping

from cache_store.document import to_bytes
from cache_store.field import Field
from cache_store.sample_group import Value, array_metadata, chunk_keys, encode
from cache_store.store_info import METADATA
from cache_store.stored_object import TRAILER_BYTES


def sample_size(
    sample_id: str, small: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Field]
) -> dict[str, int]:
    """Bytes by field, as `info` counts them of a store of one such sample.

    Args:
        small: values of packed and text fields.
        shapes: of the fields of layout `array`, uncompressed.
        fields: the store's schema, in its order.
    """
    values = {name: small[name] for name in fields if name in small}
    group = encode(sample_id, values, fields)
    sizes = {
        name: math.prod(group.shapes[name]) * fields[name].stored_dtype.itemsize
        for name in values
        if fields[name].layout == "packed"
    }
    rest = group.size_bytes - sum(sizes.values())
    for name, shape in shapes.items():
        chunk = fields[name].chunk_shape(shape)
        chunk_bytes = math.prod(chunk) * fields[name].stored_dtype.itemsize + TRAILER_BYTES
        metadata = to_bytes(array_metadata(fields[name], shape), f"field {name!r}")
        sizes[name] = sum(chunk_bytes for _ in chunk_keys(shape, chunk[0] if chunk else 1)) + len(metadata)
    return {name: sizes[name] for name in fields if name in sizes} | {METADATA: rest}
