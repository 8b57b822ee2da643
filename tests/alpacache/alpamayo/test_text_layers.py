"""The loop over the text model's layers against transformers' own forward, bit for bit."""

import pytest
import torch
from transformers import DynamicCache

from alpacache.alpamayo import load_vlm
from alpacache.alpamayo.backbone import additive_mask, cache_argument
from alpacache.alpamayo.text_layers import LayerKV

NAMES = ("input_ids_fused", "pixel_values", "image_grid_thw")


def one_forward(vlm, prompts):
    """Hidden states and cache of transformers' forward over padded prompts."""
    longest = max(len(ids) for ids, _, _ in prompts)
    ids = torch.full((len(prompts), longest), vlm.future_start_id)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    for row, (own, _, grid) in enumerate(prompts):
        ids[row, : len(own)] = own
        image = (own == vlm.model.config.image_token_id).int()
        found, _ = vlm.model.get_rope_index(own[None], mm_token_type_ids=image[None], image_grid_thw=grid)
        positions[:, row, : len(own)] = found[:, 0]
    cache = DynamicCache(config=vlm.model.config.text_config)
    output = vlm.model(
        input_ids=ids,
        pixel_values=torch.cat([pixels for _, pixels, _ in prompts]).to(vlm.dtype),
        image_grid_thw=torch.cat([grid for _, _, grid in prompts]),
        position_ids=positions,
        mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(),
        use_cache=True,
        **{cache_argument(vlm.model): cache},
    )
    return output.last_hidden_state, cache


def cut(vlm, golden, clip):
    ids, pixels, grid = (golden[f"clip{clip}.{name}"] for name in NAMES)
    return ids[: int((ids == vlm.future_start_id).nonzero()[0, 0]) + 1], pixels, grid


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_prefill_has_the_bits_of_one_forward(dtype, attention, golden, golden_dir):
    vlm = load_vlm(str(golden_dir), dtype=dtype, attention=attention)
    prompts = [cut(vlm, golden, clip) for clip in (2, 0, 1)]
    hidden, expected = one_forward(vlm, prompts)
    rows = vlm._embedded(prompts)
    cache = [rows.advance(number, layer) for number, layer in enumerate(vlm.model.language_model.layers)]
    for row, (prefix, _) in enumerate(rows.features(cache, vlm.model.language_model.norm(rows.prompts.hidden))):
        assert torch.equal(prefix.hidden, hidden[row, : prefix.prefix_len])
    for ours, theirs in zip(cache, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_more_tokens_have_the_bits_of_one_forward(masked, attention, golden, golden_dir):
    vlm = load_vlm(str(golden_dir), attention=attention)
    text = vlm.model.language_model
    prompts = [cut(vlm, golden, clip) for clip in (0, 0)]
    _, expected = one_forward(vlm, prompts)
    rows = vlm._embedded(prompts)
    cache = [rows.advance(number, layer) for number, layer in enumerate(text.layers)]
    for tokens in (torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), torch.tensor([[5], [3]])):
        before = cache[0].tokens
        positions = torch.arange(tokens.shape[1])[None] + rows.deltas[0] + before
        mask = None
        if masked:
            seen = torch.ones(tokens.shape[1], before + tokens.shape[1], dtype=torch.bool).tril(before)
            seen[:, 7] = False
            mask = additive_mask(seen, vlm.dtype)[None, None]
        theirs = text(
            inputs_embeds=text.get_input_embeddings()(tokens),
            position_ids=positions.expand(3, *tokens.shape),
            attention_mask=mask,
            use_cache=True,
            **{cache_argument(text): expected},
        ).last_hidden_state
        assert torch.equal(vlm.extend(cache, tokens, positions, mask), theirs)
        assert torch.equal(cache[-1].keys, expected.layers[-1].keys)


def test_kv_of_a_layer_is_appended_to():
    kv = LayerKV()
    assert kv.tokens == 0
    first, second = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    kv.update(first, -first, 5)
    keys, values = kv.update(second, -second, 5, anything="else")
    assert kv.tokens == 4
    assert torch.equal(keys, torch.cat([first, second], 2))
    assert torch.equal(values, -keys)
