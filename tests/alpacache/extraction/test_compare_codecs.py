"""What codecs do to the expert, measured on a tiny model; and the codec that is chosen by it."""

import shutil
from dataclasses import asdict

import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.errors import UsageError
from alpacache.extraction import codec_choice, codec_learning, target_store
from alpacache.extraction.codec_errors import CodecJudge, _rounded_again
from alpacache.extraction.codec_learning import read_store
from alpacache.extraction.config import CodecsConfig, ExtractConfig, most_velocity_error
from cache_store import CODECS, CacheReader, verify

pytestmark = pytest.mark.system  # whole extractions

TRIED = ("int8", "int4", "transform:8", "transform:5")


def settings(model, store, **more):
    given = {"source": "synthetic:9", "frames": 1, "device": "cpu", "hidden_states": "none"}
    return ExtractConfig(model=str(model), store=str(store), **given | more)


@pytest.fixture(scope="module")
def plain(tiny_checkpoint, tmp_path_factory):
    store = tmp_path_factory.mktemp("codecs") / "plain"
    alpacache.extract(settings(tiny_checkpoint, store))
    return store


def compare(given, model, **more):
    return alpacache.compare_codecs(CodecsConfig(input=str(given), model=str(model), device="cpu", **more))


@pytest.fixture(scope="module")
def report(plain, tiny_checkpoint):
    return compare(plain, tiny_checkpoint, codecs=TRIED)


def test_errors_fall_with_bytes_and_the_rounding_is_smaller_than_all(report) -> None:
    assert (report.learnt_from, report.judged_on, report.draws) == (6, 3, 4)
    rows = {row.codec: row for row in report.codecs}
    assert [row.codec for row in report.codecs] == ["int4", "transform:5", "transform:8", "int8"]
    assert rows["transform:5"].tables_bytes > rows["int8"].tables_bytes == 0
    for kind in ("velocity", "gradient"):
        errors = {name: getattr(row.errors, kind) for name, row in rows.items()}
        assert 0 < getattr(report.rounding, kind) < errors["int8"] < errors["transform:5"] < 0.1
        assert errors["int8"] < errors["int4"] < 0.3
        assert errors["transform:8"] < errors["transform:5"]
    for row in report.codecs:
        assert row.errors.velocity <= row.errors.worst_velocity
        assert row.errors.gradient_cosine > 1 - row.errors.gradient**2
        assert abs(row.errors.loss_change) < 0.05
    assert rows["int8"].errors.bits == pytest.approx(8.5, abs=0.1)
    assert rows["int8"].errors.bytes_a_sample == pytest.approx(report.rounding.bytes_a_sample * 8.5 / 16, rel=0.02)


