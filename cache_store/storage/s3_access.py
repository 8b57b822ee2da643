"""Access to a bucket: endpoint, region and credentials from where every S3 client looks for them, and nowhere else.

The environment comes first, then the shared credentials file (which obstore does not read), then the machine's roles.
Nothing is kept in an attribute that is printed, pickled or written: a pickled store names its URI and looks again.
"""

import configparser
import os
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cache_store.errors import StoreAddressError

if TYPE_CHECKING:
    from obstore.store import S3Store

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_PART = re.compile(r"[A-Za-z0-9._=+-]+")
_MAX_PREFIX = 600
"""Characters; a key has at most 1024, and a store's own names take less than 400 of them."""


@dataclass(frozen=True, slots=True)
class S3Address:
    """A bucket, and the prefix of all keys of one store in it (no slash at either end; may be empty)."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> "S3Address":
        """Parse `s3://BUCKET/PREFIX`. Raises `StoreAddressError` for anything but a bucket and a plain path."""
        rest = uri.partition("://")[2]
        if mark := next((mark for mark in "@?" if mark in rest), None):  # not repeated: it may be a secret
            raise StoreAddressError(
                f"an s3:// URI with '{mark}' in it is refused: credentials in a URI end up in logs and configs. Give "
                "s3://BUCKET/PREFIX, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, instead."
            )
        bucket, _, path = rest.partition("/")
        prefix = path.removesuffix("/")
        if not _BUCKET.fullmatch(bucket):
            raise StoreAddressError(f"{uri!r}: {bucket!r} is not the name of a bucket; expected s3://BUCKET/PREFIX.")
        for part in prefix.split("/") if prefix else ():
            if not _PART.fullmatch(part) or set(part) == {"."} or len(prefix) > _MAX_PREFIX:
                raise StoreAddressError(
                    f"{uri[:200]!r}: {part[:80]!r} cannot be part of a store's prefix, which has letters, digits and "
                    f"._=+- between single slashes, {_MAX_PREFIX} characters at most."
                )
        return cls(bucket, prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def key(self, relative: str) -> str:
        """Key of an object of the store; the store's own for an empty name."""
        return "/".join(part for part in (self.prefix, relative) if part)


REQUEST_TIMEOUT = timedelta(seconds=120)
"""Limit of one request with its body: a part of 16 MiB over a line of 2 Mbit/s."""
CONNECT_TIMEOUT = timedelta(seconds=10)
MAX_RETRIES = 8
"""Retries of a request after a 5xx, a 429 or a lost connection, and of a read after a time-out."""
FIRST_WAIT, LONGEST_WAIT, RETRIES_END = timedelta(seconds=0.1), timedelta(seconds=10), timedelta(seconds=150)
_FILE_GOOD_FOR = timedelta(minutes=10)
"""Time until the credentials file is read again: somebody may be renewing it."""
_METADATA_ADDRESS = ("169.254.169.254", 80)


def connect(address: S3Address) -> "S3Store":
    """Make a client of the bucket, without a request.

    Raises `StoreAddressError` without obstore, without credentials, or with an endpoint that is not encrypted.
    """
    try:
        from obstore.store import S3Store
    except ImportError:
        missing = 'obstore is not installed; pip install "alpacache[s3]"'
        raise StoreAddressError(f"{address} is object storage, for which {missing}.") from None
    profile = _set("AWS_PROFILE") or _set("AWS_DEFAULT_PROFILE") or "default"
    config: dict[str, Any] = {"conditional_put": "etag"}
    if endpoint := _endpoint(address):
        config["endpoint"] = endpoint
    if not (_set("AWS_REGION") or _set("AWS_DEFAULT_REGION")) and (region := _in_config(profile).get("region")):
        config["region"] = region
    allow_http = _true("AWS_ALLOW_HTTP")
    return S3Store(
        address.bucket,
        config=config,  # type: ignore[arg-type]  # keys of its TypedDict
        client_options={"timeout": REQUEST_TIMEOUT, "connect_timeout": CONNECT_TIMEOUT, "allow_http": allow_http},
        retry_config={
            "max_retries": MAX_RETRIES,
            "retry_timeout": RETRIES_END,
            "backoff": {"init_backoff": FIRST_WAIT, "max_backoff": LONGEST_WAIT, "base": 2},
        },
        credential_provider=_provider(address, profile),
    )


