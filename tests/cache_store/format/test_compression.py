import numpy as np
import pytest

from cache_store import Field
from cache_store.format.compression import decode_into, encode


@pytest.mark.parametrize(("raw", "stored"), [(999, 20), (100, 21), (2**32 - 1, 20)])
def test_a_lying_compressed_chunk_is_refused_before_it_is_decoded(raw, stored) -> None:
    frame = np.array([0, raw, 0, stored, 0], "<u4").view(np.uint8)
    with pytest.raises(ValueError, match=rf"sizes \[{raw}, 0, {stored}\], expected 100 raw and 20 stored bytes"):
        decode_into(np.empty(100, np.uint8), frame, 100)
    with pytest.raises(ValueError, match=rf"sizes \[{raw}\], expected"):
        decode_into(np.empty(100, np.uint8), frame[:8], 100)


@pytest.mark.parametrize("kept", [4000, 3996, 1, 0])
def test_a_target_takes_the_beginning_of_what_was_compressed(kept) -> None:
    """The last chunk of an array ends in padding that its reader has no room for."""
    values = np.arange(1000, dtype=np.int32)
    (frame,) = encode(Field(name="x", dtype="int32", axes=("i",), compression="zstd"), (values.view(np.uint8),))
    assert len(frame) < values.nbytes
    target = np.zeros(kept, np.uint8)
    decode_into(target, np.frombuffer(frame, np.uint8), values.nbytes)
    assert target.tobytes() == values.tobytes()[:kept]
