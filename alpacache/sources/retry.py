"""Requests to a hub that may be slow, failing or offline: tried again a little later, but not for ever."""

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from alpacache.errors import DataError

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Waits double from the first to the longest. Each is cut by up to half at random, so that workers do not retry in
step."""
_sleep = time.sleep
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def connection_errors() -> tuple[type[Exception], ...]:
    """Types of what a hub that is offline, gated or failing raises.

    The hub's own errors derive from those of its HTTP client, which differs between its releases.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, without the query of an address: a signed one lets anyone in."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: " + re.sub(r"[?]\S+", "?...", line)


def with_retry(call: Callable[[], Result], *, what: str) -> Result:
    """Return what `call` returns, calling it up to `ATTEMPTS` times while its errors may pass (`may_pass`).

    Raises `DataError`, naming `what` and caused by the last error, when they do not pass; any other error at once.
    """
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except connection_errors() as error:
            if not may_pass(error):
                raise
            told = first_line(error).rstrip(". ")
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
    """Tell whether an error is worth another try: a time-out, a broken connection, a server that is busy or failing."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled | DataError):
        return False
    if isinstance(error, LocalEntryNotFoundError):  # raised by a download that could not ask the hub
        return error.__cause__ is None or may_pass(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HfHubHTTPError) or status is not None:
        return status is None or status >= 500 or status in (408, 425, 429)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):  # the disk sets errno; a download that ended early does not
        return type(error) is OSError and error.errno is None
    return isinstance(error, connection_errors())
