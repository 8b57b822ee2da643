import torch

from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.cached_samples.prompt_positions import prompt_positions
from alpacache.extraction.preparation import Preparation, PreparationSettings
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select


def test_they_are_those_the_vlm_had(tiny_checkpoint) -> None:
    """Of several images, with text between them and without."""
    settings = PreparationSettings(
        source="synthetic:1", model=str(tiny_checkpoint), cameras=("camera_front_wide_120fov",), frames=3, seed=0,
        camera_names=True, frame_numbers=True,
    )  # fmt: skip
    ((ref,), _) = select(open_source("synthetic:1", cameras=settings.cameras))
    inputs = Preparation.open(settings)(ref).inputs
    vlm = load_vlm(Checkpoint(str(tiny_checkpoint)))
    prefix = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
    spans = [(int(first), int(end)) for first, end in inputs.image_spans]
    found = prompt_positions(prefix.prefix_len, spans, prefix.rope_delta)
    assert found is not None
    assert torch.equal(found, prefix.positions)
    assert found[1].max() > found[0, spans[0][0] : spans[0][1]].max() > 0


def test_what_cannot_be_told_is_none() -> None:
    assert torch.equal(prompt_positions(4, [], 0), torch.arange(4).expand(3, -1))
    assert prompt_positions(4, [], 1) is None
    assert prompt_positions(20, [(1, 7), (8, 12)], -4) is None  # two sizes
    assert prompt_positions(20, [(1, 7)], -2) is None  # no rectangle of 6 has a side of 4
    assert prompt_positions(20, [(1, 7)], -6) is None
    found = prompt_positions(9, [(1, 7)], -3)
    assert found.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]
