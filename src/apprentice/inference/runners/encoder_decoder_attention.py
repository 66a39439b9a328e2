"""Attention metadata of encoder-decoder passes: the encoder over new prompts, the decoder over its own tokens and the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from apprentice.errors import ModelError
from apprentice.inference.compat import relative_position_buckets
from apprentice.inference.kv_cache import KvCache
from apprentice.inference.lora import Lora
from apprentice.inference.runners.attention_metadata import DecodeGroup, PrefillChunk, group_slots
from apprentice.inference.runners.decode_attention import attend_groups

ATTENTION = "apprentice_encoder_decoder_batch"


class CannotBatchError(ModelError):
    """The encoder-decoder cannot compute several requests in one pass here; `unbatched` computes them one by one."""


class DecoderChunk(NamedTuple):
    """Next decoder tokens `ids` of the request in `slot`, the first at position `start`; a new request has its `prompt` too.

    `adapter` is applied to this request alone.
    """

    slot: int
    start: int
    ids: Sequence[int]
    prompt: Sequence[int] = ()
    adapter: Lora | None = None


class RelativeBias:
    """T5's bias on attention scores by distance, in the encoder or decoder `side` with up to `context` positions.

    A model without relative positions, such as BART, has none.
    """

    def __init__(self, side: Any, context: int) -> None:
        self._biases: Tensor | None = None  # (heads, 2 · context - 1), for distances from `1 - context` to `context - 1`
        self._middle = context - 1
        for layer in side.modules():
            if getattr(layer, "has_relative_attention_bias", False):
                weight = layer.relative_attention_bias.weight
                with torch.inference_mode():
                    buckets = relative_position_buckets(layer, torch.arange(1 - context, context, device=weight.device))
                    self._biases = layer.relative_attention_bias(buckets).T.contiguous()
                break

    def among(self, length: int, dtype: torch.dtype) -> Tensor | None:
        """Bias among `length` tokens that all see each other, (1, heads, length, length); None without relative positions."""
        if self._biases is None:
            return None
        positions = torch.arange(length, device=self._biases.device)
        return self._biases[:, positions - positions[:, None] + self._middle].to(dtype)[None]

    def causal_mask(self, queries: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """Additive causal mask, bias included, for tokens at positions `queries` (n) over `length`: (n, heads or 1, length)."""
        distances = torch.arange(length, device=queries.device) - queries[:, None]  # (n, length)
        hidden = (distances > 0)[:, None]
        if self._biases is None:
            return torch.zeros(hidden.shape, dtype=dtype, device=queries.device).masked_fill_(hidden, float("-inf"))
        biases = self._biases[:, distances + self._middle]
        return biases.transpose(0, 1).to(dtype).masked_fill(hidden, float("-inf"))


@dataclass
class EncoderDecoderState:
    """Caches and biases that the passes of one encoder-decoder share.

    `own_cache` has the decoder's keys and values, `cross_cache` those of the prompts, for cross-attention; `prompt_lengths` is by
    slot, `cross_layers` has the `id` of each cross-attention module.
    """

    own_cache: KvCache
    cross_cache: KvCache
    encoder_bias: RelativeBias
    decoder_bias: RelativeBias
    cross_layers: frozenset[int]
    device: torch.device
    prompt_lengths: list[int]

    def tensor(self, values: Any) -> Tensor:
        """`values` as int64 on the model's device."""
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.device)


