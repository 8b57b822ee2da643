"""The model card of an exported checkpoint: which base, which data, how far, how good, under which licence.

Everything comes from the run and the base themselves; what they do not say is called not known. Of paths, which mean
nothing elsewhere and may be private, only the last part of a store's is shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpacache import __version__
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.licence import licence_of
from alpacache.driving.cameras import camera_words
from alpacache.training.run_directory import RunCheckpoint, recorded_metrics
from cache_store import CacheReader, CacheStoreError

_LAST_ROWS = 20
_TAGS = ("alpacache", "alpamayo", "autonomous-driving", "vision-language-action", "flow-matching")
_TRAINABLE = {
    "all": "action expert and both action projections",
    "head": "both action projections and the expert's final norm",
    "lora": "both action projections, the expert's final norm, and low-rank adapters (merged) on its linear layers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Facts of the training, from a checkpoint and the run directory around it."""

    step: int
    average: float | None
    """Decay of the average of the weights that was taken; None where the weights themselves were."""
    trainable: str
    samples: int
    """Number of distinct samples trained on."""
    stores: Sequence[tuple[str, str]]
    """Last part of the path, and samples, codec and cameras, of stores that still lie where the run read them."""
    lost_stores: int
    """Number of the others."""
    train_loss: float | None
    """Mean over the last steps up to the checkpoint, 20 at most."""
    val_loss: float | None
    """Loss of the last validation up to the checkpoint; None without one, or where it was not finite."""


def run_facts(checkpoint: Path, content: RunCheckpoint, *, average: bool = False) -> RunFacts:
    """Gather what is known of a run.

    Args:
        checkpoint: `RUN/checkpoints/step-N` or a link to it; metrics are looked for in RUN.
        content: the checkpoint, in memory.
        average: whether its average was taken.
    """
    rows = recorded_metrics(checkpoint.resolve(), content.state)
    losses = [float(row["loss"]) for row in rows if row.get("loss") is not None][-_LAST_ROWS:]
    validations = [row["val_loss"] for row in rows if "val_loss" in row]
    paths = [store["path"] for store in content.state["settings"]["stores"]]
    stores = [(Path(path).name, facts) for path in paths if (facts := _store_facts(path))]
    return RunFacts(
        step=int(content.state["step"]),
        average=content.state["average"]["decay"] if average else None,
        trainable=str(content.state["trainable"]),
        samples=int(content.state["settings"]["dataset_samples"]),
        stores=stores,
        lost_stores=len(paths) - len(stores),
        train_loss=sum(losses) / len(losses) if losses else None,
        val_loss=validations[-1] if validations else None,
    )


def model_card(
    name: str,
    base: Checkpoint,
    facts: RunFacts,
    *,
    base_card: str | None,
    base_licence: tuple[str, str] | None,
    expert_only: bool,
) -> str:
    """The text of `README.md`, with the front matter that the hub reads.

    Args:
        name: name of the exported directory.
        base_card: the base's own README.md; what it says of the licence is repeated.
        base_licence: name and text of the base's licence file, named where the card's front matter says nothing.
    """
    licence = licence_of(base_card, base_licence)
    tags = "\n".join(f"- {tag}" for tag in _TAGS)
    about = "\n".join(licence or ["license: other"])
    revision = f"revision `{base.revision}`" if base.revision else "a copy that does not tell its revision"
    if licence:
        terms = f"Weights trained from `{base.full_name}` are under its licence: `{'; '.join(licence)}`."
    else:
        terms = f"`{base.full_name}` came without a licence in its files; what holds for it holds for these weights."
    if base_card is not None:
        terms += " Its card is kept as `BASE_README.md`."
    parts = [
        f"---\nbase_model: {json.dumps(base.full_name)}\nbase_model_relation: finetune\n{about}\ntags:\n{tags}\n---",
        f"# {name}",
        f"The action expert of `{base.full_name}` ({revision}), trained further on cached features of its frozen "
        f"vision-language model (VLM) and put back into the base's layout by alpacache {__version__}.",
        _MISSING_VLM if expert_only else "The VLM's tensors, the config and the tokenizer are the base's, unchanged.",
        f"## Training\n\n{_table(facts)}",
        "Losses are mean squared errors of the flow's velocity over normalised actions, not distances in metres; "
        "`alpacache eval` gives those.",
        f"## Licence\n\n{terms}",
    ]
    return "\n\n".join(parts) + "\n"


_MISSING_VLM = (
    "**The VLM is missing.** This directory holds only the trained part: `expert.*`, the action projections and, where "
    "the base stores them, the action space's constants. `alpacache train` and `alpacache eval` load it as it is; to "
    "extract features or to run the public code, export without `--expert-only`."
)


def _table(facts: RunFacts) -> str:
    rows = [
        ("trained", _TRAINABLE[facts.trainable]),
        ("steps", f"{facts.step:,}"),
        ("weights", _WEIGHTS if facts.average is None else f"moving average over the steps, decay {facts.average:g}"),
        ("samples", f"{facts.samples:,}"),
        *((f"store `{name}`", said) for name, said in facts.stores),
        ("training loss", _number(facts.train_loss, f"mean of the last steps, {_LAST_ROWS} at most")),
        ("validation loss", _number(facts.val_loss, "held-out samples")),
    ]
    if facts.lost_stores or not facts.stores:
        rows.insert(-2, ("other stores", f"{facts.lost_stores or ''} not at hand: codec and cameras not known".strip()))
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {label} | {text} |" for label, text in rows)


_WEIGHTS = "of the last of these steps"


def _number(value: float | None, what: str) -> str:
    return "not known" if value is None else f"{value:.4f} ({what})"


def _store_facts(path: str) -> str | None:
    """Describe a store at the time of export; None where it cannot be opened."""
    try:
        reader = CacheReader(path)
    except (CacheStoreError, OSError):
        return None
    codec, cameras = reader.identity.get("codec"), camera_words(reader.identity)
    return f"{len(reader.sample_ids):,} samples, KV as {codec}, {cameras}"
