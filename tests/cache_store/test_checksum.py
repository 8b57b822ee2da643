import numpy as np
import pytest

from cache_store.checksum import crc32c, without_zeros


def test_the_checksum_is_crc_32c_and_goes_on_from_what_it_covers() -> None:
    block = np.frombuffer(b"123456789", np.uint8)
    assert crc32c(block) == 0xE3069283
    assert crc32c(block[4:], crc32c(block[:4])) == 0xE3069283
    assert crc32c(block[:0], 7) == 7


@pytest.mark.parametrize("count", [0, 1, 15])
def test_zeros_at_the_end_are_taken_out_of_a_checksum(count) -> None:
    data = np.arange(100, dtype=np.uint8)
    whole = crc32c(np.concatenate([data, np.zeros(count, np.uint8)]))
    assert without_zeros(whole, count) == crc32c(data)