class EncoderMetadata:
    """Attention metadata of an encoder pass: the lengths of the prompts that stand one after another in the flat row."""

    def __init__(self, state: EncoderDecoderState, lengths: Sequence[int]) -> None:
        self._bias = state.encoder_bias
        self._lengths = lengths
        self._masks: dict[int, Tensor | None] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`query` (1, heads, tokens, width) → (1, tokens, heads, width)."""
        parts, first = [], 0
        for length in self._lengths:
            if length not in self._masks:
                self._masks[length] = self._bias.among(length, query.dtype)
            of_prompt = slice(first, first := first + length)
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, of_prompt],
                    key[:, :, of_prompt],
                    value[:, :, of_prompt],
                    attn_mask=self._masks[length],
                    scale=scaling,
                )
            )
        return torch.cat(parts, dim=2).transpose(1, 2)


class DecoderMetadata:
    """Attention metadata of a decoder pass. `chunks` of one token come first, in order of their slots; `new` have a prompt."""

    def __init__(self, state: EncoderDecoderState, chunks: Sequence[DecoderChunk], new: Sequence[DecoderChunk]) -> None:
        self._state = state
        counts = np.array([len(chunk.ids) for chunk in chunks])
        before = np.cumsum(counts) - counts
        self.positions = state.tensor(np.concatenate([chunk.start + np.arange(len(chunk.ids)) for chunk in chunks]))
        self._slots = state.tensor(np.repeat([chunk.slot for chunk in chunks], counts))
        lengths = [len(chunk.prompt) for chunk in new]
        self._prompt_slots = state.tensor(np.repeat([chunk.slot for chunk in new], lengths))
        self._prompt_positions = state.tensor([position for length in lengths for position in range(length)])
        singles = [chunk for chunk in chunks if len(chunk.ids) == 1]
        self._decode_tokens = len(singles)
        slots = [chunk.slot for chunk in singles]
        prompts = [state.prompt_lengths[slot] for slot in slots]
        self._lengths = state.tensor(prompts)
        context = state.own_cache.context
        self._groups = {
            False: group_slots(slots, [chunk.start + 1 for chunk in singles], context),
            True: group_slots(slots, prompts, context),
        }
        self._prefills = [
            PrefillChunk(int(first), chunk.slot, chunk.start, len(chunk.ids))
            for chunk, first in zip(chunks[len(singles) :], before[len(singles) :], strict=True)
        ]
        self._masks: dict[tuple[bool, DecodeGroup | PrefillChunk], Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`query` (1, heads, tokens, width) → (1, tokens, heads, width)."""
        crosses = id(module) in self._state.cross_layers
        keys, values = self._write(module.layer_idx, key, value, crosses=crosses)
        parts = []
        if groups := self._groups[crosses]:
            masks = [(group, self._mask(crosses, group, keys)) for group in groups]
            singles = query[0, :, : self._decode_tokens].transpose(0, 1)[:, :, None]
            parts.append(attend_groups(singles, keys, values, masks, scaling))
        for prefill in self._prefills:
            length = self._state.prompt_lengths[prefill.slot] if crosses else prefill.start + prefill.count
            attended = scaled_dot_product_attention(
                query[:, :, prefill.first : prefill.first + prefill.count].to(keys.dtype),
                keys[prefill.slot : prefill.slot + 1, :, :length],
                values[prefill.slot : prefill.slot + 1, :, :length],
                attn_mask=None if crosses else self._mask(crosses, prefill, keys),
                scale=scaling,
            )
            parts.append(attended[0].transpose(0, 1).to(query.dtype))
        return torch.cat(parts)[None]

    def _write(self, layer: int, key: Tensor, value: Tensor, *, crosses: bool) -> tuple[Tensor, Tensor]:
        """Writes new keys and values to the cache, for cross-attention those of new prompts only; returns the whole layer."""
        cache = self._state.cross_cache if crosses else self._state.own_cache
        slots, positions = (self._prompt_slots, self._prompt_positions) if crosses else (self._slots, self.positions)
        if not len(slots):
            return cache.layer(layer)
        return cache.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), slots, positions)

    def _mask(self, crosses: bool, part: DecodeGroup | PrefillChunk, keys: Tensor) -> Tensor:
        """Additive mask, (requests, heads, 1, positions) of a group, (1, heads or 1, tokens, positions) of a chunk.

        Computed once for all layers.
        """
        key, dtype, bias = (crosses, part), keys.dtype, self._state.decoder_bias
        if key not in self._masks:
            of_part = slice(part.first, part.first + part.count)
            if isinstance(part, PrefillChunk):
                mask = bias.causal_mask(self.positions[of_part], part.start + part.count, dtype).transpose(0, 1)[None]
            elif crosses:
                hidden = torch.arange(part.length, device=self._lengths.device) >= self._lengths[of_part, None, None, None]
                mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            else:
                mask = bias.causal_mask(self.positions[of_part], part.length, dtype)[:, :, None]
            of_heads = mask.expand(-1, keys.shape[1], -1, -1).contiguous() if isinstance(part, DecodeGroup) else mask
            self._masks[key] = of_heads
        return self._masks[key]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_metadata: EncoderMetadata | DecoderMetadata | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for transformers' attention interface. Raises `CannotBatchError` for a layer that asks for more.

    T5's `position_bias` in `options` is ignored: it counts positions from 0, and the metadata's masks have our own.
    """
    if attention_metadata is None or any(options.get(name) is not None for name in ("softcap", "s_aux", "sliding_window")):
        raise CannotBatchError(
            f"{type(module).__name__} attends in a way that our decoder does not know; this model cannot be served here."
        )
    return attention_metadata.attend(module, query, key, value, scaling), None
