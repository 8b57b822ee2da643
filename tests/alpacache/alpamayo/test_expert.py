"""The action expert against the public code's golden output, and what batches must not change."""

import pytest
import torch
from plain_rollouts import rollouts

from alpacache import flow_matching
from alpacache.alpamayo import load_expert

PARITY = 1e-4


@pytest.mark.parametrize("clip", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_velocity_equals_golden(clip, causal, golden, golden_expert, golden_prefixes, relative_error):
    case = f"clip{clip}."
    velocity = golden_expert.velocity(
        golden[case + "noisy_action"][None], golden[case + "t"][None], [golden_prefixes[clip]], causal=causal
    )
    assert relative_error(velocity[0], golden[case + ("velocity_causal" if causal else "velocity")]) <= PARITY


@pytest.mark.parametrize("clip", [0, 1, 2])
def test_loss_equals_golden(clip, golden, golden_expert, golden_prefixes):
    case = f"clip{clip}."
    velocity = golden_expert.velocity(
        golden[case + "noisy_action"][None], golden[case + "t"][None], [golden_prefixes[clip]]
    )
    loss = flow_matching.loss(velocity[0], golden[case + "action"], golden[case + "noise"]).mean()
    assert loss.item() == pytest.approx(float(golden[case + "loss"]), rel=PARITY)


@pytest.mark.parametrize("clip", [0, 1, 2])
def test_sampled_actions_and_paths_equal_golden(clip, golden, golden_expert, golden_prefixes, relative_error):
    case = f"clip{clip}."
    batch = golden_expert.batch([golden_prefixes[clip]])
    action = flow_matching.sample(
        lambda x, t: golden_expert.velocity(x[None], t[None], batch)[0], golden[case + "initial_noise"]
    )
    assert relative_error(action, golden[case + "sampled_action"]) <= PARITY
    space = golden_expert.action_space
    xyz, rot = space.to_path(action, golden[case + "ego_history_xyz"], golden[case + "ego_history_rot"])
    assert relative_error(xyz, golden[case + "pred_xyz"]) <= PARITY
    assert relative_error(rot, golden[case + "pred_rot"]) <= PARITY


@pytest.mark.parametrize("case", ["rollout_mixed", "rollout_early"])
def test_reasoning_rollouts_equal_golden(case, golden, golden_vlm, golden_expert, relative_error):
    names = ("input_ids_fused", "pixel_values", "image_grid_thw", "sequences")
    prefixes = rollouts(golden_vlm, *(golden[f"{case}.{name}"] for name in names))
    noise = golden[f"{case}.initial_noise"]
    batch = golden_expert.batch(prefixes)

    def velocity(x, t):
        return golden_expert.velocity(x[:, None], t[:, None], batch)[:, 0]

    assert relative_error(velocity(noise, torch.zeros(6)), golden[f"{case}.first_velocity"]) <= PARITY
    action = flow_matching.sample(velocity, noise)
    assert relative_error(action, golden[f"{case}.sampled_action"]) <= PARITY
    xyz, _ = golden_expert.action_space.to_path(
        action, golden[f"{case}.ego_history_xyz"], golden[f"{case}.ego_history_rot"]
    )
    assert relative_error(xyz, golden[f"{case}.pred_xyz"]) <= PARITY


def test_ragged_batch_equals_one_by_one(golden, golden_expert, golden_prefixes, relative_error):
    noisy = torch.stack([golden[f"clip{clip}.noisy_action"] for clip in range(3)])
    t = torch.stack([golden[f"clip{clip}.t"] for clip in range(3)])
    together = golden_expert.velocity(noisy, t, golden_prefixes)
    for row, prefix in enumerate(golden_prefixes):
        alone = golden_expert.velocity(noisy[row : row + 1], t[row : row + 1], [prefix])
        assert relative_error(together[row], alone[0]) <= 1e-5


def test_draws_together_equal_one_by_one(golden, golden_expert, golden_prefixes, relative_error):
    noisy, t = golden["clip2.noisy_action"][None], golden["clip2.t"][None]
    together = golden_expert.velocity(noisy, t, [golden_prefixes[2]])
    for draw in range(noisy.shape[1]):
        alone = golden_expert.velocity(noisy[:, draw : draw + 1], t[:, draw : draw + 1], [golden_prefixes[2]])
        assert relative_error(together[:, draw], alone[:, 0]) <= 1e-5


def test_padding_gets_no_attention_and_no_gradient(golden, golden_expert, golden_prefixes):
    noisy, t = golden["clip0.noisy_action"][None], golden["clip0.t"][None]
    batch = golden_expert.batch([golden_prefixes[0], golden_prefixes[2]])
    noisy, t = noisy.expand(2, -1, -1, -1), t.expand(2, -1)
    before = golden_expert.velocity(noisy, t, batch)
    batch.data[0, batch.layout.size_bytes(golden_prefixes[0].prefix_len) :] = 255
    assert torch.equal(golden_expert.velocity(noisy, t, batch), before)


def test_velocity_refuses_shapes_that_disagree(golden_expert, golden_prefixes):
    with pytest.raises(ValueError, match="disagree"):
        golden_expert.velocity(torch.zeros(2, 1, 64, 2), torch.zeros(2, 1), golden_prefixes[:1])


@pytest.mark.parametrize("family", ["r1", "1.5"])
def test_constants_are_rounded_to_the_checkpoints_dtype(family, request):
    directory = request.getfixturevalue("tiny_checkpoint" if family == "r1" else "tiny_checkpoint_15")
    expert = load_expert(str(directory), dtype=torch.float32)
    freqs = [1, 1.671875, 2.78125, 4.65625, 7.75, 12.9375, 21.5, 36, 60, 100]
    assert expert.action_in_proj.sinus[0].freqs.tolist() == [freqs]
    space = expert.action_space
    assert (space.accel_mean, space.accel_std) == (0.029052734375, 0.6796875)
    assert (space.curvature_mean, space.curvature_std) == (0.0002689361572265625, 0.026123046875)
    stored = "action_in_proj.sinus.0.freqs" in expert.state_dict()
    assert stored == (family == "r1")


def test_no_embedding_table_is_built(golden_expert):
    assert not any("embed_tokens" in name for name, _ in golden_expert.named_parameters())
