"""What makes two stores interchangeable."""

import json
import re
import shutil

import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.cached_samples.identity import (
    as_stored,
    check_base,
    check_same_model,
    model_differences,
    model_identity,
    prompt_doubt,
    provenance,
    store_codec,
    store_identity,
    vlm_identity,
)
from alpacache.errors import UsageError
from cache_store import CODECS, FormatError, differences


@pytest.fixture(scope="module")
def identity(tiny_checkpoint):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    settings = {"cameras": ["camera_front_wide_120fov"], "frames": 4, "codec": "bf16", "dtype": "bfloat16"}
    return store_identity(checkpoint, InputBuilder(checkpoint), **settings)


def test_identity_is_plain_json_without_paths(identity, tiny_checkpoint):
    text = json.dumps(identity)
    assert json.loads(text) == identity
    assert str(tiny_checkpoint.parent) not in text
    assert identity["model"]["id"] == tiny_checkpoint.name


def test_the_codec_is_there_by_name_and_definition(tiny_checkpoint, identity):
    assert identity["codec"] == "bf16"
    assert "codec_definition" not in identity
    assert store_codec(identity, store="s") is None
    checkpoint = Checkpoint(str(tiny_checkpoint))
    settings = {"cameras": ["camera_front_wide_120fov"], "frames": 4, "dtype": "bfloat16"}
    for name, codec in CODECS.items():
        found = store_identity(checkpoint, InputBuilder(checkpoint), codec=name, **settings)
        assert found == identity | {"codec": name, "codec_definition": codec.to_json()}
        assert store_codec(json.loads(json.dumps(found)), store="s") == codec
    with pytest.raises(FormatError, match="codec_definition in the identity of s: a codec is an object with a kind"):
        store_codec({**identity, "codec": "int8"}, store="s")


def edited(directory, file, change):
    document = json.loads((directory / file).read_text())
    change(document)
    (directory / file).write_text(json.dumps(document))


def same(directory, identity):
    """Both stages' check: whether `directory` is the model of a store of this identity, and what `extract` compares."""
    checkpoint = Checkpoint(str(directory))
    check_same_model(checkpoint, identity, store="s")
    settings = {key: identity[key] for key in ("cameras", "frames", "codec", "dtype")}
    mine = as_stored(store_identity(checkpoint, InputBuilder(checkpoint), **settings), identity)
    return differences(mine, identity) == []


def of_an_earlier_version(identity):
    """As stores before 0.2 have it."""
    kept = ("id", "revision", "config_sha256", "vlm_weights_sha256")
    return identity | {"model": {key: identity["model"][key] for key in kept}}


@pytest.mark.parametrize("stored", [dict, of_an_earlier_version])
def test_a_model_moved_renamed_or_linked_is_the_same_model(stored, identity, tiny_checkpoint, tmp_path):
    identity = stored(identity)
    assert same(shutil.copytree(tiny_checkpoint, tmp_path / "other-disk" / tiny_checkpoint.name), identity)
    renamed = shutil.copytree(tiny_checkpoint, tmp_path / "snapshots/2026-11-01/weights")
    assert Checkpoint(str(renamed)).revision is None
    assert same(renamed, identity)
    (tmp_path / "link").symlink_to(renamed)
    assert same(tmp_path / "link", identity)


def test_a_model_saved_again_by_transformers_is_the_same_model(identity, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "saved again")

    def save_again(config):
        items = sorted({**config, "torch_dtype": config.pop("dtype"), "transformers_version": "5.99.0"}.items())
        config.clear()
        config.update(items[::-1], new_key=1)

    edited(copy, "config.json", save_again)
    edited(copy, "vlm/config.json", lambda config: config.update(transformers_version="5.99.0", use_cache=False))
    assert Checkpoint(str(copy)).config.sha256 != identity["model"]["config_sha256"]
    assert same(copy, identity)
    with pytest.raises(UsageError, match="config_sha256: expected"):
        same(copy, of_an_earlier_version(identity))


def test_another_model_is_told_in_one_line_with_both_names(tiny_checkpoint, tiny_checkpoint_2):
    given, other = Checkpoint(str(tiny_checkpoint)), Checkpoint(str(tiny_checkpoint_2))
    names = f"it is of {other.model_id}, not of {given.model_id}"
    with pytest.raises(UsageError, match=rf"^run was trained on .*: {names}; expert_sha256, .* differ\. Pass .*$"):
        check_base(given, model_identity(other), run="run")
    with pytest.raises(UsageError, match=rf"^store s was extracted .*: {names}; settings\.\w+, .* differ\. Pass .*$"):
        check_same_model(given, {"model": vlm_identity(other)}, store="s")


