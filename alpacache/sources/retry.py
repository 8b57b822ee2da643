"""Requests to a hub that fails now and then: once more, a little later, and not for ever."""

import logging
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from alpacache.errors import DataError
from alpacache.sources.pai_cache import connection_errors, said

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Waits double from the first to the longest; each is cut by up to half at random, so that workers come apart."""
_BUSY = (408, 425, 429)

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def with_retry(call: Callable[[], Result], *, what: str) -> Result:
    """What `call` returns. Errors that may pass (`may_pass`) are met by up to `ATTEMPTS` calls in all.

    Raises `DataError` naming `what` and the last error, its cause, when they do not; any other error at once.
    """
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except connection_errors() as error:
            if not may_pass(error):
                raise
            told = said(error).rstrip(". ")
            if attempt == ATTEMPTS:
                raise DataError(
                    f"{what}: failed {ATTEMPTS} times within {time.monotonic() - started:.0f} s, at last with {told}. "
                    "What was done so far is kept; see that the hub can be reached and run the same command again."
                ) from error
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
        logger.warning("%s: %s; attempt %d of %d follows.", what, told, attempt + 1, ATTEMPTS)
        _sleep(wait_s * (1 - secrets.randbelow(1000) / 2000))
    raise AssertionError("unreachable")


def may_pass(error: BaseException) -> bool:
    """Whether it is worth another try: time-outs, broken connections, a server that is busy or failing."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled | DataError):
        return False
    if isinstance(error, LocalEntryNotFoundError):  # how a download says that it could not ask the hub
        return error.__cause__ is None or may_pass(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HfHubHTTPError) or status is not None:
        return status is None or status >= 500 or status in _BUSY
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):  # those of the disk have a number; a download that came short has none
        return type(error) is OSError and error.errno is None
    return isinstance(error, connection_errors())


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
