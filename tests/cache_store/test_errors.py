import errno
import pickle

import pytest

from cache_store import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.StoreNotFoundError("m"), FileNotFoundError),
        (errors.IdentityMismatchError("m", ["a: 1"]), ValueError),
        (errors.FormatError("m"), ValueError),
        (errors.CorruptSampleError("m", "id", "kv"), OSError),
        (errors.SampleNotFoundError("m"), KeyError),
        (errors.FieldNotFoundError("m"), KeyError),
        (errors.StoreFullError("m", 7, errno.EDQUOT), OSError),
        (errors.UnsupportedFileSystemError("m"), OSError),
    ],
)
def test_errors_inherit_the_builtin_and_survive_pickling(error, builtin) -> None:
    assert isinstance(error, builtin)
    assert isinstance(error, errors.CacheStoreError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error) == "m"
    assert again.__dict__ == error.__dict__
    assert getattr(again, "errno", None) == getattr(error, "errno", None)
