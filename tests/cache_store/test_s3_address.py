import pytest

from cache_store import StoreAddressError
from cache_store.s3_address import S3Address
from cache_store.storage import is_uri, open_storage


def test_bucket_and_prefix() -> None:
    for uri in ("s3://my-bucket/a/b=1", "s3://my-bucket/a/b=1/"):
        address = S3Address.parse(uri)
        assert (address.bucket, address.prefix, str(address)) == ("my-bucket", "a/b=1", "s3://my-bucket/a/b=1")
        assert address.key("commits/x.json") == "a/b=1/commits/x.json"
    whole = S3Address.parse("s3://my-bucket")
    assert (str(whole), whole.key("zarr.json"), whole.key("")) == ("s3://my-bucket", "zarr.json", "")


@pytest.mark.parametrize("rest", ["", "/x", "b", "my bucket/x", "b?/x", "bucket//x", "bucket/../x", "bucket/x/./y"])
@pytest.mark.parametrize("tail", ["", "?versionId=1", "#x", "/%2e%2e", "/" + "x" * 700])
def test_anything_else_is_refused(rest, tail) -> None:
    with pytest.raises(StoreAddressError, match=r"BUCKET/PREFIX|cannot be part of a store's prefix"):
        S3Address.parse(f"s3://{rest}{tail}")


@pytest.mark.parametrize("uri", ["s3://KEY:hunter2@bucket/x", "s3://bucket/KEY:hunter2@host"])
def test_secrets_are_refused_and_not_repeated(uri) -> None:
    with pytest.raises(StoreAddressError, match="credentials in a URI end up in logs") as refused:
        S3Address.parse(uri)
    assert "hunter2" not in str(refused.value)


def test_which_names_are_uris(tmp_path) -> None:
    assert [is_uri(name) for name in ("s3://b/x", "S3x/y", "/a/b", "a:b", tmp_path, "s3:/x")] == [True] + 5 * [False]
    for name in ("gs://bucket/x", "file:///x", "https://host/x"):
        with pytest.raises(StoreAddressError, match=r"scheme .*; give a folder or s3://BUCKET/PREFIX"):
            open_storage(name)
