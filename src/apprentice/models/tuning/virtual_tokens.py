"""How virtual tokens begin: as common words, because random numbers cost a short run what the base model could do.

Prompt tuning begins with common words' embeddings (Lester et al. 2021, "sampled vocabulary"), prefix tuning
with the keys and values that the base model computes for such words (Li and Liang 2021, "Initialization"). A vocabulary is taken to
begin with what is common, as byte pairs and SentencePiece number it. Knows nothing of training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COMMON = 5_000  # the first ids of a vocabulary that are drawn from


@torch.no_grad()
def begin_as_words(wrapped: Any, seed: int) -> None:
    """Gives the virtual tokens of peft's `wrapped` model their first values: the same for a seed wherever it is called.

    An encoder-decoder's prefix, and one whose keys have another shape than peft's, keep peft's own random numbers.
    """
    model = wrapped.get_base_model()
    encoder = wrapped.prompt_encoder[wrapped.active_adapter]
    prefix = wrapped.active_peft_config.peft_type == "PREFIX_TUNING"
    if prefix and model.config.is_encoder_decoder:
        return
    held = encoder.embedding.weight  # (virtual tokens, width), of a prefix (virtual tokens, layers × 2 × heads × width)
    words = torch.randint(
        min(COMMON, model.get_input_embeddings().num_embeddings), (len(held),), generator=torch.Generator().manual_seed(seed)
    )
    words = words.to(model.device)
    found = _keys_and_values(model, words) if prefix else model.get_input_embeddings()(words)
    if found.shape == held.shape:
        held.copy_(found)


def _keys_and_values(model: Any, words: Tensor) -> Tensor:
    """What the model remembers of `words` (tokens,): of each token every layer's keys and values, (tokens, numbers)."""
    memory = model(input_ids=words[None], use_cache=True).past_key_values
    parts = [part[0].transpose(0, 1).flatten(1) for layer in memory.layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1)