def test_of_models_of_one_name_that_differ_in_much_the_first_are_named(tiny_checkpoint):
    given = Checkpoint(str(tiny_checkpoint))
    stored = vlm_identity(given)
    settings = stored["settings"] | {"vocab_size": 1, "min_pixels": 1, "max_pixels": 1, "traj_token_start": 1}
    with pytest.raises(UsageError, match=r"Tiny-R1: (settings\.\w+, ){2}settings\.\w+ and 1 more differ\. Pass .*$"):
        check_same_model(given, {"model": stored | {"settings": settings}}, store="s")


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("vlm/config.json", lambda j: j["text_config"].update(rms_norm_eps=1e-5), "vlm.text_config.rms_norm_eps"),
        (
            "vlm/config.json",
            lambda j: j["text_config"].update(rope_theta=5e6),
            "text_config.rope_parameters.rope_theta",
        ),
        ("config.json", lambda j: j["hist_traj_tokenizer_cfg"].update(num_bins=63), "history.bins"),
        ("config.json", lambda j: j.update(max_pixels=2**17), "max_pixels: expected 131072, found 32768"),
    ],
)
def test_the_value_that_makes_it_another_model_is_named(file, change, named, identity, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    edited(copy, file, change)
    with pytest.raises(UsageError, match=rf"another model than .*:\n  settings\.\S*{re.escape(named)}\S* ?.*\nPass"):
        same(copy, identity)


def test_other_weights_under_the_same_name_are_another_model(identity, tiny_checkpoint, tmp_path):
    other = make_tiny_checkpoint(tmp_path / tiny_checkpoint.name, seed=1)
    for stored in (identity, of_an_earlier_version(identity)):
        with pytest.raises(UsageError, match=r"another model than .*:\n  vlm_weights_sha256: expected .*\nPass"):
            same(other, stored)


def test_names_decide_where_the_weights_of_the_vlm_are_elsewhere(identity, tiny_checkpoint, tmp_path):
    def without_vlm(name):
        """What stage two fetches of a hub's checkpoint."""
        copy = shutil.copytree(tiny_checkpoint, tmp_path / name)
        index = json.loads((copy / INDEX).read_text())["weight_map"]
        only = {index[name] for name in index if name.startswith("vlm.")} - {index["expert.norm.weight"]}
        for shard in only:
            (copy / shard).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        assert only
        return copy

    check_same_model(Checkpoint(str(without_vlm(tiny_checkpoint.name))), identity, store="s")
    with pytest.raises(UsageError, match=f'id: expected "other", found "{tiny_checkpoint.name}"'):
        check_same_model(Checkpoint(str(without_vlm("other"))), identity, store="s")


def test_a_revision_counts_where_both_know_it_and_nothing_else_tells(identity, tiny_checkpoint):
    one, other = ({"id": "M", "revision": hex, "config_sha256": "0"} for hex in ("a" * 40, "b" * 40))
    assert model_differences(one, other) == [f'revision: expected "{"a" * 40}", found "{"b" * 40}"']
    assert model_differences(one, other | {"revision": None}) == []


def test_another_tokenizer_is_another_model(identity):
    found = as_stored(identity, {**identity, "model": {**identity["model"], "id": "X", "tokens_sha256": "0"}})
    assert found["model"]["id"] == "X"
    assert found["model"]["tokens_sha256"] == identity["model"]["tokens_sha256"]


def by_name(identity, model):
    """As earlier versions extracted with R1's names: R1's prompt and family, whatever the checkpoint holds."""
    builder = InputBuilder(model, camera_names=False, frame_numbers=False)
    settings = {key: identity[key] for key in ("cameras", "frames", "codec", "dtype")}
    old = store_identity(model, builder, **settings)
    del old["model"]["family_by"]
    old["model"]["settings"] |= {"family": "r1"}
    return old


def test_a_store_of_an_earlier_version_of_a_renamed_checkpoint_stays_usable_and_is_doubted(identity, renamed_15):
    checkpoint = Checkpoint(str(renamed_15))
    old = by_name(identity, checkpoint)
    check_same_model(checkpoint, old, store="s")
    builder = InputBuilder(checkpoint, camera_names=False, frame_numbers=False)
    settings = {key: old[key] for key in ("cameras", "frames", "codec", "dtype")}
    assert differences(as_stored(store_identity(checkpoint, builder, **settings), old), old) == []
    doubt = prompt_doubt(checkpoint, old, store="s")
    assert doubt.startswith("store s was extracted by an earlier version with another prompt than ")
    assert "was trained with: cameras named, frames numbered (the weights hold no freqs" in doubt
    assert prompt_doubt(checkpoint, store_identity(checkpoint, builder, **settings), store="s") is None  # asked for


def test_no_doubt_where_the_prompt_fits(identity, tiny_checkpoint):
    for stored in (identity, of_an_earlier_version(identity)):
        assert prompt_doubt(Checkpoint(str(tiny_checkpoint)), stored, store="s") is None


def test_a_store_of_something_else_is_refused(tiny_checkpoint):
    with pytest.raises(UsageError, match="store s does not say which model its features are of"):
        check_same_model(Checkpoint(str(tiny_checkpoint)), {"model": "my-encoder@1.2"}, store="s")


def test_provenance_tells_versions_and_nothing_private():
    import getpass
    import socket

    text = json.dumps(provenance(source="folder:drives", device="cpu"))
    assert "transformers" in text
    assert socket.gethostname() not in text
    assert f"/home/{getpass.getuser()}" not in text


def test_rollouts_are_part_of_it_where_there_are_any(tiny_checkpoint, identity):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    settings = {"cameras": ["camera_front_wide_120fov"], "frames": 4, "codec": "bf16", "dtype": "bfloat16"}
    found = store_identity(checkpoint, InputBuilder(checkpoint), **settings, rollouts=6)
    question = (
        "output the chain-of-thought reasoning of the driving process, then output the future trajectory.<|im_end|>\n"
        "<|im_start|>assistant\n<|cot_start|>"
    )
    reasoning = {"rollouts": 6, "question": question, "top_p": 0.98, "temperature": 0.6, "max_tokens": 256}
    assert found == identity | {"reasoning": reasoning}
    assert "reasoning" not in identity
