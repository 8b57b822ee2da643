"""Reasoning rollouts: the golden ones exactly, and of the sampled ones what a sampler must keep to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_rollouts import extend, replay, rollouts
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from alpacache import flow_matching, randomness
from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import MAX_TOKENS, TEMPERATURE, TOP_P, RolloutSampler, load_head, pick
from alpacache.alpamayo.text_layers import LayerKV
from alpacache.driving.sample import SampleRef
from alpacache.errors import CheckpointError
from alpacache.sources.registry import open_source

PARITY = 1e-4
CASES = ["rollout_mixed", "rollout_early"]


@pytest.fixture(scope="module")
def golden_sampler(golden, golden_cases, golden_dir, golden_vlm):
    """The golden checkpoint has no tokenizer: the question comes from the case, which is the same in both."""
    words = {token: word for word, token in golden_cases["vocab"].items()}
    ids = golden["rollout_mixed.input_ids_fused"].numpy()
    config = Checkpoint(str(golden_dir)).config
    return RolloutSampler(
        golden_vlm,
        load_head(Checkpoint(str(golden_dir)), golden_vlm),
        question=ids[stem_length(ids, config) :],
        masked=config.never_sampled,
        decode=lambda tokens: " ".join(words[token] for token in tokens.tolist()),
    )


def stem_length(ids, config):
    return int(np.flatnonzero(ids == config.traj_token_ids["history_end"])[0]) + 1


@pytest.fixture(scope="module")
def golden_stems(golden, golden_dir, golden_vlm):
    """The prompt's prefix and the stem's length of each case."""
    config, names = Checkpoint(str(golden_dir)).config, ("input_ids_fused", "pixel_values", "image_grid_thw")
    return {
        case: (
            golden_vlm.prefill(*(golden[f"{case}.{name}"] for name in names)),
            stem_length(golden[f"{case}.input_ids_fused"].numpy(), config),
        )
        for case in CASES
    }


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    """Sampler in float32, prefix and stem length of a sample of the complete tiny checkpoint."""
    checkpoint = Checkpoint(str(tiny_checkpoint))
    vlm, builder = load_vlm(checkpoint, dtype=torch.float32), InputBuilder(checkpoint)
    source = open_source("synthetic:1")
    ref = SampleRef(clip_id=source.clip_ids[0], t0_us=5_100_000)
    inputs = builder.build(source.load(ref, cameras=source.cameras, frames=1))
    prefix = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
    return RolloutSampler.load(checkpoint, vlm, builder), prefix, inputs.stem_len


@pytest.mark.parametrize("case", CASES)
def test_replayed_rollouts_equal_golden(case, golden, golden_sampler, golden_stems, golden_expert, relative_error):
    """Expert input put together from one stem and the tails: velocity, actions and paths of the public code."""
    prefix, stem_len = golden_stems[case]
    texts = golden[f"{case}.sequences"][:, prefix.prefix_len :]
    tails = replay(golden_sampler, prefix, stem_len, texts)
    batch = golden_expert.batch([prefix.with_tail(stem_len, tail) for tail in tails])

    def velocity(x, t):
        return golden_expert.velocity(x[:, None], t[:, None], batch)[:, 0]

    noise = golden[f"{case}.initial_noise"]
    assert relative_error(velocity(noise, torch.zeros(6)), golden[f"{case}.first_velocity"]) <= PARITY
    action = flow_matching.sample(velocity, noise)
    assert relative_error(action, golden[f"{case}.sampled_action"]) <= PARITY
    xyz, rot = golden_expert.action_space.to_path(
        action, golden[f"{case}.ego_history_xyz"], golden[f"{case}.ego_history_rot"]
    )
    assert relative_error(xyz, golden[f"{case}.pred_xyz"]) <= PARITY
    assert relative_error(rot, golden[f"{case}.pred_rot"]) <= PARITY


@pytest.mark.parametrize("case", CASES)
def test_rollouts_together_equal_each_row_alone(case, golden, golden_vlm, golden_sampler, golden_stems, relative_error):
    """The mask keeps rollouts apart: each tail is what the VLM leaves after that row's tokens and no others."""
    prefix, stem_len = golden_stems[case]
    names = ("input_ids_fused", "pixel_values", "image_grid_thw", "sequences")
    alone = rollouts(golden_vlm, *(golden[f"{case}.{name}"] for name in names))
    tails = replay(golden_sampler, prefix, stem_len, golden[f"{case}.sequences"][:, prefix.prefix_len :])
    for row, tail in zip(alone, tails, strict=True):
        joined = prefix.with_tail(stem_len, tail)
        assert (joined.prefix_len, joined.start_position) == (row.prefix_len, row.start_position)
        assert relative_error(joined.keys, row.keys) <= 1e-5
        assert relative_error(joined.values, row.values) <= 1e-5


