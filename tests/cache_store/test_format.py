"""A second reader, written from docs/reference/cache-format.md alone: the page must be enough to read a store."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cache_store import CacheReader


def unseal(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    at = data.index(b'"document_crc32c":"') + 19
    assert int(data[at : at + 8], 16) == google_crc32c.value(data[:at] + b"00000000" + data[at + 8 :])
    return json.loads(data)


def read_store(store: Path) -> dict[str, dict[str, Any]]:
    root = unseal(store / "zarr.json")["attributes"]["cache_store"]
    assert root["format_version"] == 1
    settings = json.dumps({key: root[key] for key in ("fields", "identity")}, sort_keys=True, separators=(",", ":"))
    assert root["fingerprint"] == hashlib.sha256(settings.encode()).hexdigest()
    samples = {}
    for path in (store / "commits").glob("*.json"):
        record = unseal(path)
        sample_id = record["sample_id"]
        readable = re.sub("[^A-Za-z0-9_-]", "_", sample_id[:32])
        assert path.stem == f"{readable}-{hashlib.sha256(sample_id.encode()).hexdigest()[:32]}"
        assert record["fingerprint"] == root["fingerprint"]
        samples[sample_id] = read_sample(store / "samples" / f"{path.stem}.{record['attempt']}", record, root["fields"])
    return samples


def read_sample(group: Path, record: dict[str, Any], fields: list[dict[str, Any]]) -> dict[str, Any]:
    objects = {item["path"]: (group / item["path"]).read_bytes() for item in record["objects"]}
    for item in record["objects"]:
        data = objects[item["path"]]
        assert len(data) == item["size"]
        covered = data if item["path"].endswith("zarr.json") else data[:-4]
        assert f"{google_crc32c.value(covered):08x}" == item["crc32c"]
        assert covered is data or int.from_bytes(data[-4:], "little") == int(item["crc32c"], 16)

    def array(name: str) -> Any:
        metadata = json.loads(objects[f"{name}/zarr.json"])
        shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        count = -(-shape[0] // chunk[0]) if np.prod(shape) else 0
        keys = [".".join(["c", str(i)] + ["0"] * (len(shape) - 1)) for i in range(count)]
        data = b"".join(objects[f"{name}/{key}"][:-4] for key in keys)
        values = np.frombuffer(data, np.dtype(metadata["data_type"]).newbyteorder("<"))
        return values[: int(np.prod(shape))].reshape(shape)

    attributes = json.loads(objects["zarr.json"])["attributes"]
    small = array("small").tobytes()
    result = dict(attributes["text"])
    for entry in attributes["small"]:
        count = int(np.prod(entry["shape"]))
        result[entry["name"]] = np.frombuffer(small, entry["dtype"], count, entry["offset"]).reshape(entry["shape"])
    present = {item["name"] for item in record["fields"]}
    result.update(
        {item["name"]: array(item["name"]) for item in fields if item["layout"] == "array" and item["name"] in present}
    )
    assert set(result) == present
    return result


def test_the_format_page_is_enough_to_read_a_store(store, kit) -> None:
    samples = read_store(store)
    assert tuple(sorted(samples)) == CacheReader(store).sample_ids
    for sample_id, values in samples.items():
        kit.assert_equal(CacheReader(store).read(sample_id), values)
    kit.assert_equal({k: np.array(v) for k, v in samples["clip/1@5#0"].items()}, kit.sample(1))


def test_the_key_example_of_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "cache-format.md"
    assert "`clip-7_5100000_0-" + hashlib.sha256(b"clip-7@5100000#0").hexdigest()[:32] in page.read_text()
