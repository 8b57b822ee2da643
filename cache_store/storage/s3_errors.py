"""Answers of object storage, as errors that name the place, the reason and the next step.

obstore's own messages quote the server's whole answer, which may repeat an access key's id or a signed text. Only the
answer's code, its HTTP status and our own words are passed on, and no error is chained to obstore's.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError

from cache_store.errors import CacheStoreError, FormatError, ObjectStorageError, StoreAddressError
from cache_store.storage.s3_access import S3Address

_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_STATUS = re.compile(r"(?:status code: |error response: |status: )(\d{3})")
_TRIES = re.compile(r"after (\d+) retries")
_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


@contextmanager
def explained(address: S3Address, action: str, uri: str) -> Iterator[None]:
    """Turn obstore's errors into `FileNotFoundError` (no such object), `StoreAddressError` or `ObjectStorageError`."""
    try:
        yield
    except CacheStoreError:
        raise
    except (BaseError, FileNotFoundError, PermissionError) as error:
        raise explain(error, address, action, uri) from None


def explain(error: Exception, address: S3Address, action: str, uri: str) -> Exception:
    """Error to raise in place of obstore's, which came of this action (`read`, `write`, ...) on this URI."""
    text = str(error)
    code = match[1] if (match := _CODE.search(text)) else ""
    status = status_of(error)
    reason = " ".join(filter(None, (f"HTTP {status}" if status else "", code))) or type(error).__name__
    failed = f"cannot {action} {uri}"
    if code == "NoSuchBucket":
        remedy = "Create it, or correct the URI, AWS_ENDPOINT_URL or the account."
        return StoreAddressError(f"{failed}: there is no bucket {address.bucket!r} there. {remedy}")
    if isinstance(error, InvalidPathError):
        return FormatError(f"{failed}: below it lies an object whose key is no path; remove it.")
    if code in _KEYS or isinstance(error, UnauthenticatedError):
        invalid = f"the credentials are not valid, or not any more ({reason})"
        return ObjectStorageError(f"{failed}: {invalid}. Renew them and run the same command again.")
    if code in _REGION or status == "301" or "Received redirect" in text:
        where = f"the bucket {address.bucket!r} lies in another region"
        return ObjectStorageError(f"{failed}: {where}. Set AWS_REGION to its region.")
    if status == "403" or isinstance(error, PermissionDeniedError | PermissionError):
        needed = "s3:ListBucket and s3:GetObject to read, s3:PutObject and s3:DeleteObject besides to write"
        return ObjectStorageError(f"{failed}: access denied ({reason}). The credentials need {needed}.")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{uri} is not there.")
    if status == "501" or code == "NotImplemented":
        remedy = "Take a server that has conditional puts (If-None-Match) and multi-part uploads."
        return ObjectStorageError(f"{failed}: the server does not know this request ({reason}). {remedy}")
    tries = f" after {int(match[1]) + 1} tries" if (match := _TRIES.search(text)) else ""
    detail = f"the server answers {reason}" if status else "the server does not answer, or not to the end"
    remedy = "see to the network, AWS_ENDPOINT_URL and the server, and run the same command again"
    return ObjectStorageError(f"{failed}: {detail}{tries}. All committed samples are intact; {remedy}.")


def status_of(error: Exception) -> str:
    """HTTP status of the answer that obstore gave up on; empty if there was none."""
    return match[1] if (match := _STATUS.search(str(error))) else ""
