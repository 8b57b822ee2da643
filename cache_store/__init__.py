"""Storage of ragged per-sample arrays: transactional, checksummed, readable by any Zarr v3 reader. Knows no model.

- Written and committed: `writer` has `format.sample_group` turn the arrays of a sample into objects, writes them
  through `storage`, and publishes the `format.commit_record` that makes the sample visible last.
- Read: `reader` takes the sample ids from the commit records (or from `format.index`), `sample_read` brings the fields
  of one sample into arrays, and `format.stored_sample` checks every byte on the way. `prefetcher` reads ahead.
- Verified, repaired, copied, summarised, cleaned: whole stores, in `upkeep`.

`format` is docs/reference/cache-format.md as code, `storage` a file system or a bucket, `kv` the codecs for keys and
values. Everything builds on `errors`, `document`, `checksum`, `concurrency` and `rereading`.
"""

from cache_store.document import differences as differences
from cache_store.errors import CacheStoreError as CacheStoreError
from cache_store.errors import CorruptSampleError as CorruptSampleError
from cache_store.errors import FieldNotFoundError as FieldNotFoundError
from cache_store.errors import FormatError as FormatError
from cache_store.errors import IdentityMismatchError as IdentityMismatchError
from cache_store.errors import ObjectStorageError as ObjectStorageError
from cache_store.errors import SampleNotFoundError as SampleNotFoundError
from cache_store.errors import SampleReadError as SampleReadError
from cache_store.errors import StoreAddressError as StoreAddressError
from cache_store.errors import StoreFullError as StoreFullError
from cache_store.errors import StoreNotFoundError as StoreNotFoundError
from cache_store.errors import UnreachableStoreError as UnreachableStoreError
from cache_store.errors import UnreadableSampleError as UnreadableSampleError
from cache_store.errors import UnsupportedFileSystemError as UnsupportedFileSystemError
from cache_store.format.field import Field as Field
from cache_store.format.index import build_index as build_index
from cache_store.format.quarantine_record import QuarantineRecord as QuarantineRecord
from cache_store.kv.codec import KVCodec as KVCodec
from cache_store.kv.learnt import LearntCodec as LearntCodec
from cache_store.kv.registry import CODECS as CODECS
from cache_store.kv.registry import codec_from_json as codec_from_json
from cache_store.kv.registry import codec_named as codec_named
from cache_store.kv.transform import TransformCodec as TransformCodec
from cache_store.prefetcher import PrefetchedSample as PrefetchedSample
from cache_store.prefetcher import Prefetcher as Prefetcher
from cache_store.reader import CacheReader as CacheReader
from cache_store.upkeep.copying import CopyReport as CopyReport
from cache_store.upkeep.copying import copy as copy
from cache_store.upkeep.garbage import GarbageReport as GarbageReport
from cache_store.upkeep.garbage import collect_garbage as collect_garbage
from cache_store.upkeep.inspection import Damage as Damage
from cache_store.upkeep.store_info import StoreInfo as StoreInfo
from cache_store.upkeep.store_info import info as info
from cache_store.upkeep.verification import VerifyReport as VerifyReport
from cache_store.upkeep.verification import verify as verify
from cache_store.writer import CacheWriter as CacheWriter
