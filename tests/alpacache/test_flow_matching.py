"""t = 0 is noise, t = 1 is data."""

import pytest
import torch

from alpacache import flow_matching


def test_zero_is_noise_and_one_is_data():
    action, noise = torch.full((1, 64, 2), 3.0), torch.full((1, 64, 2), -1.0)
    assert torch.equal(flow_matching.interpolate(action, noise, torch.zeros(1)), noise)
    assert torch.equal(flow_matching.interpolate(action, noise, torch.ones(1)), action)


def test_loss_is_zero_at_the_true_velocity_and_rounds_the_target():
    action, noise = torch.randn(3, 64, 2), torch.randn(3, 64, 2)
    assert flow_matching.loss(action - noise, action, noise).tolist() == [0.0] * 3
    velocity = (action - noise).bfloat16()
    assert flow_matching.loss(velocity, action, noise).tolist() == [0.0] * 3


def test_euler_sampler_integrates_a_known_field():
    start = torch.randn(4, 64, 2)
    end = flow_matching.sample(lambda x, t: torch.full_like(x, 2.0), start, steps=10)
    assert torch.allclose(end, start + 2.0, atol=1e-5)
    decayed = flow_matching.sample(lambda x, t: -x, start, steps=10)
    assert torch.allclose(decayed, start * 0.9**10, atol=1e-5)


def test_sampler_starts_at_zero_and_never_reaches_one():
    seen = []
    flow_matching.sample(lambda x, t: (seen.append(float(t[0])), x)[1], torch.zeros(2, 64, 2), steps=4)
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75])
    with pytest.raises(ValueError, match="at least 1"):
        flow_matching.sample(lambda x, t: x, torch.zeros(2, 64, 2), steps=0)


def test_beta_times_have_the_beta_distribution():
    t = flow_matching.times_from_uniform(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    reference = 0.999 * (1 - torch.distributions.Beta(1.5, 1.0).sample((200_000,)))
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert float(t.quantile(quantile)) == pytest.approx(float(reference.quantile(quantile)), abs=0.01)
    assert float(t.min()) >= 0 and float(t.max()) <= 0.999  # noqa: PT018


def test_uniform_times():
    t = flow_matching.times_from_uniform(
        torch.rand(100_000, generator=torch.Generator().manual_seed(0)), schedule="uniform"
    )
    assert float(t.mean()) == pytest.approx(0.4995, abs=0.005)
    assert float(t.max()) <= 0.999