def test_a_codec_that_cannot_be_is_told(plain, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(codec_learning, "prompt_positions", lambda *_: None)
    found = compare(plain, tiny_checkpoint, codecs=("transform:4", "int8"), samples=2, gradients=False)
    first, second = found.codecs
    assert (found.learnt_from, found.judged_on) == (2, 2)
    assert "give the recordings" in first.refused
    assert (first.codec, first.errors) == ("transform:4", None)
    assert second.errors.velocity > 0


def test_recordings_give_what_their_store_gives(report, tiny_checkpoint) -> None:
    again = compare("synthetic:9", tiny_checkpoint, codecs=("int4",), gradients=False, frames=1)
    (row,), wanted = again.codecs, next(row for row in report.codecs if row.codec == "int4")
    assert row.errors.velocity == pytest.approx(wanted.errors.velocity, rel=1e-4)
    assert row.errors.gradient is None


def test_the_gradient_is_that_of_autograd(plain, tiny_checkpoint) -> None:
    """Worked out another way: backward on single samples, and one flat vector of each."""
    expert = load_expert(Checkpoint(str(tiny_checkpoint)), dtype=torch.float32)
    (sample,) = read_store(CacheReader(plain), CacheReader(plain).sample_ids[:1])
    judge = CodecJudge(expert=expert, codecs={"int4": CODECS["int4"], "bf16": None}, gradients=True)
    judge.add(sample)
    found = judge.errors()
    assert found["bf16"].velocity == found["bf16"].gradient == 0
    assert found["bf16"].gradient_cosine == pytest.approx(1)
    vectors = []
    from alpacache.extraction.codec_errors import _coded, _encoded, _plain

    coded = _coded(sample, _encoded(CODECS["int4"], sample.kv, sample.positions), CODECS["int4"])
    for prefix in (_plain(sample, sample.kv), coded):
        felt = judge._through(sample, prefix)
        vectors.append(torch.cat([part.flatten() for part in felt.gradient]).double())
    exact, other = vectors
    assert found["int4"].gradient == pytest.approx(float((other - exact).norm() / exact.norm()), rel=1e-4)
    assert found["int4"].gradient_cosine == pytest.approx(float(other @ exact / other.norm() / exact.norm()), rel=1e-5)


def test_another_rounding_is_as_large_as_one() -> None:
    exact = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * 3
    exact[0] = 0
    once = exact.bfloat16()
    twice = _rounded_again(once, torch.Generator().manual_seed(1))
    assert twice[0] == 0
    error, again = (once.float() - exact).norm(), (twice.float() - once.float()).norm()
    assert float(again / error) == pytest.approx(1, rel=0.01)
    assert 0.07 < float((twice != once).float().mean()) < 0.09


def test_what_cannot_be_compared_is_refused(plain, tiny_checkpoint, tiny_checkpoint_15, tmp_path) -> None:
    quantised, some = tmp_path / "q", tmp_path / "some"
    alpacache.extract(settings(tiny_checkpoint, quantised, source="synthetic:1", codec="int8"))
    alpacache.extract(settings(tiny_checkpoint, some, source="synthetic:1", layers="first:1"))
    for given, model, more, said in (
        (quantised, tiny_checkpoint, {}, "keys and values in int8; what codecs lose is told against bfloat16"),
        (plain, tiny_checkpoint_15, {}, "extracted with another model"),
        (plain, tiny_checkpoint, {"frames": 1}, "--frames is of recordings"),
        (some, tiny_checkpoint, {}, "values of layers 0, .* attends to all. Give the recordings, or a store extracted"),
        (tmp_path / "none", tiny_checkpoint, {}, "there is no store at .*, and as recordings .* is no data source"),
        ("synthtic:3", tiny_checkpoint, {}, r"^'synthtic:3' is no data source\. Did you mean synthetic:3"),
    ):
        with pytest.raises(UsageError, match=said):
            compare(given, model, **more)
    with pytest.raises(UsageError, match="names of codecs, as in int8,transform:2"):
        CodecsConfig(input="s", model="m", codecs=("int9",))


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(codec_choice, "TRIED", ("int8", "int4", "transform:6", "transform:4"))


def test_the_smallest_codec_within_the_error_is_chosen_once(plain, tiny_checkpoint, tmp_path, fewer, caplog) -> None:
    store, notes = tmp_path / "s", []
    alpacache.extract(settings(tiny_checkpoint, store, codec="auto:20%", shard=(0, 2)), on_note=notes.append)
    reader = CacheReader(store)
    choice, loaded = reader.provenance["codec_choice"], []
    errors, sizes = choice["velocity_error"], choice["bytes_a_sample"]
    within = [name for name in errors if errors[name] <= 0.2]
    assert errors.keys() == {"int8", "int4", "transform:6", "transform:4"}
    assert choice["asked"] == "auto:20%"
    assert choice["chosen"] == reader.identity["codec"] == min(within, key=sizes.__getitem__)
    assert (choice["learnt_from"], choice["judged_on"]) == (6, 3)
    assert any(f"{choice['chosen']} is the smallest codec within it" in note for note in notes)
    again = []
    for given in ({"codec": "auto:20%"}, {"codec": reader.identity["codec"]}):
        alpacache.extract(settings(tiny_checkpoint, store, **given), on_note=again.append)
    assert not any("smallest" in note for note in again)
    assert "codec_choice" not in caplog.text
    assert len(CacheReader(store)) == 9
    assert verify(store, deep=True).ok
    other = tmp_path / "other"
    taken = settings(tiny_checkpoint, other, codec="auto:20%", codec_from=str(store), source="synthetic:2")
    alpacache.extract(taken, on_note=loaded.append)
    assert CacheReader(other).identity == reader.identity
    assert CacheReader(other).provenance["codec_choice"] == choice
    assert not any("smallest" in note for note in loaded)
    for given, said in (
        ({"codec": "auto:3%"}, r"chosen by --codec auto:20%; pass --codec auto:20%"),
        ({"codec": "auto:3%", "store": str(plain)}, "the codec bf16, given by name; pass --codec bf16"),
        (
            {"codec": "auto:3%", "store": str(tmp_path / "t"), "codec_from": str(store)},
            "chosen by --codec auto:20%; pass --codec auto:20%, or another --codec-from",
        ),
        ({"codec": "auto:3%", "store": str(tmp_path / "t"), "layers": "first:1"}, "--layers stores some"),
    ):
        with pytest.raises(UsageError, match=said):
            alpacache.extract(settings(tiny_checkpoint, **{"store": store} | given))


def test_where_no_codec_is_good_enough_nothing_is_made(tiny_checkpoint, tmp_path, fewer) -> None:
    with pytest.raises(UsageError, match=r"no codec keeps .* within 0\.01% on 3 samples of these: int8 0\.\d+%.*bf16"):
        alpacache.extract(settings(tiny_checkpoint, tmp_path / "s", codec="auto:0.01%"))
    assert not (tmp_path / "s").exists()


def test_too_few_samples_to_choose_by_are_refused(tiny_checkpoint, tmp_path, fewer) -> None:
    with pytest.raises(UsageError, match=r"auto:20%: 2 of the 2 samples can be read, and a choice needs 3: .*name a"):
        alpacache.extract(settings(tiny_checkpoint, tmp_path / "s", codec="auto:20%", source="synthetic:2"))
    assert not (tmp_path / "s").exists()


def test_a_killed_choice_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(codec_choice, "try_codecs", stop)
    with pytest.raises(KeyboardInterrupt):
        alpacache.extract(settings(tiny_checkpoint, tmp_path / "s", codec="auto:5%"))
    assert not (tmp_path / "s").exists()


def test_who_loses_the_race_for_the_root_takes_the_winners_codec(plain, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    """The store appears between the last look and the root."""
    winner, store, writer = tmp_path / "w", tmp_path / "s", target_store.CacheWriter
    alpacache.extract(settings(tiny_checkpoint, winner, source="synthetic:6", codec="transform:5", shard=(0, 2)))

    def late(path, **given):
        if not store.exists():
            shutil.copytree(winner, store)
        return writer(path, **given)

    monkeypatch.setattr(target_store, "CacheWriter", late)
    notes = []
    alpacache.extract(settings(tiny_checkpoint, store, codec="transform:5"), on_note=notes.append)
    assert any("another worker" in note for note in notes)
    assert CacheReader(store).identity == CacheReader(winner).identity
    assert len(CacheReader(store)) == 9
    assert verify(store, deep=True).ok


def test_the_vlm_is_read_once(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    from alpacache import alpamayo

    load, times = alpamayo.load_vlm, []

    def counted(*given, **named):
        times.append(1)
        return load(*given, **named)

    monkeypatch.setattr(alpamayo, "load_vlm", counted)
    alpacache.extract(settings(tiny_checkpoint, tmp_path / "s", source="synthetic:3", codec="transform:5"))
    assert len(times) == 1


def test_how_a_choice_is_written() -> None:
    assert most_velocity_error("auto:2%") == 0.02
    assert most_velocity_error("auto:0.5%") == 0.005
    assert most_velocity_error("int8") is None
    for name in ("auto:", "auto:2", "auto:0%", "auto:99%", "auto:x%", "auto:nan%"):
        with pytest.raises(ValueError, match=r"from 0\.01% to 50%"):
            most_velocity_error(name)
        with pytest.raises(UsageError, match=r"0\.01%"):
            ExtractConfig(source="s", model="m", store="s", codec=name)
    assert asdict(ExtractConfig(source="s", model="m", store="s", codec="auto:2%"))["codec"] == "auto:2%"
