"""What makes two caches interchangeable (identity), and what is only worth recording about one (provenance)."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from alpacache import __version__
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import rollout_identity
from alpacache.errors import UsageError
from alpacache.sources.video import ffmpeg_versions
from cache_store import CODECS, KVCodec, codec_from_json, differences

BF16 = "bf16"
"""Name of the lossless codec: KV as the VLM computed it."""
_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "numcodecs", "tokenizers", "av", "pillow")


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `train` can check without reading the VLM; for an exported checkpoint, what was trained as well."""
    identity = {"id": checkpoint.model_id, "revision": checkpoint.revision, "config_sha256": checkpoint.config.sha256}
    return identity if checkpoint.origin is None else identity | {"trained": checkpoint.origin["trained"]}


def vlm_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model that features count as; those of an exported checkpoint are its base's, whose VLM it shares."""
    origin = checkpoint.origin
    if origin is None:
        return model_identity(checkpoint)
    vlm = {key: origin["vlm"].get(key) for key in ("id", "revision")}
    return vlm | {"config_sha256": checkpoint.config.sha256}


def store_identity(
    checkpoint: Checkpoint,
    builder: InputBuilder,
    *,
    cameras: Sequence[str],
    frames: int,
    codec: str,
    dtype: str,
    rollouts: int = 0,
    views: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that must match for two samples to belong to one store.

    A quantising codec is recorded by name and by definition: should the name ever mean something else, old stores are
    still decoded as they were written, and nothing new goes into them.
    """
    home, _ = checkpoint.vlm_home
    other_vlm = {} if home is checkpoint else {"vlm": home.model_id}
    return {
        "model": {**vlm_identity(checkpoint), **other_vlm, "vlm_weights_sha256": checkpoint.vlm_fingerprint()},
        **builder.identity(),
        "cameras": list(cameras),
        "frames": frames,
        "codec": codec,
        **({} if codec == BF16 else {"codec_definition": CODECS[codec].to_json()}),
        "dtype": dtype,
        **({"reasoning": rollout_identity(builder, rollouts)} if rollouts else {}),
        **({"views": dict(views)} if views else {}),
    }


def store_codec(identity: Mapping[str, Any], *, store: str) -> KVCodec | None:
    """A store's quantising codec, by the store's own definition; None for bfloat16."""
    if identity.get("codec") == BF16:
        return None
    return codec_from_json(identity.get("codec_definition", {}), f"codec_definition in the identity of {store}")


def provenance(*, source: str, device: str) -> dict[str, Any]:
    """Versions and hardware: recorded, and a difference only warns. Holds no paths, host names or credentials."""
    return {
        "source": source,
        "device": device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": {"alpacache": __version__} | {name: version(name) for name in _LIBRARIES} | ffmpeg_versions(),
    }


def check_same_model(checkpoint: Checkpoint, identity: Mapping[str, Any], *, store: str) -> None:
    """Refuse to train or evaluate on features of another model.

    A revision is compared only if both sides know one; a plain directory has none.
    """
    expected, stored = vlm_identity(checkpoint), identity["model"]
    refuse_differences(
        _model_differences(expected, {key: stored.get(key) for key in expected}),
        f"store {store} was extracted with another model than {checkpoint.model}",
        "Pass the model that the store was made with, or extract again into a new store.",
    )


def check_same_vlm(
    trained: Mapping[str, str] | None, other: Mapping[str, str] | None, *, run: object, what: str
) -> None:
    """Refuse to use what a run trained with another VLM than the run's stores were extracted with.

    `trained` and `other` are as `CachedDataset.vlm`; `run` and `what` name the two sides in the error.
    """
    refuse_differences(
        differences({"vlm": trained}, {"vlm": other}),
        f"{run} was trained on features of another VLM than {what}",
        "null is the model's own; `alpacache extract --vlm` takes another. Use one VLM for both.",
    )


def check_base(checkpoint: Checkpoint, base: Mapping[str, Any], *, run: object) -> None:
    """Refuse to put what a run trained into another model than its `base`, as `model_identity` gave it to the run."""
    refuse_differences(
        _model_differences(dict(base), model_identity(checkpoint)),
        f"{run} was trained on another base model than {checkpoint.model}",
        "Pass the model that the run was trained from.",
    )


def refuse_differences(lines: Sequence[str], what: str, remedy: str) -> None:
    """Raise `UsageError` with the lines of differences if there are any."""
    if lines:
        raise UsageError("\n  ".join([f"{what}:", *lines]) + f"\n{remedy}")


def _model_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Lines of differences; a revision that one side does not know is none."""
    if one["revision"] is None or other["revision"] is None:
        del one["revision"], other["revision"]
    return differences(one, other)
