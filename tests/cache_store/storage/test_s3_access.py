"""Where endpoint, region and credentials come from, and what is said when there are none."""

import sys
from pathlib import Path

import pytest

from cache_store import CacheReader, ObjectStorageError, StoreAddressError
from cache_store.storage import s3_access
from cache_store.storage.s3_access import S3Address, connect
from cache_store.storage.storage import is_uri, open_storage

WHERE = S3Address("some-bucket", "x")
KEYS = "aws_access_key_id = AKIAFILE\naws_secret_access_key = filesecret\n"


@pytest.fixture
def no_keys(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    return s3


def write(monkeypatch, tmp_path: Path, credentials: str, config: str = "") -> None:
    for name, text in (("AWS_SHARED_CREDENTIALS_FILE", credentials), ("AWS_CONFIG_FILE", config)):
        (tmp_path / name).write_text(text)
        monkeypatch.setenv(name, str(tmp_path / name))


def test_no_credentials(no_keys) -> None:
    with pytest.raises(StoreAddressError, match=r"no credentials in AWS_ACCESS_KEY_ID .* run `aws configure`"):
        connect(WHERE)


def test_a_machine_without_metadata_service_is_found_out_at_once(no_keys, monkeypatch) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setattr(s3_access, "_METADATA_ADDRESS", ("127.0.0.1", 9))
    with pytest.raises(StoreAddressError, match="no credentials"):
        connect(WHERE)
    monkeypatch.setattr(s3_access, "_METADATA_ADDRESS", ("127.0.0.1", no_keys.port))
    assert connect(WHERE).credential_provider is None


def test_a_public_bucket_needs_none(no_keys, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert connect(WHERE).credential_provider is None


def test_the_shared_file(no_keys, kit, monkeypatch, tmp_path) -> None:
    write(
        monkeypatch, tmp_path, f"[default]\n{KEYS}[other]\n{KEYS.replace('AKIAFILE', 'AKIAOTHER')}aws_session_token=t\n"
    )
    assert connect(WHERE).credential_provider()["access_key_id"] == "AKIAFILE"
    with kit.writer(no_keys.uri()) as writer:
        assert writer.write("a", kit.sample(1))
        assert "filesecret" not in repr(vars(writer._storage))
    kit.assert_equal(CacheReader(no_keys.uri()).read("a"), kit.sample(1))
    monkeypatch.setenv("AWS_PROFILE", "other")
    credentials = connect(WHERE).credential_provider()
    assert (credentials["access_key_id"], credentials["token"]) == ("AKIAOTHER", "t")


def test_a_profile_without_keys_is_named(no_keys, monkeypatch, tmp_path) -> None:
    write(monkeypatch, tmp_path, f"[default]\n{KEYS}", "[profile work]\nsso_session = x\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    with pytest.raises(StoreAddressError, match=r"profile 'work' has no access key.*export-credentials --profile work"):
        connect(WHERE)


def test_a_broken_file_is_named_and_not_quoted(no_keys, monkeypatch, tmp_path) -> None:
    write(monkeypatch, tmp_path, "filesecret")
    with pytest.raises(StoreAddressError, match="not a valid file of AWS profiles") as refused:
        connect(WHERE)
    assert "filesecret" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_the_region_of_a_profile(s3, monkeypatch, tmp_path) -> None:
    write(monkeypatch, tmp_path, "", "[profile work]\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert "region" not in connect(WHERE).config
    monkeypatch.delenv("AWS_REGION")
    assert connect(WHERE).config["region"] == "eu-central-1"


def test_an_endpoint_must_be_plain_and_encrypted_unless_allowed(s3, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreAddressError, match=r"AWS_ENDPOINT_URL is http://127.*not encrypted.*AWS_ALLOW_HTTP=true"):
        connect(WHERE)
    for endpoint in ("https://user:secret@host", "host:9000", "ftp://host"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(StoreAddressError, match="AWS_ENDPOINT_URL_S3 is not a plain") as refused:
            connect(WHERE)
        assert "secret" not in str(refused.value)


def test_without_obstore(s3, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreAddressError, match=r'obstore is not installed; pip install "alpacache\[s3\]"'):
        connect(WHERE)


def test_a_server_that_is_not_there(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ObjectStorageError, match=r"does not answer.*AWS_ENDPOINT_URL"):
        CacheReader(s3.uri())


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
