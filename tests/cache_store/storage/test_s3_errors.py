"""Answers of a server as messages; none repeats what the server said at length."""

import pytest

from cache_store import FormatError, ObjectStorageError, StoreAddressError

exceptions = pytest.importorskip("obstore.exceptions", reason="object storage needs obstore (the extra s3)")

from cache_store.storage.s3_access import S3Address  # noqa: E402
from cache_store.storage.s3_errors import explain, explained  # noqa: E402

WHERE, URI = S3Address("some-bucket", "x"), "s3://some-bucket/x/zarr.json"


def answer(status: int, code: str = "") -> str:
    body = f"<Error><Code>{code}</Code><AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>" if code else ""
    return f"Error performing GET http://h/x in 1ms - Server returned non-2xx status code: {status} Some: {body}"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (FileNotFoundError(answer(404, "NoSuchKey")), FileNotFoundError, f"{URI} is not there"),
        (FileNotFoundError(answer(404, "NoSuchBucket")), StoreAddressError, "no bucket 'some-bucket'"),
        (exceptions.GenericError(answer(404, "NoSuchBucket")), StoreAddressError, "no bucket 'some-bucket'"),
        (
            exceptions.PermissionDeniedError(answer(403)),
            ObjectStorageError,
            r"denied \(HTTP 403\).*s3:GetObject",
        ),
        (exceptions.PermissionDeniedError(answer(403, "AccessDenied")), ObjectStorageError, "access denied"),
        (exceptions.PermissionDeniedError(answer(403, "InvalidAccessKeyId")), ObjectStorageError, "Renew them"),
        (exceptions.PermissionDeniedError(answer(403, "SignatureDoesNotMatch")), ObjectStorageError, "not valid"),
        (exceptions.UnauthenticatedError(answer(401)), ObjectStorageError, "Renew them"),
        (exceptions.GenericError(answer(400, "ExpiredToken")), ObjectStorageError, "not any more"),
        (exceptions.GenericError(answer(301, "PermanentRedirect")), ObjectStorageError, "Set AWS_REGION"),
        (exceptions.GenericError("Received redirect without LOCATION"), ObjectStorageError, "Set AWS_REGION"),
        (exceptions.GenericError(answer(501, "NotImplemented")), ObjectStorageError, "If-None-Match"),
        (
            exceptions.GenericError(answer(503, "SlowDown")),
            ObjectStorageError,
            r"answers HTTP 503 SlowDown.*run",
        ),
        (exceptions.GenericError("error sending request"), ObjectStorageError, "does not answer"),
        (exceptions.InvalidPathError("a//b"), FormatError, "key is no path"),
    ],
)
def test_each_answer_has_its_next_step(error, kind, said) -> None:
    with pytest.raises(kind, match=said) as raised, explained(WHERE, "read", URI):
        raise error
    assert "AKIASECRET" not in str(raised.value)
    assert raised.value.__suppress_context__
    assert URI in str(raised.value)


def test_how_often_it_was_tried() -> None:
    text = "Error performing PUT http://h in 5s, after 3 retries, max_retries: 3 - status code: 500 Internal"
    assert "answers HTTP 500 after 4 tries" in str(explain(exceptions.GenericError(text), WHERE, "write", URI))


def test_errors_of_our_own_pass() -> None:
    with pytest.raises(FormatError, match=r"^as it was$"), explained(WHERE, "read", URI):
        raise FormatError("as it was")
