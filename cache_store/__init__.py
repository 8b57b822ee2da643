"""Storage of ragged per-sample arrays: transactional, checksummed, readable by any Zarr v3 reader. Knows no model."""

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
from cache_store.kv.registry import CODECS, CodecName, codec_from_json
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
    "CodecName",
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
