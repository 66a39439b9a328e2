"""Runner of causal models: one forward pass over many sequences of different lengths, without padding.

transformers' attention interface lets a model call our attention, which knows whose token is whose (`attention_metadata`). A pass
copies no cache: keys and values are written in place, and adjacent slots are read as one view. The logits of a sequence do not
depend on the other sequences. Only the matrix products may sum in another order for few rows than for many (in bf16 they did not,
where measured: AVX512-BF16).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from apprentice.errors import ModelError
from apprentice.inference.compat import using_attention
from apprentice.inference.generation_request import NOT_FINITE, GenerationRequest, SplitPrompt
from apprentice.inference.kv_cache import KvCache, KvCacheSize
from apprentice.inference.kv_slots import SlotAllocation
from apprentice.inference.lora import Lora, LoraLayers
from apprentice.inference.runners.attention_metadata import AttentionMetadata, PrefillChunk, TokenChunk
from apprentice.inference.runners.decode_attention import attend_groups
from apprentice.inference.runners.model_runner import count_token_ids
from apprentice.inference.running_request import RunningRequest

ATTENTION = "apprentice_causal_batch"


class CausalRunner:
    """`ModelRunner` of a causal model with up to `slots` sequences of up to `context` tokens.

    `context` is cut to the model's `max_position_embeddings`, and to what `kv_bytes` holds. Raises `ModelError` for a model that
    cannot be batched, and for too little memory.
    """

    splits_prompts = True

    def __init__(self, model: Any, *, slots: int, context: int, kv_bytes: int | None = None) -> None:
        probe = probe_model(model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.size = KvCacheSize.within(
            kv_bytes,
            probe.position_bytes,
            slots=slots,
            context=min(context, positions or context),
            on_cpu=model.device.type == "cpu",
        )
        self.vocabulary = count_token_ids(model)
        self._model = model
        self._loras = LoraLayers(model)
        self._cache = KvCache(self.size.slots, self.size.context)
        self._cache.allocate(probe)

    def split_prompt(self, request: GenerationRequest) -> SplitPrompt:
        """All of the prompt is the decoder's."""
        return SplitPrompt((), request.prompt, request.score_from)

    def begin(self, allocation: SlotAllocation) -> None:
        """Frees the slots that are evicted, and copies the prefix that is reused."""
        for slot in allocation.evicted:
            self._cache.free(slot)
        if allocation.reused and allocation.source != allocation.slot:
            self._cache.copy(allocation.source, allocation.slot, allocation.reused)

    def run(self, batch: Sequence[RunningRequest]) -> Tensor:
        """One pass over the scheduled tokens of all requests."""
        chunks = [
            TokenChunk(running.slot, running.start, running.scheduled_ids, running.needs_all_logits, running.request.adapter)
            for running in batch
        ]
        return compute_logits(self._model, self._cache, chunks, self._loras)

    def end(self, slot: int) -> None:
        """Keys and values stay in the cache for prompts with the same beginning."""

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short texts, one with `adapter`, in a cache of its own. Raises what the forward pass raises."""
        chunks = [TokenChunk(0, 0, [0, 0], adapter=adapter), TokenChunk(1, 0, [0])]
        compute_logits(self._model, KvCache(slots=2, context=2), chunks, self._loras)


def compute_logits(model: Any, cache: KvCache, chunks: Sequence[TokenChunk], loras: LoraLayers | None = None) -> Tensor:
    """Computes logits (rows, vocabulary) after the last token, or after every token, of each chunk, in the order of `chunks`.

    At most one chunk for each slot. Chunks with adapters need `loras`, made for this model. Runs under `torch.inference_mode()`.
    `model` must have been through `probe_model`.
    """
    metadata = AttentionMetadata(cache, chunks, model.device)
    rows = loras.rows(metadata.adapters, metadata.counts) if loras is not None else nullcontext()
    with using_attention(model.config, ATTENTION), torch.inference_mode(), rows:
        logits: Tensor = model(
            input_ids=metadata.ids[None],
            position_ids=metadata.positions[None],
            use_cache=False,
            logits_to_keep=metadata.logit_places,
            attention_metadata=metadata,
        ).logits[0]
        in_order = metadata.order == list(range(len(chunks)))
        return logits if in_order else torch.empty_like(logits).index_copy_(0, metadata.logit_rows, logits)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_metadata: AttentionMetadata | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for transformers' attention interface: `query` (1, heads, tokens, width) → (1, tokens, heads, width).

    Writes the new keys and values to the cache first.
    """
    metadata = attention_metadata
    if (
        metadata is None
        or attention_mask is not None
        or any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    ):
        raise ModelError(
            f"{type(module).__name__} attends in a way that our decoder does not know; this model cannot be served or generate here"
            " yet."
        )
    keys, values = metadata.cache.write(
        module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1), metadata.slots, metadata.positions
    )
    heads, kv_heads = query.shape[1], keys.shape[1]
    parts = []
    if metadata.groups:
        # Query heads that share a key head take the token dimension, so that keys need not be repeated.
        singles = query[0, :, : metadata.decode_tokens].transpose(0, 1).unflatten(1, (kv_heads, heads // kv_heads))
        masks = [(group, metadata.mask(group, sliding_window, keys)) for group in metadata.groups]
        parts.append(attend_groups(singles, keys, values, masks, scaling))
    for prefill in metadata.prefills:
        new_query, new_key, new_value = (part[:, :, prefill.first : prefill.first + prefill.count] for part in (query, key, value))
        mask = metadata.mask(prefill, sliding_window, keys)
        parts.append(_attend_prefill(prefill, new_query, new_key, new_value, keys, values, mask, scaling))
    return torch.cat(parts)[None], None


def _attend_prefill(
    prefill: PrefillChunk,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Attention of one chunk over its own new `key` and `value` or, with a mask, over the cache; (tokens, heads, width)."""
    dtype, grouped = query.dtype, query.shape[1] != keys.shape[1]
    if mask is not None:  # it sees tokens of earlier passes too
        of_slot, end = slice(prefill.slot, prefill.slot + 1), prefill.start + prefill.count
        query, key, value = query.to(keys.dtype), keys[of_slot, :, :end], values[of_slot, :, :end]
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return attended[0].transpose(0, 1).to(dtype)


def probe_model(model: Any) -> KvCache:
    """Registers our attention with transformers, and checks on a few tokens that `compute_logits` gives the model's own logits.

    Returns the small KV cache of that check, which shows what every layer needs.

    Raises `ModelError` for models that keep state besides keys and values, that place tokens otherwise than by position ids, or
    whose logits are not finite.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    kind = type(model).__name__
    length = 12
    ids = (torch.arange(length) * 37 + 11) % model.config.get_text_config().vocab_size
    try:
        with torch.inference_mode():
            expected = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float()
        cache = KvCache(slots=3, context=length)
        tokens = ids.tolist()
        compute_logits(model, cache, [TokenChunk(2, 0, tokens[:3]), TokenChunk(0, 0, tokens[:1])])
        compute_logits(model, cache, [TokenChunk(2, 3, tokens[3:8]), TokenChunk(0, 1, tokens[1:2])])
        logits = compute_logits(model, cache, [TokenChunk(2, 8, tokens[8:9]), TokenChunk(0, 2, tokens[2:])]).float()
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{kind} cannot generate here: {str(error).splitlines()[0] if str(error) else error!r}.") from error
    if not expected.isfinite().all():
        raise ModelError(f"{kind}: {NOT_FINITE}")
    # Rounding differs with the order of sums; a wrong position or mask is far above this.
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(expected.abs().max())
    difference = float((logits - expected[[8, length - 1]]).abs().max())
    if not difference <= tolerance:
        raise ModelError(
            f"{kind} gives other logits in company than alone (apart by {difference:.2g}); it cannot generate here yet."
        )
    return cache
