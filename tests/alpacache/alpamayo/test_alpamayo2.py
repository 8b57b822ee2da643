"""Alpamayo 2 Super against the public code's golden output: a whole tiny checkpoint in the released layout."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_rollouts import extend, replay, rollouts
from safetensors.torch import load_file

from alpacache import flow_matching
from alpacache.alpamayo import Checkpoint, load_expert, load_vlm
from alpacache.alpamayo.families import FAMILIES
from alpacache.alpamayo.inputs import InputBuilder, to_patches
from alpacache.alpamayo.rollout import RolloutSampler, pick
from alpacache.cached_samples.identity import model_identity, vlm_identity
from alpacache.driving.cameras import CAMERAS
from alpacache.errors import CheckpointError

PARITY, LABELS = 1e-4, 3e-4
CLIPS, ROLLOUTS = (0, 1, 2), ("rollout_mixed", "rollout_early")
INPUTS = ("input_ids_fused", "pixel_values", "image_grid_thw")


@pytest.fixture(scope="module")
def golden(golden_dir_2):
    return load_file(golden_dir_2 / "cases.safetensors")


@pytest.fixture(scope="module")
def cases(golden_dir_2):
    return json.loads((golden_dir_2 / "cases.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(golden_dir_2):
    return Checkpoint(str(golden_dir_2))


@pytest.fixture(scope="module")
def builder(checkpoint):
    return InputBuilder(checkpoint)


@pytest.fixture(scope="module")
def vlm(golden_dir_2):
    return load_vlm(str(golden_dir_2))


@pytest.fixture(scope="module")
def expert(golden_dir_2):
    return load_expert(str(golden_dir_2)).eval()


@pytest.fixture(scope="module")
def prefixes(golden, vlm):
    return [vlm.prefill(*(golden[f"clip{clip}.{name}"] for name in INPUTS)) for clip in CLIPS]


@pytest.fixture(scope="module")
def sampler(checkpoint, vlm, builder):
    return RolloutSampler.load(checkpoint, vlm, builder)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(
    ("name", "reasoning", "routed"),
    [
        ("recipe_eval", "none", False),
        ("trajectory_nav", "none", True),
        ("reasoning", "rollout", False),
        ("reasoning_nav", "rollout", True),
    ],
)
def test_prompts_and_ids_equal_golden(clip, name, reasoning, routed, golden, cases, builder):
    prompts, case = cases["prompts"][f"clip{clip}"], cases["cases"][clip]
    cameras = [CAMERAS[index] for index in case["cameras"]]
    route = prompts["nav_text"] if routed else None
    rows = [[1] * case["frames"]] * len(cameras)
    text = builder.format.render(rows, cameras=cameras, reasoning=reasoning, route=route)
    assert text == prompts[name]
    height, width = golden[f"clip{clip}.image_frames"].shape[-2:]
    other = InputBuilder(builder._checkpoint, reasoning=reasoning)
    _, ids, _ = other.prompt(cameras, frames=case["frames"], height=height, width=width, route=route)
    assert np.array_equal(ids, golden[f"clip{clip}.ids_{name}"].numpy())


@pytest.mark.parametrize("clip", CLIPS)
def test_all_cameras_are_named_as_in_the_recipe(clip, cases, builder):
    frames = cases["cases"][clip]["frames"]
    text = builder.format.render([[1] * frames] * 7, cameras=CAMERAS)
    assert cases["prompts"][f"clip{clip}"]["recipe_train_7_cameras"].startswith(text)


@pytest.mark.parametrize("clip", CLIPS)
def test_history_tokens_and_pixels_equal_golden(clip, golden, cases, builder, checkpoint):
    ids, history = golden[f"clip{clip}.input_ids"].numpy(), golden[f"clip{clip}.ego_history_xyz"].numpy()
    fused = builder.tokenizer.fuse_history(ids, history)
    length = cases["cases"][clip]["prefix_len"]  # future tokens may follow
    assert np.array_equal(fused[:length], golden[f"clip{clip}.input_ids_fused"][:length].numpy())
    assert checkpoint.config.history.encode(history).shape == (45,)
    frames = golden[f"clip{clip}.image_frames"].flatten(0, 1).numpy()
    pixels, grid = to_patches(frames, temporal=2, **builder._geometry, **builder._limits)
    assert builder._geometry["patch"] == 8
    assert torch.equal(grid, golden[f"clip{clip}.image_grid_thw"])
    assert float((pixels - golden[f"clip{clip}.pixel_values"]).abs().max()) <= 1e-6


@pytest.mark.parametrize("clip", CLIPS)
def test_prefill_equals_golden(clip, golden, cases, prefixes, vlm, relative_error):
    prefix, case = prefixes[clip], cases["cases"][clip]
    found = (prefix.prefix_len, prefix.rope_delta, prefix.start_position)
    assert found == (case["prefix_len"], case["rope_delta"], case["start_position"])
    for name in ("keys", "values", "hidden"):
        assert relative_error(getattr(prefix, name), golden[f"clip{clip}.{name}"]) <= PARITY
    ids, grid = golden[f"clip{clip}.input_ids_fused"], golden[f"clip{clip}.image_grid_thw"]
    positions, _ = vlm._positions(ids[: prefix.prefix_len], grid)
    assert torch.equal(positions, golden[f"clip{clip}.mrope_position_ids"][:, : prefix.prefix_len])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("mask", "causal"), [("velocity", False), ("velocity_causal", True), ("velocity_train", True)])
def test_velocity_and_loss_equal_golden(clip, mask, causal, golden, expert, prefixes, relative_error):
    case = f"clip{clip}."
    noisy, t = golden[case + "noisy_action"][None], golden[case + "t"][None]
    velocity = expert.velocity(noisy, t, [prefixes[clip]], causal=causal)[0]
    assert relative_error(velocity, golden[case + mask]) <= PARITY
    told = {"velocity": "loss", "velocity_train": "loss_train"}.get(mask)
    if told is not None:
        loss = flow_matching.loss(velocity, golden[case + "action"], golden[case + "noise"], rounds_target=False)
        assert loss.mean().item() == pytest.approx(float(golden[case + told]), rel=PARITY)


def test_the_official_padded_step_equals_unpadded_rows(golden, expert, prefixes, relative_error):
    noise, t = golden["padded_batch.noise"], golden["padded_batch.t"]
    action = torch.stack([golden["clip0.action"], golden["clip1.action"]])
    noisy = flow_matching.interpolate(action, noise, t)
    velocity = expert.velocity(noisy[:, None], t[:, None], prefixes[:2], causal=True)[:, 0]
    assert relative_error(velocity, golden["padded_batch.velocity_train"]) <= PARITY
    loss = flow_matching.loss(velocity, action, noise, rounds_target=False).mean()
    assert loss.item() == pytest.approx(float(golden["padded_batch.loss_train"]), rel=PARITY)
    starts = [prefix.start_position for prefix in prefixes[:2]]
    assert starts == golden["padded_batch.start_position"].tolist()


def test_ragged_batch_equals_one_by_one(golden, expert, prefixes, relative_error):
    noisy = torch.stack([golden[f"clip{clip}.noisy_action"] for clip in CLIPS])
    t = torch.stack([golden[f"clip{clip}.t"] for clip in CLIPS])
    together = expert.velocity(noisy, t, prefixes)
    for row, prefix in enumerate(prefixes):
        alone = expert.velocity(noisy[row : row + 1], t[row : row + 1], [prefix])
        assert relative_error(together[row], alone[0]) <= 1e-5


@pytest.mark.parametrize("clip", CLIPS)
def test_sampled_actions_and_paths_equal_golden(clip, golden, expert, prefixes, relative_error):
    case, batch = f"clip{clip}.", expert.batch([prefixes[clip]])

    def velocity(x, t):
        return expert.velocity(x[None], t[None], batch)[0]

    noise = golden[case + "initial_noise"]
    assert relative_error(velocity(noise, torch.zeros(6)), golden[case + "first_velocity"]) <= PARITY
    action = flow_matching.sample(velocity, noise)
    assert relative_error(action, golden[case + "sampled_action"]) <= PARITY
    poses = (golden[case + "ego_history_xyz"], golden[case + "ego_history_rot"])
    xyz, rot = expert.action_space.to_path(action, *poses)
    assert relative_error(xyz, golden[case + "pred_xyz"]) <= PARITY
    assert relative_error(rot, golden[case + "pred_rot"]) <= PARITY


@pytest.mark.parametrize("case", ROLLOUTS)
def test_rollouts_equal_golden(case, golden, cases, sampler, vlm, expert, checkpoint, relative_error):
    """Tails on one stem: start positions, velocity, actions and paths; the text begins right behind the question."""
    prefix = vlm.prefill(*(golden[f"{case}.{name}"] for name in INPUTS))
    stem = int((golden[f"{case}.input_ids"] == checkpoint.config.traj_token_ids["history_end"]).nonzero()[0, 0]) + 1
    assert np.array_equal(sampler.question, golden[f"{case}.input_ids"][stem:].numpy())
    tails = replay(sampler, prefix, stem, golden[f"{case}.sequences"][:, prefix.prefix_len :])
    rows = [prefix.with_tail(stem, tail) for tail in tails]
    assert [row.start_position for row in rows] == golden[f"{case}.start_position"].tolist()
    assert [row.prefix_len for row in rows] == golden[f"{case}.visible"].tolist()
    alone = rollouts(vlm, *(golden[f"{case}.{name}"] for name in (*INPUTS, "sequences")))
    for row, expected in zip(rows, alone, strict=True):
        assert relative_error(row.keys, expected.keys) <= 1e-5
    batch, noise = expert.batch(rows), golden[f"{case}.initial_noise"]

    def velocity(x, t):
        return expert.velocity(x[:, None], t[:, None], batch)[:, 0]

    assert relative_error(velocity(noise, torch.zeros(6)), golden[f"{case}.first_velocity"]) <= PARITY
    action = flow_matching.sample(velocity, noise)
    assert relative_error(action, golden[f"{case}.sampled_action"]) <= PARITY
    poses = (golden[f"{case}.ego_history_xyz"], golden[f"{case}.ego_history_rot"])
    assert relative_error(expert.action_space.to_path(action, *poses)[0], golden[f"{case}.pred_xyz"]) <= PARITY


def test_guidance_equals_golden(golden, vlm, expert, relative_error):
    """The same text behind the prompt with and without the route, each with a start position of its own."""
    pictures = (golden["clip1.pixel_values"], golden["clip1.image_grid_thw"])
    text = golden["cfg.generated"].tolist()
    text = text[: text.index(vlm.future_start_id) + 1]
    both = [
        extend(vlm, vlm.prefill(golden[f"cfg.{kind}_ids_fused"], *pictures), text) for kind in ("guided", "unguided")
    ]
    assert [one.start_position for one in both] == [int(golden[f"cfg.{kind}_start"]) for kind in ("guided", "unguided")]
    weight, noise = float(golden["cfg.weight"]), golden["cfg.initial_noise"]
    batches = [expert.batch([one]) for one in both]

    def velocities(x, t):
        return [expert.velocity(x[None], t[None], batch)[0] for batch in batches]

    for found, kind in zip(velocities(noise, torch.zeros(1)), ("guided", "unguided"), strict=True):
        assert relative_error(found, golden[f"cfg.first_velocity_{kind}"]) <= PARITY
    action = flow_matching.sample(lambda x, t: flow_matching.guided(*velocities(x, t), weight), noise)
    assert relative_error(action, golden["cfg.sampled_action"]) <= PARITY
    poses = (golden["clip1.ego_history_xyz"], golden["clip1.ego_history_rot"])
    assert relative_error(expert.action_space.to_path(action, *poses)[0], golden["cfg.pred_xyz"]) <= PARITY


def test_a_text_never_ends_the_turn(golden, cases, sampler, checkpoint, vlm, relative_error):
    """Without the mask `<|im_end|>` would be the likeliest token of the golden prompt."""
    masked, end = cases["masked_ids"], cases["masked_ids"]["text_end"]
    first, count = masked["trajectory"]
    assert checkpoint.config.never_sampled == (range(first, first + count), range(end, end + 1))
    logits = golden["rollout_mixed.next_logits"]
    assert int(logits.argmax()) == end
    prefix = vlm.prefill(*(golden[f"rollout_mixed.{name}"] for name in INPUTS))
    lifted = [end, cases["masked_ids"]["stop"]]  # by the golden run, to have texts end and the mask matter
    plain = (prefix.hidden[-1] @ sampler.head.T).index_copy(0, torch.tensor(lifted), logits[lifted])
    assert relative_error(plain, logits) <= PARITY
    kept = golden["rollout_mixed.next_logits_masked"] > -1e30
    assert (~kept).nonzero()[:, 0].tolist() == sorted(token for never in sampler.masked for token in never)
    drawn = pick(logits.expand(1000, -1), (torch.arange(1000) + 0.5) / 1000, masked=sampler.masked)
    assert bool(kept[drawn].all())
    assert int(drawn.mode().values) == int(golden["rollout_mixed.next_logits_masked"].argmax())


def test_labels_equal_golden(golden, cases, expert):
    space = expert.action_space
    for name in cases["actions2"]["cases"]:
        case = f"actions2.{name}."
        poses = [
            golden[case + part] for part in ("ego_history_xyz", "ego_history_rot", "ego_future_xyz", "ego_future_rot")
        ]
        for bounds, key in (((-0.33, 0.33), "action"), ((-0.2, 0.2), "action_bounds_02")):
            if case + key in golden:
                action = replace(space, curvature_bounds=bounds).to_action(*poses)
                assert float((action - golden[case + key]).abs().max()) <= LABELS, (name, key)
    for clip in CLIPS:
        case = f"clip{clip}."
        poses = [golden[case + part] for part in ("ego_history_xyz", "ego_history_rot")]
        action = space.to_action(*poses, golden[case + "ego_future_xyz"], golden[case + "ego_future_rot"])
        assert float((action - golden[case + "action"]).abs().max()) <= LABELS


def test_constants_are_rounded_to_the_files_dtype(golden, golden_dir_2, copied_checkpoint_2):
    """None are in the weights: those of a bfloat16 checkpoint are what bfloat16 holds of the config's."""
    config = json.loads((copied_checkpoint_2 / "config.json").read_text())
    (copied_checkpoint_2 / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    expert = load_expert(str(copied_checkpoint_2), dtype=torch.float32)
    space = expert.action_space
    found = torch.tensor([space.accel_mean, space.accel_std, space.curvature_mean, space.curvature_std])
    assert torch.equal(found, golden["bf16.action_space"])
    for fourier in (*expert.action_in_proj.sinus, expert.action_in_proj.timestep_fourier_encoder):
        assert torch.equal(fourier.freqs[0], golden["bf16.freqs"])
    assert not any(name.endswith("freqs") for name in expert.state_dict())


def test_the_velocity_to_learn_is_not_rounded(expert):
    assert not expert.rounds_target
    velocity, action = torch.zeros(1, 64, 2, dtype=torch.bfloat16), torch.full((1, 64, 2), 1 / 3)
    exact = flow_matching.loss(velocity, action, torch.zeros(1, 64, 2), rounds_target=False)
    rounded = flow_matching.loss(velocity, action, torch.zeros(1, 64, 2))
    assert exact.item() == pytest.approx(1 / 9, rel=1e-6)
    assert rounded.item() != pytest.approx(1 / 9, rel=1e-4)


def test_names_in_the_files_have_one_more_expert(checkpoint, golden_dir_2):
    stored = load_file(golden_dir_2 / "model.safetensors")
    assert {checkpoint.stored_name(name) for name in checkpoint.names} == stored.keys()
    assert "expert.layers.0.mlp.up_proj.weight" in checkpoint.names
    assert checkpoint.stored_name("expert.norm.weight") == "expert.expert.norm.weight"
    assert checkpoint.stored_name("action_out_proj.bias") == "expert.action_out_proj.bias"
    ((name, tensor),) = checkpoint.read({"action_out_proj.bias": "model.safetensors"})
    assert name == "action_out_proj.bias"
    assert torch.equal(tensor, stored["expert.action_out_proj.bias"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "alpamayo2_edge"}, "model_type is 'alpamayo2_edge'.*supported: .*alpamayo2_super"),
        ({"vlm_class": "Qwen3_5ForConditionalGeneration"}, "vlm_class: expected 'Qwen3VLForConditionalGeneration'"),
        ({"token_layout": "ts_camera"}, "token_layout: expected 'camera_ts'"),
        ({"frame_label": "dt_token", "include_frame_nums": None}, "frame_label: expected 'frame_num' or 'none'"),
        ({"logit_cap": 30}, "logit_cap: expected 0"),
        ({"enable_expert": False}, "enable_expert: expected True"),
        ({"tokens_per_history_traj": 48}, "tokens_per_history_traj is 48; .* gives 45"),
        ({"history_vocab_size": 23}, "history_vocab_size and future_vocab_size are 23 and 60"),
        ({"traj_ids": {"future_id0": 389}}, "future_id0 is 389; history_id0 364 .* put it at 388"),
        ({"hist_traj_tokenizer_cfg": {"predict_yaw": True}}, "predict_yaw: expected False"),
        ({"expert_config": {"llm_config": {"num_hidden_layers": 3}}}, "num_hidden_layers is 3; the VLM, .* has 4"),
        ({"vlm_config": {"model_type": "qwen3_5"}}, "vlm_config: model_type is 'qwen3_5'"),
        ({"vlm_config": {"text_config": {"vocab_size": 400}}}, "vocab_size is 400; traj_ids take tokens up to 464"),
    ],
)
def test_what_no_public_code_describes_is_refused(changes, message, copied_checkpoint_2):
    place = copied_checkpoint_2 / "config.json"
    place.write_text(json.dumps(merged(json.loads(place.read_text()), changes)))
    with pytest.raises(CheckpointError, match=message):
        load_expert(str(copied_checkpoint_2))


