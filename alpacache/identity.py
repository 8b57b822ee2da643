"""What makes two caches interchangeable (identity), and what is merely worth knowing about one (provenance)."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.errors import UsageError
from cache_store import CODECS, KVCodec, differences

BF16 = "bf16"
"""Name of the lossless codec: KV as the VLM computed it."""
_LIBRARIES = ("alpacache", "torch", "transformers", "numpy", "zarr", "numcodecs", "tokenizers")


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `train` can check without reading a byte of the VLM."""
    return {"id": checkpoint.model_id, "revision": checkpoint.revision, "config_sha256": checkpoint.config.sha256}


def store_identity(
    checkpoint: Checkpoint, builder: InputBuilder, *, cameras: Sequence[str], frames: int, codec: str, dtype: str
) -> dict[str, Any]:
    """Everything that must match for two samples to belong to one store.

    A quantising codec is there by name and by definition: should the name ever mean something else, old stores are
    still decoded as they were written, and nothing new goes into them.
    """
    definition = {} if codec == BF16 else {"codec_definition": CODECS[codec].to_json()}
    return {
        "model": {**model_identity(checkpoint), "vlm_weights_sha256": checkpoint.fingerprint("vlm.")},
        **builder.identity(),
        "cameras": list(cameras),
        "frames": frames,
        "codec": codec,
        **definition,
        "dtype": dtype,
    }


def store_codec(identity: Mapping[str, Any], *, store: str) -> KVCodec | None:
    """The quantising codec of a store by the store's own definition; None for bfloat16."""
    if identity.get("codec") == BF16:
        return None
    return KVCodec.from_json(identity.get("codec_definition", {}), f"codec_definition in the identity of {store}")


def provenance(*, source: str, device: str) -> dict[str, Any]:
    """Versions and hardware; recorded, compared with a warning only. Holds no paths, host names or credentials."""
    return {
        "source": source,
        "device": device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def check_same_model(checkpoint: Checkpoint, identity: Mapping[str, Any], *, store: str, weights: bool = False) -> None:
    """Refuse to train or evaluate on features of another model.

    A revision is compared only where both sides know one: a plain directory has none. `weights` compares the VLM weight
    fingerprint too, which reads a few hundred kilobytes of the VLM's shards.
    """
    expected = model_identity(checkpoint)
    found = {key: identity["model"].get(key) for key in expected}
    if expected["revision"] is None or found["revision"] is None:
        del expected["revision"], found["revision"]
    if weights:
        expected["vlm_weights_sha256"] = checkpoint.fingerprint("vlm.")
        found["vlm_weights_sha256"] = identity["model"].get("vlm_weights_sha256")
    lines = differences(expected, found)
    if lines:
        raise UsageError(
            f"store {store} was extracted with another model than {checkpoint.model}:\n  "
            + "\n  ".join(lines)
            + "\nPass the model that the store was made with, or extract again into a new store."
        )