def _provider(address: S3Address, profile: str) -> Any:
    """Source of credentials for obstore; `None` where it finds them itself."""
    if _true("AWS_SKIP_SIGNATURE") or (_set("AWS_ACCESS_KEY_ID") and _set("AWS_SECRET_ACCESS_KEY")):
        return None
    if {"aws_access_key_id", "aws_secret_access_key"} <= _keys(profile).keys():
        return partial(_credentials, profile)
    if _set("AWS_PROFILE") or _set("AWS_DEFAULT_PROFILE"):
        raise StoreAddressError(
            f"{address}: the profile {profile!r} has no access key in {_credentials_file()} or {_config_file()}. "
            "If it is one of single sign-on or of a role, put its credentials into the environment: "
            f'eval "$(aws configure export-credentials --profile {profile} --format env)".'
        )
    if any(map(_set, ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"))):
        return None
    if _set("AWS_CONTAINER_CREDENTIALS_FULL_URI") or _has_machine_role():
        return None
    raise StoreAddressError(
        f"{address}: no credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the profile 'default' of "
        f"{_credentials_file()}, or from a role of this machine. Set the two variables or run `aws configure`; for a "
        "public bucket set AWS_SKIP_SIGNATURE=true."
    )


def _endpoint(address: S3Address) -> str | None:
    name = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") if _set(name)), None)
    if name is None:
        return None
    endpoint = os.environ[name]
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise StoreAddressError(f"{address}: {name} is not a plain http(s)://HOST[:PORT] address; correct it.")
    if parts.scheme == "http" and not _true("AWS_ALLOW_HTTP"):
        remedy = "Use https, or set AWS_ALLOW_HTTP=true for a server of your own."
        raise StoreAddressError(f"{address}: {name} is {endpoint}, which is not encrypted. {remedy}")
    return endpoint


def _has_machine_role() -> bool:
    """Tell whether a cloud machine's metadata service answers: asked first, as obstore would try for minutes."""
    if _true("AWS_EC2_METADATA_DISABLED"):
        return False
    if _set("AWS_METADATA_ENDPOINT"):
        return True
    try:
        socket.create_connection(_METADATA_ADDRESS, timeout=1.0).close()
    except OSError:
        return False
    return True


def _credentials(profile: str) -> dict[str, Any]:
    """A profile's credentials as obstore wants them, read anew whenever it asks and never kept."""
    keys = _keys(profile)
    return {
        "access_key_id": keys["aws_access_key_id"],
        "secret_access_key": keys["aws_secret_access_key"],
        "token": keys.get("aws_session_token"),
        "expires_at": datetime.now(UTC) + _FILE_GOOD_FOR,
    }


def _keys(profile: str) -> dict[str, str]:
    return _section(_credentials_file(), profile) or _in_config(profile)


def _in_config(profile: str) -> dict[str, str]:
    return _section(_config_file(), profile, f"profile {profile}")


def _credentials_file() -> Path:
    return Path(_set("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()


def _config_file() -> Path:
    return Path(_set("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()


def _section(path: Path, *names: str) -> dict[str, str]:
    """The first of these sections that a file has; empty without file or section."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError):
        raise StoreAddressError(f"{path} is not a valid file of AWS profiles; correct or remove it.") from None
    return next((dict(parser[name]) for name in names if parser.has_section(name)), {})


def _set(name: str) -> str:
    return os.environ.get(name, "").strip()


def _true(name: str) -> bool:
    return _set(name).lower() in ("1", "true", "yes", "on")
