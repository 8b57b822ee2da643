"""Identity, which makes two caches interchangeable, and provenance, which is only recorded."""

import hashlib
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from alpacache import __version__
from alpacache.alpamayo.backbone import expert_settings, prefix_settings
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.recognition import prompt_words, recognise_family
from alpacache.alpamayo.rollout import rollout_identity
from alpacache.cached_samples.features import LAYERS
from alpacache.driving.cameras import camera_words, changes_of, prompt_marks, recorded_and_blank
from alpacache.errors import UsageError
from alpacache.masking import masked
from alpacache.sources.video import ffmpeg_versions
from cache_store import KVCodec, codec_from_json, codec_named, differences
from cache_store.format import codec_tables
from cache_store.kv.layered import LayeredCodec

CHOICE = "codec_choice"
"""Key of a store's provenance: how its codec was chosen, where that was left to `extract`."""
_LATER = ("settings", "tokens_sha256", "family_by")
"""Keys of the model's part that stores of earlier versions lack."""
_TOLD = 3
"""Differences between two models that are told one by one."""
_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "numcodecs", "tokenizers", "av", "pillow")


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the model that a run is trained from; of an exported checkpoint also what was trained."""
    identity = {
        **_named(checkpoint),
        "settings": expert_settings(checkpoint),
        "expert_sha256": checkpoint.fingerprint(*EXPERT_PARTS),
    }
    return identity if checkpoint.origin is None else identity | {"trained": checkpoint.origin["trained"]}


def vlm_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model that features count as; those of an exported checkpoint are its base's, whose VLM it shares."""
    return vlm_name(checkpoint) | {"settings": prefix_settings(checkpoint)}


def vlm_name(checkpoint: Checkpoint) -> dict[str, Any]:
    """`vlm_identity` without the settings, which lie in the VLM's own files.

    Without the weights' fingerprint where the VLM's files are not on this machine.
    """
    base = {} if checkpoint.origin is None else checkpoint.origin["vlm"]
    weights = checkpoint.vlm_fingerprint_here or base.get("vlm_weights_sha256")
    return {
        **_named(checkpoint),
        **{key: base[key] for key in ("id", "revision") if key in base},
        **({"vlm_weights_sha256": weights} if weights else {}),
    }


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    """How people know a model. The hash is of the whole file: all that records of earlier versions had to compare."""
    return {"id": checkpoint.model_id, "revision": checkpoint.revision, "config_sha256": checkpoint.config.sha256}


