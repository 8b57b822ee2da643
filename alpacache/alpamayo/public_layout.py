"""What a loader of the public layout would refuse in a checkpoint's directory: each fault with file, key and remedy.

Nothing is run that lies there: JSON is read within bounds, weights are safetensors, and transformers may load neither
code nor anything from the hub.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from alpacache.alpamayo.backbone import described_by, expert_config, module_shapes, refusing, vlm_config
from alpacache.alpamayo.checkpoint import FLOATS, INDEX, SINGLE, Checkpoint, listed
from alpacache.alpamayo.checkpoint_files import links_out
from alpacache.alpamayo.expert import SPACE_CONSTANTS, expert_modules
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.foreign_files import TensorInfo, opened, read_header, read_json
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.recognition import recognise_family
from alpacache.errors import AlpacacheError, CheckpointError

CONFIG = "config.json"
_AGAIN = "Export or fetch it again."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_TOKENIZER_CONFIG, _IMAGES = "tokenizer_config.json", "preprocessor_config.json"
_PROCESSORS = ("processor_config.json", _IMAGES, _TOKENIZER_CONFIG)
"""Files in which `AutoProcessor` looks for the class."""
_NEEDED = (
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    ((_TOKENIZER_CONFIG,),),
    ((_IMAGES,), ("processor_config.json",)),
)
"""Files beside the VLM's config that tokenizer and processor are made of; each is there in one of these ways."""
_READ = (
    *(CONFIG, "generation_config.json", "*processor_config.json"),
    *("tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model"),
    *("chat_template.json", "*.jinja"),
)
LOADED_FILES = (*_READ, *(f"*/{name}" for name in _READ))
"""Patterns of all that loaders read beside the weights, in the checkpoint's directory or in a folder of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that a loader would refuse, or take for something else."""

    file: str
    """Path inside the checkpoint."""
    key: str
    """Key of a JSON file, or names of tensors; empty where the file as a whole is meant."""
    what: str
    remedy: str


def file_faults(checkpoint: Checkpoint, directory: Path) -> Iterator[Fault]:
    """Links that lead out of the checkpoint, special files, and pickles."""
    shards: Collection[str] = ()
    with suppress(CheckpointError):  # `weight_faults` tells of it
        shards = {*checkpoint.names.values()}
    strays = links_out(directory.resolve(), shards)
    for inside, target in strays.items():
        yield Fault(
            file=inside,
            key="",
            what=f"a link or special file that leads out of the checkpoint ({target}).",
            remedy="Put the file itself there, or remove it.",
        )
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory).as_posix()
        if inside in strays or not path.is_file():
            continue
        named = any(fnmatchcase(path.name.lower(), pattern) for pattern in _PICKLES)
        if named or _begins_as_pickle(path):
            yield Fault(
                file=inside,
                key="",
                what="a pickle, which may run code when it is loaded.",
                remedy="Remove it: the weights are in the .safetensors files.",
            )


def _begins_as_pickle(path: Path) -> bool:
    try:
        with opened(path) as (file, _):
            return file.read(2) in _PICKLE_MAGIC
    except CheckpointError:  # a git-lfs pointer, or unreadable: told of where the file is needed
        return False


def config_faults(raw: Mapping[str, Any], *, model_type: str, architecture: str) -> Iterator[Fault]:
    """What the public classes ask of `config.json` beside the settings that this project reads.

    Args:
        raw: the parsed file.
        model_type: package of the family's classes.
        architecture: the class that loads it.
    """
    if _names_code(raw):
        yield _code_fault(CONFIG)
    if raw.get("model_type") != model_type:
        yield _config_fault("model_type", f"is {raw.get('model_type')!r}; its loader is {model_type}'s.", model_type)
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or architecture not in architectures:
        yield _config_fault("architectures", f"is {architectures!r:.80}, without {architecture}.", [architecture])
    for place, block in _blocks(raw):
        nested = any(isinstance(inner, Mapping) and "_target_" in inner for inner in block.values())
        if nested and block.get("_recursive_", True) is not False:
            what = "is not false: the loader would make the inner block first, and its owner want the settings."
            yield _config_fault(f"{place}._recursive_", what, False)


def _config_fault(key: str, what: str, value: object) -> Fault:
    return Fault(file=CONFIG, key=key, what=what, remedy=f"Set it to {value!r:.80}, as the base has it.")


def _names_code(value: object) -> bool:
    """Tell whether a loader would find classes by code in the checkpoint: `auto_map`, at any depth."""
    if isinstance(value, Mapping):
        return "auto_map" in value or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def _code_fault(file: str) -> Fault:
    return Fault(
        file=file, key="auto_map", what="names code that a loader would have to run.", remedy="Remove the key."
    )


