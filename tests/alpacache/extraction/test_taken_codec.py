"""The codec of another store, by what that store says of itself: nothing is extracted."""

import numpy as np
import pytest

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.identity import CHOICE, model_identity
from alpacache.config import Config
from alpacache.errors import UsageError
from alpacache.extraction import codec_choice
from alpacache.extraction.codec_choice import known_codec, longer_than_learnt
from alpacache.extraction.config import CodecsConfig, ExtractConfig
from alpacache.planning.config import PlanConfig
from cache_store import CODECS, CacheWriter, Field, TransformCodec

ASKED = "auto:0.5%"
REQUIRED = {
    ExtractConfig: {"source": "s", "model": "m", "store": "s"},
    PlanConfig: {"samples": 1},
    CodecsConfig: {"input": "s", "model": "m"},
}


@pytest.fixture
def begin(tiny_checkpoint, tmp_path):
    """A store whose codec `int8` was chosen by this model's expert, but for what is changed."""
    checkpoint = Checkpoint(str(tiny_checkpoint))

    def begin(name, *, vlm=None, **evidence):
        known = {"expert_sha256": model_identity(checkpoint)["expert_sha256"], "asked": ASKED} | evidence
        vlm, definition = vlm or checkpoint.vlm_fingerprint(), CODECS["int8"].to_json()
        CacheWriter(
            tmp_path / name,
            fields=[Field(name="kv", dtype="uint8", axes=("byte",), layout="array")],
            identity={"model": {"vlm_weights_sha256": vlm}, "codec": "int8", "codec_definition": definition},
            provenance={CHOICE: {key: value for key, value in known.items() if value is not None}},
        )
        return str(tmp_path / name)

    return begin


def taken(checkpoint, *, codec_from=None, stored=None, store="new", name=ASKED):
    given = {"store": store, "checkpoint": Checkpoint(str(checkpoint)), "layers": None}
    return known_codec(name, codec_from, stored, **given)


def test_a_choice_is_taken_of_this_model_alone(begin, tiny_checkpoint) -> None:
    own = taken(tiny_checkpoint, codec_from=begin("own"))
    assert (own.name, own.codec, own.evidence["asked"]) == ("int8", CODECS["int8"], ASKED)
    for source, said in (
        (begin("vlm", vlm="0" * 64), r"learnt or chosen for another VLM \(weights 000000000000, this one's are"),
        (
            begin("expert", expert_sha256="1" * 64),
            r"by another expert \(weights 1{12}, this .*; pass --codec int8 without --codec-from .*another --codec-f",
        ),
        (begin("old", expert_sha256=None), "by an expert that it does not name"),
        (begin("more", asked="auto:3%"), r"chosen by --codec auto:3%; pass --codec auto:3%, or another --codec-from"),
    ):
        with pytest.raises(UsageError, match=said):
            taken(tiny_checkpoint, codec_from=source)


def test_a_store_is_gone_on_with_by_the_expert_that_chose(begin, tiny_checkpoint) -> None:
    store = begin("s", expert_sha256="1" * 64)
    stored = codec_choice.stored_identity(store)
    with pytest.raises(UsageError, match=r"another expert .* pass --codec int8 to take it all the same, or another --"):
        taken(tiny_checkpoint, store=store, stored=stored)
    assert taken(tiny_checkpoint, store=store, stored=stored, name="int8").codec == CODECS["int8"]
    own = begin("own")
    stored = codec_choice.stored_identity(own)
    assert taken(tiny_checkpoint, store=own, stored=stored, codec_from=store).name == "int8"
    with pytest.raises(UsageError, match="there is no store"):
        taken(tiny_checkpoint, store=own, stored=stored, codec_from="none")
    other = stored | {"codec_definition": CODECS["int4"].to_json()}
    with pytest.raises(UsageError, match="its codec or tables are others"):
        taken(tiny_checkpoint, store=own, stored=other, codec_from=own)


def test_tails_are_judged_apart_from_the_prefix(caplog) -> None:
    codec, shape = TransformCodec(2.0), np.array([2, 2, 2, 100, 32])
    usual = codec.expected_bytes(tuple(shape))
    arrays = {"kv": bytes(usual), "kv_shape": shape}
    assert longer_than_learnt(codec, arrays) == {}
    for times in (1, 2):  # 1.5 on average
        name = f"tail.{times}.kv"
        arrays |= {name: bytes(times * usual), f"{name}_shape": shape}
    assert longer_than_learnt(codec, arrays) == pytest.approx({"tail.": 1.5})
    assert longer_than_learnt(codec, {"tail.unrouted.kv": bytes(usual), "tail.unrouted.kv_shape": shape}) == {}
    assert longer_than_learnt(CODECS["int8"], arrays) == {}
    codec_choice.warn_of({"tail.": {"a": 1.5, "b": 1.9}}, codec, 10)
    assert "2 of 10 samples have tails that take more than 1.25 times the 2 bits" in caplog.text
    assert "most: b, 3.8 bits): it is learnt from prefixes alone" in caplog.text


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (ExtractConfig, "transform:02.0", "transform:2"),
        (PlanConfig, "transform:2.50", "transform:2.5"),
        (CodecsConfig, "int8,transform:2.0", ("int8", "transform:2")),
        (ExtractConfig, "auto:1e0%", "auto:1%"),
        (ExtractConfig, "auto:0.50%", "auto:0.5%"),
        (ExtractConfig, "auto:0.07%", "auto:0.07%"),
    ],
)
def test_a_codec_has_one_name(kind: type[Config], given, expected) -> None:
    name = "codecs" if kind is CodecsConfig else "codec"
    assert getattr(kind(**REQUIRED[kind], **{name: given}), name) == expected


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (PlanConfig, "auto:2%", "a codec's name, as `alpacache codecs` finds beforehand for auto:PERCENT%"),
        (PlanConfig, "transform:0.1", "transform:RATE with 0.5 to 12 bits a value, to two decimals"),
        (CodecsConfig, "int8,transform:0.1", "as in int8,transform:2, each transform:RATE with 0.5 to 12 bits"),
        (CodecsConfig, "int9", "as in int8,transform:2, each bf16 or fp8"),
    ],
)
def test_a_name_of_no_codec_is_refused_with_what_is_allowed(kind: type[Config], given, said) -> None:
    with pytest.raises(UsageError, match=said):
        kind(**REQUIRED[kind], **{"codecs" if kind is CodecsConfig else "codec": given})
