from cache_store import CacheReader, info


def test_sizes_by_field_add_up(store, kit) -> None:
    with kit.writer(store) as writer:
        writer.quarantine("bad", "short_clip", "3 s", "")
    found = info(store)
    reader = CacheReader(store)
    assert (found.samples, found.format_version) == (2, 1)
    assert found.size_bytes == sum(reader.size_bytes(item) for item in reader.sample_ids)
    assert sum(found.size_by_field.values()) == found.size_bytes
    assert (found.size_by_field["length"], found.size_by_field["mask"], found.size_by_field["path"]) == (16, 18, 192)
    assert found.size_by_field["kv"] > 5 * 2 * 2 * (7 + 11) * 4 * 2
    assert (found.samples_by_field["kv"], found.samples_by_field["note"]) == (2, 1)
    assert (found.quarantined, found.quarantined_by_kind) == (1, {"short_clip": 1})
    assert (found.identity, found.provenance) == (kit.identity, kit.provenance)
