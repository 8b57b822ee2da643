"""What makes two stores interchangeable."""

import json
import shutil

import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.identity import (
    check_same_model,
    provenance,
    store_codec,
    store_identity,
)
from alpacache.errors import UsageError
from cache_store import CODECS, FormatError


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


def test_the_same_model_elsewhere_is_the_same_model(identity, tiny_checkpoint, tmp_path):
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "other-disk" / tiny_checkpoint.name)
    check_same_model(Checkpoint(str(moved)), identity, store="s")
    assert Checkpoint(str(moved)).vlm_fingerprint() == identity["model"]["vlm_weights_sha256"]


def test_a_revision_counts_only_where_both_know_it(identity, tiny_checkpoint, tmp_path):
    known = {**identity, "model": {**identity["model"], "revision": "abc"}}
    check_same_model(Checkpoint(str(tiny_checkpoint)), known, store="s")
    copy = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    note = copy / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("def\n")
    with pytest.raises(UsageError, match='revision: expected "def", found "abc"'):
        check_same_model(Checkpoint(str(copy)), known, store="s")


def test_a_changed_config_is_named_and_weights_are_not_compared(identity, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"new_key": 1}))
    with pytest.raises(UsageError, match="config_sha256"):
        check_same_model(Checkpoint(str(copy)), identity, store="s")
    other = {**identity, "model": {**identity["model"], "vlm_weights_sha256": "0"}}
    check_same_model(Checkpoint(str(tiny_checkpoint)), other, store="s")


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
