"""`s3://BUCKET/PREFIX`: where in object storage a store lies. Nothing else may stand in it, least of all a secret."""

import re
from dataclasses import dataclass

from cache_store.errors import StoreAddressError

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_PART = re.compile(r"[A-Za-z0-9._=+-]+")
_MAX_PREFIX = 600
"""Characters; a key has at most 1024, of which a store's own names take less than 400."""


@dataclass(frozen=True, slots=True)
class S3Address:
    """A bucket, and the prefix of all keys of one store in it (without slashes at its ends; may be empty)."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> "S3Address":
        """Raises `StoreAddressError` for anything but a bucket and a plain path."""
        rest = uri.partition("://")[2]
        if "@" in rest:  # the message must not repeat what may be a secret
            raise StoreAddressError(
                "an s3:// URI with '@' in it is refused: credentials in a URI end up in logs and configs. Set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, instead."
            )
        bucket, _, path = rest.partition("/")
        prefix = path.removesuffix("/")
        if not _BUCKET.fullmatch(bucket):
            raise StoreAddressError(f"{uri!r}: {bucket!r} is not the name of a bucket; expected s3://BUCKET/PREFIX.")
        parts = prefix.split("/") if prefix else []
        for part in parts:
            if not _PART.fullmatch(part) or set(part) == {"."} or len(prefix) > _MAX_PREFIX:
                raise StoreAddressError(
                    f"{uri[:200]!r}: {part[:80]!r} cannot be part of a store's prefix, which has letters, digits and "
                    f"._=+- between single slashes, {_MAX_PREFIX} characters at most."
                )
        return cls(bucket, prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def key(self, relative: str) -> str:
        """The key of an object of the store; of the empty name that of the store itself."""
        return "/".join(part for part in (self.prefix, relative) if part)