def test_a_rollout_ends_with_its_first_end_and_one_that_never_ends_counts_a_token_without_kv(
    golden, golden_sampler, golden_stems, golden_vlm
):
    prefix, stem_len = golden_stems["rollout_mixed"]
    end, question = golden_vlm.future_start_id, len(golden_sampler.question)
    texts = np.full((4, 5), 7)
    texts[1, [1, 3]] = end
    texts[2, 4] = end  # only as the very last token
    texts[3, 0] = end
    tails = replay(golden_sampler, prefix, stem_len, texts)
    assert [len(tail.token_ids) - question for tail in tails] == [5, 2, 5, 1]
    assert [tail.keys.shape[2] - question for tail in tails] == [4, 2, 4, 1]
    start = prefix.rope_delta + stem_len + question
    assert [tail.start_position - start for tail in tails] == [5, 2, 5, 1]
    assert [tail.text for tail in tails[1:]] == [
        "w0 <|traj_future_start|>",
        "w0 w0 w0 w0 <|traj_future_start|>",
        "<|traj_future_start|>",
    ]
    for tail in tails:
        assert np.array_equal(tail.token_ids[:question], golden_sampler.question)


def test_sampling_equals_a_plain_loop_over_the_whole_text(tiny, monkeypatch):
    """Each rollout by itself, all of its text computed anew for each token: the same tokens."""
    monkeypatch.setattr("alpacache.alpamayo.rollout.MAX_TOKENS", 24)
    sampler, prefix, stem_len = tiny
    tails = sampler.sample(prefix, stem_len, rollouts=3, key="plain")
    asked = extend(sampler.vlm, cut(prefix, stem_len), sampler.question)
    for number, tail in enumerate(tails):
        tokens = []
        for draw in torch.rand(24, generator=randomness.generator("rollout", "plain", number)):
            hidden = extend(sampler.vlm, asked, tokens).hidden[-1:]
            tokens.append(int(pick(hidden @ sampler.head.T, draw[None], masked=sampler.masked)))
            if tokens[-1] == sampler.vlm.future_start_id:
                break
        assert tail.token_ids[len(sampler.question) :].tolist() == tokens
    assert len({tail.text for tail in tails}) == 3


def cut(prefix, stem_len):
    return replace(
        prefix,
        keys=prefix.keys[:, :, :stem_len],
        values=prefix.values[:, :, :stem_len],
        hidden=prefix.hidden[:stem_len],
        prefix_len=stem_len,
    )


@pytest.mark.system
def test_a_rollout_depends_on_its_key_and_number_alone(tiny):
    sampler, prefix, stem_len = tiny
    six = sampler.sample(prefix, stem_len, rollouts=6, key="clip@1#0")
    two = sampler.sample(prefix, stem_len, rollouts=2, key="clip@1#0")
    other = sampler.sample(prefix, stem_len, rollouts=2, key="clip@2#0")
    for number in range(2):
        assert np.array_equal(six[number].token_ids, two[number].token_ids)
        assert torch.allclose(six[number].keys, two[number].keys, atol=1e-5)
        assert not np.array_equal(six[number].token_ids, other[number].token_ids)


@pytest.mark.system
def test_no_rollout_has_trajectory_tokens_or_too_many(tiny):
    sampler, prefix, stem_len = tiny
    question = len(sampler.question)
    for tail in sampler.sample(prefix, stem_len, rollouts=6, key="limits"):
        generated = tail.token_ids[question:]
        assert 1 <= len(generated) <= MAX_TOKENS
        assert not set(generated.tolist()) & {token for never in sampler.masked for token in never}
        ends = np.flatnonzero(generated == sampler.vlm.future_start_id)
        assert ends.tolist() in ([], [len(generated) - 1])
        assert ends.size or len(generated) == MAX_TOKENS
        assert tail.keys.shape[2] == question + min(len(generated), MAX_TOKENS - 1)
        assert sampler.decode(generated).replace("\0", "\ufffd") == tail.text


