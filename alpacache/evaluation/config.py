"""Settings of `eval` and `probe`."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Le, MinLen

from alpacache.cached_samples.config import ChoiceConfig, Chosen, check_weights_file
from alpacache.config import (
    PLACE,
    BatchSize,
    Config,
    Count,
    Name,
    Place,
    Repeats,
    Seed,
    Written,
    expand_home,
    expect,
    parts,
    whole_number,
)
from alpacache.errors import UsageError
from alpacache.inference import BASE, TRAINED

Control: TypeAlias = Literal["shuffled", "none"]
Pool: TypeAlias = Literal["both", "last", "mean"]
Layers = Annotated[
    Literal["last", "all"] | tuple[Annotated[int, Ge(0), Le(1024)], ...],
    parts(whole_number, "last|all|0,9,...", expected="last, all or layer numbers as in 0,9", words=("last", "all")),
]


def read_compare(written: Any) -> dict[str, str]:
    """Label -> run, from `LABEL=RUN` texts or such a table.

    Raises `UsageError` for a label that is taken, also where it differs from another in case or space alone: readers of
    a table could not tell them apart.
    """
    return _by_label(written, "--compare", "RUN", taken=(BASE, TRAINED))


def read_compare_store(written: Any) -> dict[str, str]:
    """Label -> store, as `read_compare`; a label may be that of a run, which is then judged on that store."""
    return _by_label(written, "--compare-store", "STORE", taken=(BASE,))


def _by_label(written: Any, option: str, what: str, *, taken: Sequence[str]) -> dict[str, str]:
    from alpacache.metrics.baselines import BASELINES

    texts = (written,) if isinstance(written, str) else written
    pairs = written.items() if isinstance(written, Mapping) else [text.partition("=")[::2] for text in texts]
    places: dict[str, str] = {}
    spelled = {_spelling(label): label for label in (*taken, *BASELINES)}
    for written_label, place in pairs:
        label = written_label.strip()
        if not (label and place and label.isprintable()):
            raise ValueError(f"LABEL={what} with a label of letters, digits, signs and spaces")
        if other := spelled.get(_spelling(label)):
            like = "" if other == label else f" by {other!r}"
            raise UsageError(f"{option} {label}={place}: the label {label!r} is taken{like}; choose another.")
        spelled[_spelling(label)] = label
        places[label] = expand_home(place)
    return places


def _spelling(label: str) -> str:
    """A label without what readers overlook."""
    return "".join(unicodedata.normalize("NFKC", label).casefold().split())


def _paths(written: Any) -> Any:
    return expand_home((written,) if isinstance(written, str) else written)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(ChoiceConfig):
    """Settings of `eval`."""

    store: Annotated[tuple[str, ...], MinLen(1), Written(metavar=PLACE, read=_paths, repeatable=True)]
    """Store of the samples to judge on, best of held-out clips; repeatable."""
    model: Place
    """Hub id or directory of an Alpamayo checkpoint."""
    out: Place
    """Directory for JSON, pictures and the report."""
    sample_weights: Place | None = None
    """Table (`.csv`, `.parquet`) of columns `sample_id` or `clip_id`, and `weight`: how much a sample counts in means,
    slopes and intervals. 0 leaves it out, and what is not named has weight 1. Default: all alike."""
    checkpoint: Place | None = None
    """Run directory or checkpoint to judge beside the base model. Default: the base model alone."""
    compare: Annotated[Mapping[str, str], Written(metavar="LABEL=RUN", read=read_compare, repeatable=True)] = field(
        default_factory=dict
    )
    """More runs in the same tables; repeatable."""
    compare_store: Annotated[
        Mapping[str, str], Written(metavar="LABEL=STORE", read=read_compare_store, repeatable=True)
    ] = field(default_factory=dict)
    """The base model in the same tables on another store of the same samples: other cameras, a black picture, another
    codec. With the label of a run (`trained`, or one of `compare`) it is that run which is judged there; repeatable."""
    ema: bool = False
    """Use the average of the weights that runs with `--ema` kept."""
    reasoning: Literal["auto", "none"] = "auto"
    """`auto`: each path on a reasoning rollout of its own where the store has them; `none`: on the direct prefix."""
    swap_route: bool = False
    """Also predict with left for right in the routes, from the same noise: do the paths change sides?"""
    control: Annotated[tuple[Control, ...], parts(str, "shuffled,none", expected="shuffled, none or both")] = ()
    """Also predict, from the same noise, with another clip's prefix (`shuffled`) or with none (`none`): does the model
    look at what it is shown? Default: neither."""
    guidance: Annotated[float, Ge(0), Le(100)] | None = None
    """Weight W of the routes, 3 in the public demo: a velocity is (1 - W) of the one without the route and W of the one
    with it. Default: the one with it alone."""
    paths: Repeats = 6
    """Paths per sample."""
    flow_steps: Annotated[
        Repeats | Annotated[tuple[Repeats, ...], MinLen(1)],
        parts(whole_number, "INTEGER,...", expected="whole numbers as in 10,4,2,1"),
    ] = 10
    """Euler steps from noise to action. Of several numbers, as in `10,4,2,1`, the first is judged in full and a table
    compares all; each prefix is read once."""
    sheet: Chosen = field(default_factory=tuple)
    """Draw these samples, in the words of `only`, into one picture, a row each: front picture and paths of each model,
    and the bias over all samples beside them; repeatable. Default: no sheet."""
    samples: Count | None = None
    """At most this many samples. Default: all."""
    on_overlap: Literal["stop", "allow"] = "stop"
    """Reaction to stores that share samples: refuse, or judge them as often as they are there."""
    on_damage: Literal["stop", "skip"] = "stop"
    """Reaction to a sample that cannot be read: end the evaluation, or leave it out for all models and name it."""
    batch_size: BatchSize = 8
    """Samples at once; changes no result."""
    seed: Seed = 0
    """Seed of the noise, which all models share."""
    device: Name | None = None
    """`cuda`, `cuda:1` or `cpu`. Default: a GPU if there is one."""
    capture: bool = True
    """On a GPU, replay all flow steps of a batch as one CUDA graph; not on reasoning rollouts."""

    @property
    def all_flow_steps(self) -> tuple[int, ...]:
        """Every number of flow steps, the one that is judged in full first."""
        return (self.flow_steps,) if isinstance(self.flow_steps, int) else self.flow_steps

    def _check_together(self) -> None:
        for name, values in (("control", self.control), ("flow_steps", self.all_flow_steps)):
            expect(len(set(values)) == len(values), name, ",".join(map(str, values)), "each of them once")
        check_weights_file(self.sample_weights)
        runs = {_spelling(label): label for label in (TRAINED, *self.compare)}
        for label, store in self.compare_store.items():
            if runs.get(_spelling(label), label) != label or (label == TRAINED and self.checkpoint is None):
                raise UsageError(
                    f"--compare-store {label}={store}: the label {label!r} is taken; choose another, or that of a run "
                    "which is to be judged on this store."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig(Config):
    """Settings of `probe`."""

    store: Place
    """Store to probe: its hidden states, and values where layers are named."""
    out: Place | None = None
    """Directory for `probe.json` and `probe.png`. Default: nothing written."""
    layers: Layers = "last"
    """`last`: the hidden states after the last layer. `all` or numbers: these layers' cached values too."""
    pool: Pool = "both"
    """A sample's vector: the last prefix token's, the mean over tokens, or the two side by side."""
    samples: Count = 2000
    """At most this many samples, whole clips by seed; time and memory grow faster than the number."""
    on_damage: Literal["stop", "skip"] = "stop"
    """Reaction to a sample that cannot be read: end the probe, or leave it out and name it."""
    seed: Seed = 0
    """Seed of folds, control and intervals."""

    def _check_together(self) -> None:
        expect(self.layers != (), "layers", "empty", "last, all or layer numbers counted from 0")
