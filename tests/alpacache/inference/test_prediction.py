"""Paths from cached prefixes: one rollout a path where there are any, and no sample's path depends on another's."""

import numpy as np
import pytest
import torch

from alpacache import flow_matching, randomness
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.inference.prediction import predict_actions, to_paths

SETTINGS = {"paths": 3, "flow_steps": 4, "seed": 0}


@pytest.fixture(scope="module")
def expert(tiny_checkpoint):
    return load_expert(str(tiny_checkpoint), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data(rollout_stores, tiny_checkpoint):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    return {codec: CachedDataset([store], checkpoint) for codec, store in rollout_stores.items()}


def predict(expert, loaded, **settings):
    """Sampled paths of each sample."""
    actions = predict_actions(expert, [sample for sample, _ in loaded], **settings)
    return [to_paths(expert.action_space, a, *poses[:2]) for a, (_, poses) in zip(actions, loaded, strict=True)]


def load(data, tails):
    """Each sample, and its poses."""
    return [(data.load(index, tails=tails), data.poses(index)) for index in range(len(data))]


def test_path_k_is_that_of_rollout_k_as_the_vlm_left_it(data, expert, rollout_samples):
    """From the store as with the VLM in the loop: stem and tails of the live prefixes, the same noise."""
    predicted = predict(expert, load(data["bf16"], 3), **SETTINGS)
    with torch.no_grad():
        for (xyz, rot), (sample, inputs, prefix, tails) in zip(predicted, rollout_samples, strict=True):
            noise = randomness.noise("eval", 0, sample.ref.sample_id, draws=3)
            batch = expert.batch([prefix.with_tail(inputs.stem_len, tail) for tail in tails])
            action = flow_matching.sample(
                lambda x, t, batch=batch: expert.velocity(x, t, batch), noise[:, None], steps=4
            )[:, 0]
            poses = (torch.from_numpy(sample.history_xyz), torch.from_numpy(sample.history_rot))
            live = expert.action_space.to_path(action, *poses)
            assert np.array_equal(xyz, live[0].numpy())
            assert np.array_equal(rot, live[1].numpy())
            assert len({path.tobytes() for path in xyz}) == 3


def test_batch_size_changes_nothing(data, expert):
    samples = load(data["bf16"], 3)
    together = predict(expert, samples, **SETTINGS)
    for sample, (xyz, rot) in zip(samples, together, strict=True):
        alone = predict(expert, [sample], **SETTINGS)[0]
        assert np.array_equal(alone[0], xyz)
        assert np.array_equal(alone[1], rot)


def test_rollouts_change_the_path_and_a_quantised_store_hardly_does(data, expert):
    direct = np.stack([xyz for xyz, _ in predict(expert, load(data["bf16"], 0), **SETTINGS)])
    exact, quantised = (
        np.stack([xyz for xyz, _ in predict(expert, load(data[codec], 3), **SETTINGS)]) for codec in ("bf16", "int8")
    )
    scale = np.linalg.norm(exact)
    assert np.linalg.norm(direct - exact) / scale > 0.05
    # As in test_evaluation: an untrained expert swerves, two integrations amplify.
    assert 0 < np.linalg.norm(quantised - exact) / scale < 0.04


def test_a_path_without_a_rollout_of_its_own_is_refused(data, expert):
    with pytest.raises(ValueError, match="2 tails for 3 paths; expected one a path"):
        predict(expert, load(data["bf16"], 2), **SETTINGS)
