"""Initialisation of virtual tokens from common words: random vectors would spoil what the base model can do in a short run.

Prompt tuning starts from the embeddings of common words (Lester et al. 2021, "sampled vocabulary"), prefix tuning from the keys and
values that the base model computes for such words (Li and Liang 2021, "Initialization"). The lowest token ids are taken to be the
common ones, as byte-pair encoding and SentencePiece number them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COMMON = 5_000  # words are drawn from this many lowest token ids


@torch.no_grad()
def start_from_common_words(wrapped: Any, seed: int) -> None:
    """Initialises the virtual tokens of peft's `wrapped` model; the same seed gives the same values on every worker.

    The prefix of an encoder-decoder, and one whose keys and values have another shape than peft's, keep peft's random values.
    """
    model = wrapped.get_base_model()
    encoder = wrapped.prompt_encoder[wrapped.active_adapter]
    prefix = wrapped.active_peft_config.peft_type == "PREFIX_TUNING"
    if prefix and model.config.is_encoder_decoder:
        return
    embeddings = encoder.embedding.weight  # (virtual tokens, width); for a prefix (virtual tokens, layers × 2 × heads × width)
    words = torch.randint(
        min(COMMON, model.get_input_embeddings().num_embeddings), (len(embeddings),), generator=torch.Generator().manual_seed(seed)
    )
    words = words.to(model.device)
    values = _keys_and_values(model, words) if prefix else model.get_input_embeddings()(words)
    if values.shape == embeddings.shape:
        embeddings.copy_(values)


def _keys_and_values(model: Any, words: Tensor) -> Tensor:
    """Keys and values of all layers for `words` (tokens,), flattened to (tokens, layers × 2 × heads × width)."""
    memory = model(input_ids=words[None], use_cache=True).past_key_values
    parts = [part[0].transpose(0, 1).flatten(1) for layer in memory.layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1)