def merged(value, changes):
    """A JSON object with some keys changed, at any depth."""
    return value | {key: merged(value[key], part) if isinstance(part, dict) else part for key, part in changes.items()}


def test_a_history_from_the_origin_has_48_tokens(copied_checkpoint_2):
    place = copied_checkpoint_2 / "config.json"
    changes = {"hist_traj_tokenizer_cfg": {"pad_origin_at_beginning": True}, "tokens_per_history_traj": 48}
    place.write_text(json.dumps(merged(json.loads(place.read_text()), changes)))
    builder = InputBuilder(Checkpoint(str(copied_checkpoint_2)))
    text, ids, _ = builder.prompt([CAMERAS[1]], frames=1, height=70, width=100)
    assert text.count("<|traj_history|>") == 48
    fused = builder.tokenizer.fuse_history(ids, np.zeros((16, 3), np.float32))
    assert (fused == 364 + 12).sum() == 48  # 11.5 rounds to 12


def test_the_prompt_is_what_the_config_says(copied_checkpoint_2):
    place = copied_checkpoint_2 / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"include_camera_ids": False, "frame_label": "none"}))
    found = InputBuilder(Checkpoint(str(copied_checkpoint_2))).format
    assert (found.camera_names, found.frame_numbers) == (False, False)
    assert FAMILIES["2"].prompt.camera_names


def test_building_models_leaves_the_config_as_it_was(checkpoint, golden_dir_2):
    """transformers writes into the dictionaries that it is given; the config's hash names stores and runs."""
    vlm_identity(checkpoint)
    assert model_identity(checkpoint) == model_identity(Checkpoint(str(golden_dir_2)))
    assert checkpoint.config.raw == json.loads((golden_dir_2 / "config.json").read_text())
