"""Whatever stands in a checkpoint's files: it loads, or one error says which file and key; memory stays small."""

import copy
import json
import os
import shutil
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from alpacache.alpamayo import Checkpoint, load_expert, load_vlm
from alpacache.alpamayo.backbone import geometry_of, refusing
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.alpamayo.foreign_files import read_header
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.errors import CheckpointError

FILES = {
    "r1": ("config.json", "vlm/config.json", "vlm/preprocessor_config.json", INDEX),
    "2": ("config.json", "preprocessor_config.json", INDEX),
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 7, 2**31, 10**12, 10**18, -(10**18), 10**30]),
    st.floats(),
    st.sampled_from(["", "abc", "12", "a.b", "../x", "x/y", "\0", "x" * 5000, "alpamayo1_5.models.X"]),
)
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part))


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory):
    return shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("hostile") / "Tiny-R1")


@pytest.fixture(scope="module")
def super_model(tmp_path_factory):
    """2 Super's: one config with the VLM's and the expert's in it, and no directory of the VLM."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("hostile") / "Tiny-2", family="2")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def paths(value, at=()):
    """Where values lie in a JSON document: lists of keys."""
    yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*at, key))


def changed(document, path, value):
    if not path:
        return value
    result = copy.deepcopy(document)
    place = result
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


def use(directory):
    """Everything that reads the files: both models, the prompt, the sizes, the fingerprint."""
    checkpoint = Checkpoint(str(directory))
    for read in (
        InputBuilder,
        load_expert,
        load_vlm,
        geometry_of,
        Checkpoint.vlm_fingerprint,
        lambda checkpoint: checkpoint.origin,
    ):
        read(checkpoint)


def refused(call, *arguments):
    """The message of the refusal, one line; None where the call goes well."""
    try:
        call(*arguments)
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message.split("tensors):")[0]
        assert len(message) < 20_000
        return message
    return None


@pytest.mark.ci
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    place=st.sampled_from([(family, name) for family, names in FILES.items() for name in names]),
    value=VALUES | st.just(...),
)
def test_any_value_anywhere_in_the_json_files(model, super_model, data, place, value):
    family, name = place
    model = {"r1": model, "2": super_model}[family]
    original = (model / name).read_text()
    document = json.loads(original)
    path = data.draw(st.sampled_from(list(paths(document))[value is ... :]))
    try:
        (model / name).write_text(json.dumps(changed(document, path, value)))
        refused(use, model)
    finally:
        (model / name).write_text(original)


@pytest.mark.parametrize(
    ("name", "path", "value", "expected"),
    [
        (
            "config.json",
            ("traj_token_ids",),
            [1, 2],
            r"config.json: traj_token_ids: expected a valid JSON object, not \[1, 2\]\.$",
        ),
        ("config.json", ("vocab_size",), "abc", r"config.json: vocab_size: .* integer, not 'abc'\.$"),
        ("config.json", ("hist_traj_tokenizer_cfg",), 3, r"config.json: hist_traj_tokenizer_cfg: .*, not 3\.$"),
        ("config.json", ("traj_token_ids", "future_start"), ..., "traj_token_ids.future_start is missing"),
        ("config.json", ("expert_cfg", "hidden_size"), "x", "expert_cfg .*hidden_size"),
        ("config.json", ("expert_cfg", "num_hidden_layers"), 10**9, "expert_cfg: num_hidden_layers: .* 1024"),
        ("config.json", ("expert_cfg", "hidden_size"), 2**20, "tensors"),
        ("config.json", ("traj_token_ids", "future"), 5, r"config.json: traj_token_ids\.future is 5; .* put it at \d+"),
        ("config.json", ("traj_vocab_size",), 2**20, r"traj_vocab_size 1048576 put it at"),
        ("config.json", ("vocab_size",), 100, r"config.json: vocab_size is 100; its own tokens take \d+"),
        (
            "config.json",
            ("hist_traj_tokenizer_cfg", "num_bins"),
            2**20,
            r"hist_traj_tokenizer_cfg have num_bins 128 ",
        ),
        (
            "config.json",
            ("hist_traj_tokenizer_cfg", "ego_xyz_min"),
            [4, 4, 4],
            "hist_traj_tokenizer_cfg has ego_xyz_min",
        ),
        (
            "config.json",
            ("action_space_cfg", "n_waypoints"),
            63,
            "action_space_cfg.n_waypoints: it is 63; .* 64 way",
        ),
        ("config.json", ("action_space_cfg", "dt"), 0.2, r"action_space_cfg.dt: it is 0\.2; .* steps of 0\.1 s only"),
        ("config.json", ("max_pixels",), 10, "config.json: max_pixels is 10, below min_pixels, 32768"),
        ("config.json", ("vlm_name_or_path",), "", r"config.json: vlm_name_or_path: .* 1 character"),
        ("config.json", (), [], "config.json holds a list; expected a JSON object"),
        ("vlm/config.json", ("text_config",), 3, "vlm/config.json: text_config: .*, not 3"),
        ("vlm/config.json", ("text_config", "hidden_size"), None, "vlm/config.json .*hidden_size"),
        ("vlm/config.json", ("text_config", "hidden_act"), "nope", "'nope' is not known"),
        ("vlm/config.json", ("text_config", "intermediate_size"), 2**20, r"misshapen .*mlp\.down_proj"),
        ("vlm/config.json", ("model_type",), ["x" * 5000] * 500, "vlm/config.json: model_type is "),
        ("vlm/config.json", ("image_token_id",), 5, r"vlm/config.json: image_token_id is 5; the tokenizer's .* is \d+"),
        (
            "vlm/config.json",
            ("image_token_id",),
            10**400,
            r"vlm/config.json is not valid JSON .* beyond the range of numbers",
        ),
        ("vlm/config.json", ("text_config", "rope_scaling"), "x", r"text_config\.rope_scaling: .*, not 'x'"),
        ("vlm/config.json", ("text_config", "rope_scaling", "mrope_section"), [1, 2], r"mrope_section"),
        ("vlm/config.json", ("text_config", "rope_scaling", "rope_type"), "x", "vlm/config.json"),
        (
            "vlm/config.json",
            ("text_config", "num_key_value_heads"),
            3,
            "text_config: num_attention_heads 4 is no multiple",
        ),
        ("vlm/config.json", ("vision_config", "num_heads"), 5, "vision_config: hidden_size 96 is no multiple"),
        ("vlm/config.json", ("vision_config", "patch_size"), 10**9, r"vision_config\.patch_size: .* 256"),
        ("vlm/preprocessor_config.json", ("patch_size",), "16", "preprocessor_config.json: patch_size: .* '16'"),
        (INDEX, (), [], "holds a list"),
        (INDEX, ("weight_map",), {}, "weight_map: .*at least 1"),
        (INDEX, ("weight_map", "expert.norm.weight"), 3, r"weight_map.expert.norm.weight: .* string, not 3"),
        (INDEX, ("metadata",), "no", "metadata: .*, not 'no'"),
        (INDEX, ("weight_map", "expert.norm.weight"), "x" * 500 + ".safetensors", "outside the checkpoint"),
    ],
)
def test_file_and_key_are_named(name, path, value, expected, model):
    check_refusal(model, name, path, value, expected)


def test_a_step_that_was_rounded_on_its_way_is_a_tenth_of_a_second(model):
    original = (model / "config.json").read_text()
    try:
        rounded = changed(json.loads(original), ("action_space_cfg", "dt"), 0.10000000149011612)  # 0.1 in float32
        (model / "config.json").write_text(json.dumps(rounded))
        assert Checkpoint(str(model)).config.action_space.dt_s == 0.1
    finally:
        (model / "config.json").write_text(original)


def check_refusal(model, name, path, value, expected):
    original = (model / name).read_text()
    try:
        (model / name).write_text(json.dumps(changed(json.loads(original), path, value)))
        with pytest.raises(CheckpointError, match=expected):
            use(model)
    finally:
        (model / name).write_text(original)


TEXT, VISION = ("vlm_config", "text_config"), ("vlm_config", "vision_config")
EXPERT = ("expert_config", "llm_config")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ((), [], "config.json holds a list; expected a JSON object"),
        (("vlm_config",), None, r"config.json: vlm_config: .*, not None"),
        (("vlm_config",), ..., r"config.json: vlm_config is missing"),
        (("expert_config",), [1], r"config.json: expert_config: .*, not \[1\]"),
        (EXPERT, "x", r"expert_config.llm_config: .*, not 'x'"),
        (("traj_ids",), None, r"config.json: traj_ids: .*, not None"),
        (("traj_ids", "history_id0"), 10**30, r"config.json: traj_ids.history_id0: .* less than 1048576"),
        (("traj_ids", "history_id0"), -1, r"traj_ids.history_id0: .* greater than or equal to 0"),
        (("traj_ids", "future_pad"), 7, r"<\|traj_future\|> is \d+, config.json says 7"),
        (("history_vocab_size",), 2**40, "history_vocab_size: "),
        (("tokens_per_history_traj",), "45", "tokens_per_history_traj: .* integer, not '45'"),
        (("hist_traj_tokenizer_cfg", "num_bins"), 10**18, "hist_traj_tokenizer_cfg.num_bins: "),
        (("hist_traj_tokenizer_cfg", "ego_xyz_min"), [4, 4, 4], "hist_traj_tokenizer_cfg has ego_xyz_min"),
        (("max_pixels",), 10**18, "config.json: max_pixels: "),
        (("include_camera_ids",), "yes", "include_camera_ids: .*, not 'yes'"),
        ((*TEXT, "hidden_size"), None, r"config.json: vlm_config.*hidden_size"),
        ((*TEXT, "hidden_size"), 10**12, r"vlm_config.*hidden_size"),
        ((*TEXT, "num_hidden_layers"), 10**9, r"vlm_config.*num_hidden_layers: .* 1024"),
        ((*TEXT, "rope_theta"), 10**30, r"config.json: vlm_config: text_config.rope_theta: .* 1000000000000000"),
        ((*TEXT, "eos_token_id"), 1000, r"vlm_config: text_config.eos_token_id is 1000; .*<\|im_end\|> is \d+\.$"),
        ((*TEXT, "eos_token_id"), [1, 2], r"vlm_config.text_config.eos_token_id: .*, not \[1, 2\]"),
        ((*VISION, "patch_size"), 10**9, r"vlm_config.*vision_config\.patch_size: .* 256"),
        ((*VISION, "deepstack_visual_indexes"), [10**9], r"vlm_config.*deepstack_visual_indexes"),
        (("vlm_config", "image_token_id"), 5, r"vlm_config: image_token_id is 5; .*<\|image_pad\|> is \d+\.$"),
        ((*EXPERT, "hidden_size"), "x", "expert_config.llm_config.*hidden_size"),
        ((*EXPERT, "hidden_size"), 2**20, "tensors"),
        ((*EXPERT, "num_hidden_layers"), 10**9, "expert_config.llm_config: num_hidden_layers is 1000000000; .* has 4"),
        ((*EXPERT, "rope_theta"), 10**30, "expert_config.llm_config: rope_theta: .* 1000000000000000"),
        ((*EXPERT, "rope_scaling"), 3, "expert_config.llm_config: rope_scaling: .*, not 3"),
        (("expert_config", "action_space_cfg", "accel_std"), 0, "expert_config.action_space_cfg.accel_std: "),
        (("expert_config", "action_space_cfg", "n_waypoints"), 10**9, "action_space_cfg.n_waypoints: .* 1024"),
        (
            ("expert_config", "action_space_cfg", "n_waypoints"),
            63,
            "action_space_cfg.n_waypoints: it is 63",
        ),
        (("expert_config", "action_space_cfg", "dt"), 0.2, "expert_config.action_space_cfg.dt: it is 0.2"),
        (("min_pixels",), 2**17, "config.json: max_pixels is 32768, below min_pixels, 131072"),
        (
            ("expert_config", "diffusion_cfg", "use_classifier_free_guidance"),
            True,
            "config.json: expert_config.diffusion_cfg.use_classifier_free_guidance: expected False, not True",
        ),
        (("expert_config", "action_in_proj_cfg"), None, "expert_config.action_in_proj_cfg: .*, not None"),
        (("expert_config", "diffusion_cfg", "int_method"), "heun", "diffusion_cfg.int_method: expected 'euler'"),
        (("expert_config", "expert_non_causal_attention"), False, "expert_non_causal_attention: expected True"),
    ],
)
def test_file_and_key_of_a_nested_config_are_named(path, value, expected, super_model):
    check_refusal(super_model, "config.json", path, value, expected)


def test_absurd_sizes_of_a_nested_config_allocate_nothing(super_model):
    """Within the schema each, but larger than the weights."""
    original = (super_model / "config.json").read_text()
    document = json.loads(original)
    for path in (TEXT, EXPERT):
        for size in ("hidden_size", "intermediate_size"):
            document = changed(document, (*path, size), 2**20)
    tracemalloc.start()
    try:
        (super_model / "config.json").write_text(json.dumps(document))
        for load in (load_vlm, load_expert):
            assert f"does not fit {super_model / 'config.json'}" in refused(load, str(super_model))
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
        (super_model / "config.json").write_text(original)


@pytest.mark.system
@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        ("pre_tokenizer", {"Regex": r"(a+)+(.*)*$b|(.+)+\z@"}, "pre_tokenizer or model fails over a prompt"),
        ("pre_tokenizer", {"Regex": r"\p{N}{1,3}"}, None),
        ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "x"}, "pre_tokenizer or model fails over a prompt"),
        ("model", {"type": "BPE", "vocab": {}, "merges": [["q", "z"]]}, "is not a tokenizer file"),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 2_000_000},
            "is not done with",
        ),
    ],
)
def test_a_tokenizer_that_costs_too_much_or_fails_is_refused(part, value, expected, model, monkeypatch):
    monkeypatch.setattr("alpacache.alpamayo.inputs._TRIAL_SECONDS", 2)
    file = model / "vlm/tokenizer.json"
    original = file.read_text()
    if part == "pre_tokenizer":
        value = {"type": "Split", "pattern": value, "behavior": "Isolated", "invert": False}
    try:
        file.write_text(json.dumps({**json.loads(original), part: value}))
        found = refused(InputBuilder, Checkpoint(str(model)))
        assert found is None if expected is None else f"{file}" in found and expected in found
    finally:
        file.write_text(original)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("r1", name) for name in ("config.json", "vlm/config.json", "vlm/tokenizer.json", INDEX, "shard")),
        *(("2", name) for name in ("config.json", "tokenizer.json", "preprocessor_config.json", INDEX, "shard")),
    ],
)
@pytest.mark.parametrize("content", ["pointer", "FIFO", "empty", "directory"])
def test_what_lies_in_a_files_place_is_named(content, family, name, model, super_model, tmp_path):
    model = {"r1": model, "2": super_model}[family]
    copy = shutil.copytree(model, tmp_path / "copy")
    file = next(copy.glob("*.safetensors")) if name == "shard" else copy / name
    file.unlink()
    match content:
        case "pointer":
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4011576\n")
        case "FIFO":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "empty":
            file.touch()
    found = refused(use, copy)
    assert str(file) in found or file.name in found
    if content == "pointer":
        assert f"{file} is a git-lfs pointer in place of the file; run `git lfs pull`" in found


@pytest.mark.system
def test_a_million_entries_are_not_a_million_errors(tmp_path):
    entries = b",".join(b'"%x":{}' % number for number in range(200_000))
    file = shard(tmp_path / "x.safetensors", b"{" + entries + b"}")
    tracemalloc.start()
    try:
        assert "an object of 200000 keys, expected at most 100000" in refused(read_header, file)
        assert tracemalloc.get_traced_memory()[1] < 40 * file.stat().st_size
    finally:
        tracemalloc.stop()


def test_deeply_nested_json_is_no_traceback(model):
    original = (model / "config.json").read_text()
    try:
        (model / "config.json").write_text("[" * 100_000)
        assert "is not valid JSON" in refused(use, model)
    finally:
        (model / "config.json").write_text(original)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace(b"{", b'{"model_type": "a", "model_type": "b",', 1), "it has the key 'model_type' "),
        (lambda text: text.replace(b"{", b'{"unread": NaN,', 1), "NaN is no JSON"),
        (lambda text: text.decode().encode("utf-16"), "it is not UTF-8"),
    ],
)
def test_json_that_readers_take_differently_is_refused(model, change, told):
    original = (model / "config.json").read_bytes()
    try:
        (model / "config.json").write_bytes(change(original))
        message = refused(use, model)
        assert "config.json is not valid JSON" in message
        assert told in message
    finally:
        (model / "config.json").write_bytes(original)


def shard(path, header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(4,), data_offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(data_offsets)}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ([], r"holds a list; expected a JSON object\. Fetch it again"),
        (None, "holds null; expected a JSON object"),
        (b"\xff\xff", "is not valid JSON"),
        ({"x": "no"}, r"x\.safetensors: x: .*, not 'no'"),
        (
            {"x": {"dtype": "F32", "shape": [1]}},
            r"x\.data_offsets is missing\. .*; fetch the file again",
        ),
        ({"x": entry(shape="abc")}, r"x\.shape\.0: .* integer, not 'a'"),
        ({"x": entry() | {"shape": "abc"}}, r"x\.shape: .* list, not 'abc'"),
        ({"x": entry(shape=[-4])}, r"x\.shape\.0: .* greater than or equal to 0"),
        ({"x": entry(shape=[2**62, 2**62])}, r"'x' is F32 \[\d+, \d+\] at bytes 0 to 16"),
        ({"x": entry(data_offsets=[-16, 0])}, r"x\.data_offsets\.0: .* greater than or equal to 0"),
        ({"x": entry(data_offsets=[16, 0])}, "damaged header"),
        ({"x": entry(data_offsets=[0, 16, 32])}, r"x\.data_offsets: .* at most 2 items"),
        ({"x": entry(), "y": entry(data_offsets=[8, 24])}, "'y' is F32 .* at bytes 8 to 24, after .* ends at 16"),
        ({"x": entry(), "y": entry(data_offsets=[20, 36])}, "'y' is F32 .* at bytes 20 to 36, after .* ends at 16"),
        ({"x": entry(shape=[100], data_offsets=[0, 400])}, "is truncated: 'x' ends at byte"),
        ({"__metadata__": {"format": 3}, "x": entry()}, r"__metadata__\.format: .* string, not 3"),
        ({"x": entry()}, r"damaged header: its tensors end at byte \d+ of"),
        ({"x": entry(dtype="F99")}, "unknown dtype 'F99'"),
    ],
)
def test_a_damaged_header_is_named(header, expected, tmp_path):
    with pytest.raises(CheckpointError, match=expected):
        read_header(shard(tmp_path / "x.safetensors", header))


@pytest.mark.system
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=VALUES | st.just(...))
def test_any_value_anywhere_in_a_header(tmp_path, data, value):
    """What is let through is what the format's own reader takes as well."""
    good = {"__metadata__": {"format": "pt"}, "x": entry(), "y": entry("BF16", (2, 3), (16, 28))}
    path = data.draw(st.sampled_from(list(paths(good))[value is ... :]))
    file = shard(tmp_path / "x.safetensors", changed(good, path, value), data=b"\0" * 28)
    if refused(read_header, file) is None:
        tensors = read_header(file)
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == set(tensors)
        assert all(info.offset + info.nbytes <= file.stat().st_size for info in tensors.values())


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_allocates_nothing(length, tmp_path):
    file = shard(tmp_path / "x.safetensors", {"x": entry()}, length=length)
    tracemalloc.start()
    try:
        assert "is not a safetensors file, or it is truncated" in refused(read_header, file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_absurd_sizes_are_refused_before_anything_is_allocated(model, monkeypatch):
    """Within the schema, but larger than the weights: the module is never built with memory."""
    from alpacache.alpamayo import backbone

    original, devices = (model / "vlm/config.json").read_text(), []
    good = backbone.empty_weights

    def empty_weights(dtype, device):
        devices.append(device)
        return good(dtype, device)

    monkeypatch.setattr(backbone, "empty_weights", empty_weights)
    document = changed(json.loads(original), ("text_config", "hidden_size"), 2**20)
    document = changed(document, ("text_config", "intermediate_size"), 2**20)
    try:
        (model / "vlm/config.json").write_text(json.dumps(document))
        assert f"does not fit {model / 'config.json'} and {model / 'vlm/config.json'}" in refused(load_vlm, str(model))
        assert devices == [torch.device("meta")]
    finally:
        (model / "vlm/config.json").write_text(original)


def test_what_transformers_raises_is_told_without_the_names_of_exceptions():
    for error, told in (
        (RuntimeError("StrictFieldError: field 'a':\n TypeError: expected int"), "field 'a': expected int"),
        (KeyError("gelux"), "'gelux' is not known"),
    ):
        text = rf"^config\.json does not .* be built \({told}\)\.$"
        with pytest.raises(CheckpointError, match=text), refusing("config.json"):
            raise error
