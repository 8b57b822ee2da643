"""Recorded reasoning rollouts row by row, each computed by itself: what the sampler's joint computation must equal."""

from dataclasses import replace

import numpy as np
import torch
from transformers import DynamicCache

from alpacache.alpamayo.backbone import cache_argument


@torch.inference_mode()
def extend(vlm, stem, token_ids):
    """The prefix of stem and text; only the text's tokens `[N]` are computed."""
    ids = torch.as_tensor(np.asarray(token_ids))[None].to(vlm.device)
    if ids.shape[1] == 0:
        return stem
    cache = DynamicCache(config=vlm.model.config.text_config)
    for layer, (key, value) in enumerate(zip(stem.keys, stem.values, strict=True)):
        cache.update(key[None], value[None], layer)
    first = stem.prefix_len + stem.rope_delta
    end = first + ids.shape[1]
    output = vlm.model.language_model(
        inputs_embeds=vlm.model.get_input_embeddings()(ids),
        position_ids=torch.arange(first, end, device=vlm.device).expand(3, 1, -1),
        use_cache=True,
        **{cache_argument(vlm.model.language_model): cache},
    )
    return replace(
        stem,
        keys=torch.stack([layer.keys[0] for layer in cache.layers]),
        values=torch.stack([layer.values[0] for layer in cache.layers]),
        hidden=torch.cat([stem.hidden, output.last_hidden_state[0]]),
        prefix_len=stem.prefix_len + ids.shape[1],
        start_position=end,
    )


def rollouts(vlm, input_ids, pixel_values, image_grid_thw, sequences):
    """Prefixes of recorded rollouts, as the public sampler leaves them in its cache.

    `sequences` are each `[P + N]`: the prompt's positions followed by that rollout's text. A row ends after its first
    `<|traj_future_start|>`. A row that never emits it (or only as its very last token) has KV for all tokens but the
    last, while its start position counts them all.
    """
    stem = vlm.prefill(input_ids, pixel_values, image_grid_thw)
    prompt_len = len(np.asarray(input_ids))
    result = []
    for row in sequences:
        tokens = np.asarray(row)
        emitted = np.flatnonzero(tokens[prompt_len:-1] == vlm.future_start_id)
        end = prompt_len + int(emitted[0]) + 1 if emitted.size else len(tokens) - 1
        start = stem.rope_delta + (end if emitted.size else len(tokens))
        result.append(replace(extend(vlm, stem, tokens[prompt_len:end]), start_position=start))
    return result


def replay(sampler, prefix, stem_len, texts):
    """Tails that a sampler makes of recorded rollouts `[R, N]`, which may go on beyond their end."""
    recorded = torch.as_tensor(np.asarray(texts))
    return sampler.generate(
        prefix,
        stem_len,
        lambda step, running, hidden: recorded[list(running), step],
        rollouts=len(recorded),
        limit=recorded.shape[1],
    )