def test_the_question_is_what_the_reasoning_prompt_has_after_the_stem(tiny_checkpoint, tiny_checkpoint_15):
    for directory in (tiny_checkpoint, tiny_checkpoint_15):
        checkpoint, source = Checkpoint(str(directory)), open_source("synthetic:1")
        ref = SampleRef(clip_id=source.clip_ids[0], t0_us=5_100_000)
        sample = source.load(ref, cameras=source.cameras, frames=2)
        direct, reasoning = (InputBuilder(checkpoint, reasoning=kind).build(sample) for kind in ("none", "rollout"))
        stem_len = direct.stem_len
        assert reasoning.stem_len == stem_len
        assert np.array_equal(direct.input_ids[:stem_len], reasoning.input_ids[:stem_len])
        builder = InputBuilder(checkpoint)
        assert np.array_equal(builder.tail_ids("rollout"), reasoning.input_ids[stem_len:])
        assert np.array_equal(builder.tail_ids("none"), direct.input_ids[stem_len:])


def reference(logits, masked):
    """Probabilities after masking and transformers' own warpers, in the public order."""
    scores = logits.float().clone()
    for never in masked:
        scores[:, never.start : never.stop] = -torch.inf
    scores = TopPLogitsWarper(top_p=TOP_P)(None, TemperatureLogitsWarper(TEMPERATURE)(None, scores))
    return scores.softmax(-1)


def test_pick_follows_the_public_distribution():
    """Even steps through the distribution function hit each token as often as its probability says."""
    logits, masked, steps = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2, (range(5, 20),), 100_000
    uniform = (torch.arange(steps) + 0.5) / steps
    tokens = pick(logits.expand(steps, -1), uniform, masked=masked)
    share = torch.bincount(tokens, minlength=40) / steps
    expected = reference(logits, masked)[0]
    assert (share - expected).abs().max() <= 2 / steps
    assert 1 < int((expected > 0).sum()) < 25  # the nucleus leaves some out


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 50.0])
def test_pick_never_leaves_the_nucleus(scale):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(2)) * scale
    allowed, masked = reference(logits, (range(100, 300),)) > 0, (range(100, 300),)
    for uniform in (0.0, 0.3, 1 - 2**-24):
        tokens = pick(logits, torch.full((64,), uniform), masked=masked)
        assert bool(allowed[torch.arange(64), tokens].all())
    assert torch.equal(tokens, logits.index_fill(1, torch.arange(100, 300), -torch.inf).argmax(1))


def test_pick_leaves_bfloat16_logits_as_they_are():
    logits = torch.randn(2, 50).to(torch.bfloat16)
    before = logits.clone()
    pick(logits, torch.tensor([0.1, 0.9]), masked=(range(10),))
    assert torch.equal(logits, before)


@pytest.mark.system
def test_the_stem_is_held_once(tiny, monkeypatch):
    """No more tokens go through the VLM than the question's and the rollouts' own."""
    sampler, prefix, stem_len = tiny
    seen = []
    update = LayerKV.update

    def count(kv, keys, values, *rest, **more):
        assert keys.shape[0] == 1
        seen.append(keys.shape[2])
        return update(kv, keys, values, *rest, **more)

    monkeypatch.setattr(LayerKV, "update", count)
    tails = sampler.sample(prefix, stem_len, rollouts=6, key="once")
    question = len(sampler.question)
    own = question + sum(tail.keys.shape[2] - question for tail in tails)
    assert sum(seen) == own * len(prefix.keys)


def test_a_checkpoint_without_a_head_is_refused(tiny_checkpoint, monkeypatch):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    vlm = load_vlm(checkpoint)
    assert load_head(checkpoint, vlm).dtype == torch.bfloat16
    monkeypatch.setattr(Checkpoint, "with_prefix", lambda *names: {})
    with pytest.raises(CheckpointError, match=r"has no vlm\.lm_head\.weight, which reasoning rollouts need"):
        load_head(checkpoint, vlm)


def test_text_has_no_nul(golden_sampler, golden_stems):
    prefix, stem_len = golden_stems["rollout_mixed"]
    sampler = RolloutSampler(
        golden_sampler.vlm,
        golden_sampler.head,
        question=golden_sampler.question,
        masked=golden_sampler.masked,
        decode=lambda ids: "a\0b",
    )
    assert [tail.text for tail in replay(sampler, prefix, stem_len, [[7, 8]])] == ["a\ufffdb"]
