"""Storage of ragged per-sample arrays: transactional, checksummed, readable by any Zarr v3 reader. Knows no model.

- Written and committed: `writer` has `format.sample_group` turn the arrays of a sample into objects, writes them
  through `storage`, and publishes the `format.commit_record` that makes the sample visible last.
- Read: `reader` takes the sample ids from the commit records (or from `format.index`), `sample_read` brings the fields
  of one sample into arrays, and `format.stored_sample` checks every byte on the way. `prefetcher` reads ahead.
- Verified, repaired, copied, summarised, cleaned: whole stores, in `upkeep`.

`format` is docs/reference/cache-format.md as code, `storage` a file system or a bucket, `kv` the codecs for keys and
values. Everything builds on `errors`, `document`, `checksum`, `difference` and `concurrency`.
"""

from cache_store.difference import differences
from cache_store.errors import (
    CacheStoreError,
    CorruptSampleError,
    FieldNotFoundError,
    FormatError,
    IdentityMismatchError,
    ObjectStorageError,
    SampleNotFoundError,
    StoreAddressError,
    StoreFullError,
    StoreNotFoundError,
    UnsupportedFileSystemError,
)
from cache_store.format.field import Field
from cache_store.format.index import build_index
from cache_store.format.quarantine_record import QuarantineRecord
from cache_store.kv.codec import KVCodec
from cache_store.kv.registry import CODECS, codec_from_json
from cache_store.prefetcher import PrefetchedSample, Prefetcher
from cache_store.reader import CacheReader
from cache_store.upkeep.copying import CopyReport, copy
from cache_store.upkeep.garbage import GarbageReport, collect_garbage
from cache_store.upkeep.store_info import StoreInfo, info
from cache_store.upkeep.verification import Damage, VerifyReport, verify
from cache_store.writer import CacheWriter

__all__ = [
    "CODECS",
    "CacheReader",
    "CacheStoreError",
    "CacheWriter",
    "CopyReport",
    "CorruptSampleError",
    "Damage",
    "Field",
    "FieldNotFoundError",
    "FormatError",
    "GarbageReport",
    "IdentityMismatchError",
    "KVCodec",
    "ObjectStorageError",
    "PrefetchedSample",
    "Prefetcher",
    "QuarantineRecord",
    "SampleNotFoundError",
    "StoreAddressError",
    "StoreFullError",
    "StoreInfo",
    "StoreNotFoundError",
    "UnsupportedFileSystemError",
    "VerifyReport",
    "build_index",
    "codec_from_json",
    "collect_garbage",
    "copy",
    "differences",
    "info",
    "verify",
]
