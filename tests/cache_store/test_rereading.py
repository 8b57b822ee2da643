import time

import pytest

from cache_store import FormatError, ObjectStorageError
from cache_store.rereading import reread


@pytest.mark.parametrize("error", [FormatError("bent"), FileNotFoundError(2, "gone"), OSError(5, "I/O error")])
def test_what_fails_is_read_again_after_each_pause_and_freshly(error, monkeypatch) -> None:
    said, waited = [], []
    monkeypatch.setattr(time, "sleep", waited.append)

    def read() -> int:
        said.append("read")
        if said.count("read") < 4:
            raise error
        return 7

    assert reread(read, lambda: said.append("forget"), (0.0, 0.1, 1.0)) == 7
    assert said == ["read", "forget", "read", "forget", "read", "forget", "read"]
    assert waited == [0.0, 0.1, 1.0]
    said.clear()
    with pytest.raises(type(error)):
        reread(read, lambda: None, (0.0, 0.0))


def test_what_does_not_answer_was_tried_again_already() -> None:
    tries = []

    def read() -> None:
        tries.append(1)
        raise ObjectStorageError("the server does not answer after 9 tries")

    with pytest.raises(ObjectStorageError):
        reread(read, lambda: None)
    assert tries == [1]