def _blocks(value: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Blocks of a config that name a class, each with the keys that lead there."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            place = f"{at}.{key}" if at else key
            if "_target_" in inner:
                yield place, inner
            yield from _blocks(inner, place)


def weight_faults(checkpoint: Checkpoint, directory: Path, readable: dict[str, TensorInfo]) -> Iterator[Fault]:
    """Disagreements of index and shards.

    Args:
        readable: gets the tensors that lie where they should, by the names of `Checkpoint.names`.
    """
    try:
        homes = checkpoint.names
    except CheckpointError as error:
        yield Fault(file=INDEX, key="weight_map", what=str(error), remedy=_AGAIN)
        return
    stored = {checkpoint.stored_name(name): name for name in homes}
    held: dict[str, dict[str, TensorInfo]] = {}
    stray = {SINGLE} if (directory / SINGLE).exists() else set()  # no loader reads other files than these
    for shard in sorted({*homes.values()} | stray):
        try:
            held[shard] = read_header(directory / shard)
        except CheckpointError as error:
            yield Fault(file=shard, key="", what=str(error), remedy=_AGAIN)
    found_in = defaultdict(list)
    for shard, infos in held.items():
        for name in infos:
            found_in[name].append(shard)
    for shard, infos in held.items():
        expected = {checkpoint.stored_name(name) for name, home in homes.items() if home == shard}
        if not expected:
            what = "is a file of weights that the index does not name; loaders take it in place of the shards."
            yield Fault(file=shard, key="", what=what, remedy="Remove it.")
            continue
        if lost := expected - infos.keys():
            others = sorted({other for name in lost for other in found_in[name]})
            where = f"they are in {', '.join(others)}." if others else "no shard holds them."
            what = f"{len(lost)} tensors that the index names here are not in it; {where}"
            yield Fault(file=shard, key=listed(lost), what=what, remedy=_AGAIN)
        if extra := infos.keys() - expected:
            what = f"{len(extra)} tensors are in it that the index does not name here."
            yield Fault(file=shard, key=listed(extra), what=what, remedy=_AGAIN)
        readable |= {stored[name]: infos[name] for name in expected & infos.keys()}


def shape_faults(checkpoint: Checkpoint, readable: Mapping[str, TensorInfo], *, expert_only: bool) -> Iterator[Fault]:
    """Tensors that the classes which the config describes lack, have beyond these, or have in another shape or type."""
    try:
        family = recognise_family(checkpoint).family
        expected = expected_shapes(checkpoint, vlm=not expert_only)
    except CheckpointError as error:
        yield Fault(file=CONFIG, key="", what=str(error), remedy=_AGAIN)
        return
    if family is None:
        what = f"contradicts the weights: {recognise_family(checkpoint).text}."
        yield Fault(file=CONFIG, key="model_type", what=what, remedy="Take config and weights of one model.")
    homes = checkpoint.names
    if missing := expected.keys() - homes.keys():
        what = f"{len(missing)} tensors are missing; a loader would draw them at random."
        yield Fault(file=INDEX, key=_stored(checkpoint, missing), what=what, remedy=_AGAIN)
    if unknown := homes.keys() - expected.keys():
        what = f"{len(unknown)} tensors belong to no part of the model that {CONFIG} describes."
        remedy = f"Remove them, or take the {CONFIG} that they were trained with."
        yield Fault(file=INDEX, key=_stored(checkpoint, unknown), what=what, remedy=remedy)
    for name in sorted(readable.keys() & expected.keys()):
        info, shape = readable[name], expected[name]
        # A single number may be stored with an axis, as the action space's constants may.
        if info.shape != shape and not (name.startswith("action_space.") and info.shape in ((), (1,))):
            what = f"is {list(info.shape)}; {CONFIG} describes {list(shape)}."
            yield Fault(file=info.shard, key=checkpoint.stored_name(name), what=what, remedy=_AGAIN)
        if info.dtype not in FLOATS:
            what = f"is {info.dtype}; expected {' or '.join(FLOATS)}."
            yield Fault(file=info.shard, key=checkpoint.stored_name(name), what=what, remedy=_AGAIN)


def _stored(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    return listed(map(checkpoint.stored_name, names))


def expected_shapes(checkpoint: Checkpoint, *, vlm: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the checkpoint that its configs describe, by the names of `Checkpoint.names`."""
    from transformers import Qwen3VLForConditionalGeneration

    files, dtype = described_by(checkpoint), checkpoint.config.dtype
    makers = expert_modules(checkpoint, expert_config(checkpoint))
    parts: dict[str, Callable[[], nn.Module]] = dict(zip(EXPERT_PARTS, makers, strict=True))
    if vlm:
        parts["vlm."] = partial(Qwen3VLForConditionalGeneration, vlm_config(checkpoint))
    shapes = {
        prefix + name: shape
        for prefix, make in parts.items()
        for name, shape in module_shapes(make, described_by=files, dtype=dtype).items()
    }
    if (recognise_family(checkpoint).family or checkpoint.config.family).stores_constants:
        shapes |= {f"action_space.{name}": () for name in SPACE_CONSTANTS}
    return shapes


def companion_faults(checkpoint: Checkpoint, directory: Path) -> Iterator[Fault]:
    """What is wrong with the VLM's config, tokenizer, processor and chat template, where they lie in the checkpoint."""
    where = checkpoint.config.vlm_name_or_path
    folder = directory / (where or "")
    if where is not None and (Path(where).is_absolute() or not folder.is_dir()):
        if where.count("/") != 1 or where.startswith((".", "/")):
            what = f"is {where!r:.120}, neither a folder in the checkpoint nor a hub id: elsewhere nothing finds it."
            remedy = "Put the VLM's config and tokenizer into a folder of the checkpoint, and name that."
            yield Fault(file=CONFIG, key="vlm_name_or_path", what=what, remedy=remedy)
        return
    at = f"{where}/" if where else ""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for ways in _NEEDED:
        if not any(present.issuperset(way) for way in ways):
            names = " or ".join(" with ".join(way) for way in ways)
            what = f"{names} is not there: no tokenizer and no processor can be made."
            yield Fault(file=at + ways[0][0], key="", what=what, remedy="Copy it from the base model.")
    told: dict[str, Mapping[str, Any]] = {}
    for name in sorted(present & {CONFIG, *_PROCESSORS}):
        try:
            told[name] = read_json(folder / name)
        except CheckpointError as error:
            yield Fault(file=at + name, key="", what=str(error), remedy="Copy it from the base model.")
    coded = [name for name, value in told.items() if _names_code(value)]
    yield from (_code_fault(at + name) for name in coded if at or name != CONFIG)
    whole = told.keys() == present & {CONFIG, *_PROCESSORS}
    if whole and present & {*_PROCESSORS} and not any("processor_class" in told.get(name, ()) for name in _PROCESSORS):
        what = "no file names the processor's class, so AutoProcessor makes none."
        yield Fault(file=at + _IMAGES, key="processor_class", what=what, remedy='Set it to "Qwen3VLProcessor".')
    templates = {"chat_template.jinja", "chat_template.json"} & present
    if whole and not templates and "chat_template" not in told.get(_TOKENIZER_CONFIG, ()):
        what = "is not there, and tokenizer_config.json has no chat_template: no prompt can be made."
        yield Fault(file=f"{at}chat_template.jinja", key="", what=what, remedy="Copy it from the base model.")
    if whole and not coded:  # a loader would ask whether to run it
        yield from _loading_faults(checkpoint, folder, at, present)


def _loading_faults(checkpoint: Checkpoint, folder: Path, at: str, present: Collection[str]) -> Iterator[Fault]:
    """What transformers' own loaders refuse, and where the tokenizer's ids are not those of the config."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.utils import logging

    loaders: list[tuple[str, Any]] = [(_TOKENIZER_CONFIG, AutoTokenizer), (_IMAGES, AutoImageProcessor)]
    loaders = [(name, loader) for name, loader in loaders if name in present]
    if at:
        loaders.append((CONFIG, AutoConfig))
    verbosity = logging.get_verbosity()
    for name, loader in loaders:
        logging.set_verbosity_error()  # it warns of a config.json whose model_type it does not know
        try:
            with refusing(at + name):
                loader.from_pretrained(folder, local_files_only=True)
        except CheckpointError as error:
            if isinstance(error.__cause__, ImportError):  # a library that this machine lacks says nothing of the files
                continue
            what, remedy = f"{loader.__name__} refuses it: {error}", "Copy it from the base model."
            yield Fault(file=at + name, key="", what=what, remedy=remedy)
        finally:
            logging.set_verbosity(verbosity)
    if "tokenizer.json" in present:
        try:
            InputBuilder(checkpoint)
        except AlpacacheError as error:
            remedy = "Copy it from the base model."
            yield Fault(file=f"{at}tokenizer.json", key="", what=str(error), remedy=remedy)