def store_identity(
    checkpoint: Checkpoint,
    builder: InputBuilder,
    *,
    cameras: Sequence[str],
    frames: int,
    codec: str,
    calibrated: KVCodec | None = None,
    dtype: str,
    blank: Sequence[str] = (),
    rollouts: int = 0,
    views: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that must match for two samples to belong to one store; `blank` are the black ones of `cameras`.

    `changes` are those of the source's pictures since they were recorded, such as a crop: other pictures.

    A quantising codec is recorded by name and by definition (of `calibrated`, if it has learnt tables): should the
    name ever mean something else, old stores are still decoded as they were written, and nothing new goes into them.
    The model's family and what told it are for people: what a family decides of a prefix stands in the prompt.
    """
    home, _ = checkpoint.vlm_home
    other_vlm = {} if home is checkpoint else {"vlm": home.model_id}
    known, stored_as = vlm_identity(checkpoint), calibrated or codec_for(codec, layers)
    return {
        "model": {
            **known,
            **other_vlm,
            "settings": {"family": builder.family.name, **known["settings"]},
            "family_by": builder.recognition.text,
            "vlm_weights_sha256": checkpoint.vlm_fingerprint(),
            "tokens_sha256": builder.tokens_sha256(),
        },
        **builder.identity(),
        "cameras": list(cameras),
        **({"blank": list(blank)} if blank else {}),
        **({"changes": list(changes)} if changes else {}),
        "frames": frames,
        "codec": codec,
        **({} if stored_as is None else {"codec_definition": stored_as.to_json()}),
        **({} if layers is None else {LAYERS: list(layers)}),
        "dtype": dtype,
        **({"reasoning": rollout_identity(builder, rollouts)} if rollouts else {}),
        **({"views": dict(views)} if views else {}),
    }


def codec_for(name: str, layers: Sequence[int] | None) -> KVCodec | None:
    """The codec of that name for keys and values of these of the VLM's layers (None: all); None for `bf16`.

    That of `transform:RATE` has no tables yet.
    """
    codec = codec_named(name)
    return codec.of_layers(layers) if isinstance(codec, LayeredCodec) and layers is not None else codec


def store_codec(identity: Mapping[str, Any], *, store: str) -> KVCodec | None:
    """A store's quantising codec, by the store's own definition and with its tables; None for bfloat16."""
    if identity.get("codec") == "bf16":  # in every store the name of values as they are
        return None
    where = f"codec_definition in the identity of {store}"
    return codec_from_json(identity.get("codec_definition", {}), where, lambda name: codec_tables.read_at(store, name))


def provenance(*, source: str, device: str, compiled: bool = False) -> dict[str, Any]:
    """Versions, hardware and whether the VLM was compiled: what decides rounding, and a difference only warns.

    Holds no paths, host names or credentials.
    """
    return {
        "source": masked(source),
        "device": device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **({"compiled": True} if compiled else {}),
        "libraries": {"alpacache": __version__} | {name: version(name) for name in _LIBRARIES} | ffmpeg_versions(),
    }


def as_stored(identity: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` in the words of a store that is there: the same model under another name is the store's model.

    What does not decide a prefix is taken from the store, and what a store of an earlier version does not say is left
    out, so that comparing the two as they are finds what decides.
    """
    model, theirs = identity["model"], stored.get("model")
    if not isinstance(theirs, Mapping):
        return identity
    names = ("id", "revision", "vlm", "family_by", *(["config_sha256"] if "settings" in theirs else []))
    model = {key: value for key, value in model.items() if key in theirs or key not in _LATER}
    if isinstance(settings := theirs.get("settings"), Mapping) and "family" in settings:
        model["settings"] = model["settings"] | {"family": settings["family"]}
    return identity | {"model": model | {key: theirs[key] for key in names if key in theirs and key in model}}


def telling(lines: Sequence[str]) -> list[str]:
    """The differences between two stores less those that follow from another: a codec brings definition and fields."""
    other_codec = any(line.startswith("identity.codec:") for line in lines)
    follow = ("identity.codec_definition", "fields.kv", "fields.tail.")
    return [line for line in lines if not (other_codec and line.startswith(follow))]


def other_options(identity: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Name the options in which `identity` differs from a store's: cameras, routes, layers, precision, prompt."""
    said = []
    shows, wants = camera_words(stored), camera_words(identity)
    if shows and shows != wants and "blank" in {*identity, *stored}:
        recorded, blank = recorded_and_blank(stored)
        options = f"--cameras {','.join(recorded)}" + (f" --blank {','.join(blank)}" if blank else "")
        said.append(f"the store shows {shows}, this run {wants}: pass {options}, or another --store.")
    changed, told = (", ".join(changes_of(each)) or "nothing" for each in (identity, stored))
    if changed != told:
        said.append(
            f"the store's pictures were changed since they were recorded by {told}, this run's by {changed}: name a "
            "source with the store's, or another --store."
        )
    asked, there = (_given_route(each) for each in (identity, stored))
    if asked != there:
        has, remedy = ("no routes", "leave --route out")
        if there:
            has, remedy = f"routes ({there})", f"pass --route {shlex.quote(there)}"
        wants = f"{'others' if there else 'some'} ({asked})" if asked else "none"
        said.append(f"the store has {has}, this run has {wants}: {remedy}, or pass another --store.")
    asked, there = (each.get(LAYERS) for each in (identity, stored))
    if asked != there:
        held = "all layers" if there is None else f"layers {_layers_words(there)}"
        remedy = "leave --layers out" if there is None else f"pass --layers {_layers_words(there)}"
        said.append(
            f"the store has the KV of {held}, this run has another --layers: {remedy}, or pass another --store."
        )
    names = {"bfloat16": "bf16", "float32": "fp32"}
    asked, there = (names.get(str(each.get("dtype"))) for each in (identity, stored))
    if there and asked != there:
        said.append(
            f"the store was made with --vlm-dtype {there}, this run has {asked}: pass --vlm-dtype {there}, or "
            "another --store."
        )
    asked, there = (_prompt_options(each) for each in (identity, stored))
    if there and asked != there:
        said.append(
            f"the store's prompts were written with {there}, this run's with {asked}: pass {there}, or another --store."
        )
    return said


def _prompt_options(identity: Mapping[str, Any]) -> str | None:
    """The options of `extract` that give this prompt; None where the identity does not tell."""
    named, numbered = prompt_marks(identity)
    if numbered is None:
        return None
    names, numbers = ("" if given else "no-" for given in (named, numbered))
    return f"--{names}camera-names --{numbers}frame-numbers"


def _layers_words(layers: object) -> str:
    """Layers of a store as `--layers` takes them."""
    return ",".join(map(str, layers)) if isinstance(layers, list) else repr(layers)[:200]


def _given_route(identity: Mapping[str, Any]) -> str | None:
    """`source` or the one text of all samples; None without routes."""
    prompt = identity.get("prompt")
    route = prompt.get("route") if isinstance(prompt, Mapping) else None
    return str(route.get("given"))[:200] if isinstance(route, Mapping) else None


def check_same_model(checkpoint: Checkpoint, identity: Mapping[str, Any], *, store: str) -> None:
    """Refuse to train or evaluate on features of another model, which is known by what decides its prefixes."""
    expected, stored = vlm_identity(checkpoint), identity.get("model")
    if not isinstance(stored, Mapping):
        raise UsageError(f"store {store} does not say which model its features are of; expected one by `extract`.")
    if "vlm" in stored:  # another's weights, which only the runs on this store have to agree in
        expected["vlm_weights_sha256"] = stored.get("vlm_weights_sha256")
    _refuse_other_model(
        model_differences(expected, stored),
        (stored.get("id"), expected["id"]),
        f"store {store} was extracted with another model than {checkpoint.model}",
        "Pass the model that the store was made with, or extract again into a new store.",
    )


def prompt_doubt(checkpoint: Checkpoint, identity: Mapping[str, Any], *, store: str) -> str | None:
    """Say where a store of an earlier version has another prompt than the model was trained with.

    Those versions went by the names of the model's classes. None for stores whose prompt was chosen by evidence, or by
    a user who knew it.
    """
    model, prompt = identity["model"], identity.get("prompt")
    if "family_by" in model or not isinstance(prompt, Mapping):
        return None
    found = recognise_family(checkpoint)
    if found.family is None or prompt.get("camera_names") in (None, found.family.prompt.camera_names):
        return None
    return (
        f"store {store} was extracted by an earlier version with another prompt than {checkpoint.model} was trained "
        f"with: {prompt_words(found.family.prompt)} ({found.text}). Unless that was meant, extract into a new store"
    )


def check_same_vlm(
    trained: Mapping[str, str] | None, other: Mapping[str, str] | None, *, run: object, what: str
) -> None:
    """Refuse to use what a run trained with another VLM than the run's stores were extracted with.

    `trained` and `other` are as `CachedDataset.vlm`; `run` and `what` name the two sides in the error.
    """
    if trained and other and trained.get("weights_sha256") == other["weights_sha256"]:
        return
    refuse_differences(
        differences({"vlm": trained}, {"vlm": other}),
        f"{run} was trained on features of another VLM than {what}",
        "null is the model's own; `alpacache extract --vlm` takes another. Use one VLM for both.",
    )


def check_base(checkpoint: Checkpoint, base: Mapping[str, Any], *, run: object) -> None:
    """Refuse to put what a run trained into another model than its `base`, as `model_identity` gave it to the run."""
    model = model_identity(checkpoint)
    _refuse_other_model(
        model_differences(base, model),
        (base.get("id"), model["id"]),
        f"{run} was trained on another base model than {checkpoint.model}",
        "Pass the model that the run was trained from.",
    )


def model_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """List what differs between two models: settings and weights, or names and file hashes where one side lacks those.

    Both are from `model_identity`, or `vlm_identity` and a store's `model`. A revision that one side does not know is
    no difference.
    """
    by_settings = "settings" in one and "settings" in other
    by_weights = any(key in one and key in other for key in ("expert_sha256", "vlm_weights_sha256"))
    keys = {"settings" if by_settings else "config_sha256", "trained"}
    keys |= {key for key in ("expert_sha256", "vlm_weights_sha256", "tokens_sha256") if key in one and key in other}
    if not by_weights:
        keys |= {"id"} if None in (one.get("revision"), other.get("revision")) else {"id", "revision"}
    apart, same = [{key: model[key] for key in keys if key in model} for model in (one, other)]
    for model in (apart, same):  # names of families were told otherwise before, and the prompt says what they decide
        if isinstance(settings := model.get("settings"), Mapping):
            model["settings"] = {key: value for key, value in settings.items() if key != "family"}
    return differences(apart, same)


def _refuse_other_model(lines: Sequence[str], ids: tuple[object, object], what: str, remedy: str) -> None:
    """As `refuse_differences`, where many differences, or several of models of two names, are one: another model.

    `ids` are the names of the model that was found and of the one that was given.
    """
    found, given = (str(name)[:100] for name in ids)
    if len(lines) <= (_TOLD if found == given else 1):
        refuse_differences(lines, what, remedy)
        return
    keys = list(dict.fromkeys(".".join(line.partition(": ")[0].split(".")[:2]) for line in lines))
    told = ", ".join(keys[:_TOLD]) + (f" and {len(keys) - _TOLD} more" if keys[_TOLD:] else "")
    names = "" if found == given else f"it is of {found}, not of {given}; "
    raise UsageError(f"{what}: {names}{told} differ. {remedy}")


def refuse_differences(lines: Sequence[str], what: str, remedy: str) -> None:
    """Raise `UsageError` with the lines of differences if there are any."""
    if lines:
        raise UsageError("\n  ".join([f"{what}:", *lines]) + f"\n{remedy}")


def ids_digest(sample_ids: Iterable[str]) -> str:
    """Digest by which a run knows the samples of a store, in their order."""
    digest = hashlib.sha256()
    for sample_id in sample_ids:
        digest.update(f"{sample_id}\n".encode())
    return digest.hexdigest()
