"""The card of an exported checkpoint: the licence as the base has it, and nothing claimed that is not known."""

import json

from alpacache.alpamayo import Checkpoint
from alpacache.exporting.model_card import (
    RunFacts,
    model_card,
    run_facts,
)
from alpacache.training.run_directory import RunCheckpoint

FACTS = {"step": 1200, "trainable": "head", "samples": 34567, "stores": (), "lost_stores": 0}


def card(tiny_checkpoint, *, base_card=None, base_licence=None, **changes):
    facts = RunFacts(**{**FACTS, "average": None, "train_loss": None, "val_loss": None, **changes})
    base = Checkpoint(str(tiny_checkpoint))
    return model_card("mine", base, facts, base_card=base_card, base_licence=base_licence, expert_only=False)


def test_the_licence_is_the_cards_then_the_files_then_unknown(tiny_checkpoint):
    text = card(tiny_checkpoint, base_card="---\nlicense: mit\n---\n", base_licence=("LICENSE", "Another\n"))
    assert "\nlicense: mit\ntags:" in text
    assert "`license: mit`" in text
    assert "`BASE_README.md`" in text
    text = card(tiny_checkpoint, base_licence=("LICENSE", '\n  The "Open" Licence\nof 2026\n'))
    assert '\nlicense: other\nlicense_name: "The \\"Open\\" Licence"\nlicense_link: LICENSE\ntags:' in text
    assert "BASE_README.md" not in text
    text = card(tiny_checkpoint)
    assert "\nlicense: other\ntags:" in text
    assert "came without a licence" in text


def test_the_front_matter_is_yaml(tiny_checkpoint):
    from huggingface_hub import ModelCard

    data = ModelCard(card(tiny_checkpoint, base_card="---\nlicense: other\nlicense_name: x\n---\n")).data
    assert (data.base_model, data.license, data.license_name) == (tiny_checkpoint.name, "other", "x")
    assert "alpamayo" in data.tags


def test_what_is_not_known_is_called_so(tiny_checkpoint):
    text = card(tiny_checkpoint)
    for line in (
        "| steps | 1,200 |",
        "| samples | 34,567 |",
        "| other stores | not at hand: codec and cameras not known |",
        "| training loss | not known |",
        "| validation loss | not known |",
    ):
        assert line in text
    assert "a copy that does not tell its revision" in text
    store = ("s", "5 samples, KV as int8, a, b")
    text = card(tiny_checkpoint, stores=(store,), lost_stores=2, train_loss=0.5)
    assert "| store `s` | 5 samples, KV as int8, a, b |\n| other stores | 2 not at hand" in text
    assert "| training loss | 0.5000 (" in text
    assert "other stores" not in card(tiny_checkpoint, stores=(store,))


def test_facts_are_those_up_to_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "run/checkpoints/step-0000030"
    checkpoint.mkdir(parents=True)
    rows = [{"step": step, "loss": None if step == 25 else float(step)} for step in range(1, 41)]
    rows[19]["val_loss"], rows[29]["val_loss"], rows[39]["val_loss"] = 3.0, 2.0, 1.0
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run/metrics.jsonl").write_text(lines + '{"step": 41, "lo')
    settings = {"dataset_samples": 7, "stores": [{"path": f"{tmp_path}/gone"}]}
    state = {"step": 30, "trainable": "all", "settings": settings}
    content = RunCheckpoint(model={}, optimizer={}, state=state)
    facts = run_facts(checkpoint, content)
    last = [step for step in range(1, 31) if step != 25][-20:]
    assert facts.train_loss == sum(last) / 20
    assert (facts.val_loss, facts.samples, facts.step, facts.stores, facts.lost_stores) == (2.0, 7, 30, [], 1)
    (tmp_path / "run/metrics.jsonl").write_text(lines.replace('"val_loss": 2.0', '"val_loss": null'))
    assert run_facts(checkpoint, content).val_loss is None
    (tmp_path / "run/metrics.jsonl").unlink()
    facts = run_facts(checkpoint, content)
    assert (facts.train_loss, facts.val_loss, facts.stores, facts.lost_stores) == (None, None, [], 1)
