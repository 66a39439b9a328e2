"""Runner of encoder-decoders: one pass over many requests, without padding; each prompt is encoded once.

A pass adds tokens to the decoder of each request. First the encoder reads the prompts of new requests, all as one flat row, and
the keys and values that cross-attention needs of them are cached. The decoder's tokens form one flat row too:

    requests   slot 0 at position 5: [x], slot 3 at position 0: [y] with the new prompt [a, b, c]
    encoder    a  b  c
    decoder    x  y
    attention  a, b, c among each other; x and y each over its own decoder positions, and each over its own prompt

The logits of a request do not depend on the other requests: length buckets and masks are its own. T5's relative positions are a
bias on the attention scores; BART's absolute positions are passed in, where the model itself would count from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from apprentice.errors import ModelError
from apprentice.inference.compat import using_attention
from apprentice.inference.generation_request import NOT_FINITE, GenerationRequest, SplitPrompt
from apprentice.inference.kv_cache import KvCache, KvCacheSize
from apprentice.inference.kv_slots import SlotAllocation
from apprentice.inference.lora import Lora, LoraLayers
from apprentice.inference.runners.encoder_decoder_attention import (
    ATTENTION,
    CannotBatchError,
    DecoderChunk,
    DecoderMetadata,
    EncoderDecoderState,
    EncoderMetadata,
    RelativeBias,
    attend,
)
from apprentice.inference.runners.model_runner import count_token_ids
from apprentice.inference.running_request import RunningRequest

_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn")  # its names in T5 and BART
_OF_PROMPT = ("k", "v", "k_proj", "v_proj")  # its projections of the encoder's states


class EncoderDecoderRunner:
    """`ModelRunner` of an encoder-decoder with up to `slots` requests of up to `context` tokens on each side.

    A prompt must be shorter than `context` tokens, and a reply ends when the decoder has `context`; `context` is cut to the model's
    `max_position_embeddings`, and to half of what `kv_bytes` holds. If the end of a prompt is to be scored (`score_from`), the
    encoder reads the tokens before that index, and the rest are forced as the first tokens of the decoder. Raises
    `CannotBatchError` for a model that cannot be batched, and `ModelError` for one whose logits are not finite or for too little
    memory.
    """

    splits_prompts = False

    def __init__(self, model: Any, *, slots: int, context: int, kv_bytes: int | None = None) -> None:
        probe = probe_encoder_decoder(model)
        positions = getattr(model.config, "max_position_embeddings", None)
        self.size = KvCacheSize.within(
            kv_bytes,
            probe.position_bytes,
            slots=slots,
            context=min(context, positions or context),
            on_cpu=model.device.type == "cpu",
            sides=2,
        )
        self.vocabulary = count_token_ids(model)
        self._start_id = int(model.config.decoder_start_token_id)
        self._model = CachedEncoderDecoder(model, self.size.slots, self.size.context)
        self._model.allocate(probe)

    def split_prompt(self, request: GenerationRequest) -> SplitPrompt:
        """The encoder's tokens; the decoder's begin with its start token. Raises `ModelError` where the encoder's were scored."""
        return split_prompt(request, self._start_id)

    def begin(self, allocation: SlotAllocation) -> None:
        """Frees the slots that are evicted."""
        for slot in allocation.evicted:
            self._model.free(slot)

    def run(self, batch: Sequence[RunningRequest]) -> Tensor:
        """One pass over the scheduled tokens of all requests, and over the prompts of new ones."""
        return self._model.compute_logits(
            [
                DecoderChunk(
                    running.slot,
                    running.start,
                    running.scheduled_ids,
                    () if running.start else running.prompt.encoder_ids,
                    running.request.adapter,
                )
                for running in batch
            ]
        )

    def end(self, slot: int) -> None:
        """Keys and values stay until the slot is used again."""

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short requests, one with `adapter`, in caches of its own. Raises what the forward pass raises."""
        self._model.try_adapter(adapter)


def split_prompt(request: GenerationRequest, start_id: int) -> SplitPrompt:
    """A prompt as an encoder-decoder reads it. Raises `ModelError` where tokens that the encoder reads are to be scored."""
    if request.score_from == 0:
        raise ModelError("an encoder-decoder gives no probabilities to the prompt it reads; ask for those of the reply.")
    end = len(request.prompt) if request.score_from is None else request.score_from
    score_from = None if request.score_from is None else 1  # the decoder's first token is its start token
    return SplitPrompt(request.prompt[:end], (start_id, *request.prompt[end:]), score_from)


class CachedEncoderDecoder:
    """Encoder-decoder with KV caches for `slots` requests of up to `context` tokens on each side.

    Cross-attention keys and values of the prompt have a cache of their own. `probe_encoder_decoder` proves that a model computes
    correctly here.
    """

    def __init__(self, model: Any, slots: int, context: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attend)
        self._model = model
        self._decoder, self._encoder = model.get_decoder(), model.get_encoder()
        crossing = {name: layer for name, layer in model.named_modules() if name.endswith(_CROSS_ATTENTION)}
        self._state = EncoderDecoderState(
            KvCache(slots, context),
            KvCache(slots, context),
            RelativeBias(self._encoder, context),
            RelativeBias(self._decoder, context),
            frozenset(id(layer) for layer in crossing.values()),
            model.device,
            [0] * slots,
        )
        self._loras = LoraLayers(model, cross_layers={f"{name}.{layer}" for name in crossing for layer in _OF_PROMPT})

    @property
    def position_bytes(self) -> int:
        """Bytes of one position on both sides together."""
        return self._state.own_cache.position_bytes + self._state.cross_cache.position_bytes

    def compute_logits(self, chunks: Sequence[DecoderChunk]) -> Tensor:
        """Computes logits (tokens, vocabulary) after each token of `chunks`, in the order given; at most one for each slot.

        A chunk with a prompt begins a request in its slot.
        """
        new = [chunk for chunk in chunks if chunk.prompt]
        for chunk in new:
            self._state.prompt_lengths[chunk.slot] = len(chunk.prompt)
        prompts = [chunk.adapter for chunk in new], [len(chunk.prompt) for chunk in new]
        order = sorted(range(len(chunks)), key=lambda number: (len(chunks[number].ids) > 1, chunks[number].slot))
        ordered = [chunks[number] for number in order]
        metadata = DecoderMetadata(self._state, ordered, new)
        with torch.inference_mode():
            states = self._encode(new, *prompts)
            ids = [id for chunk in ordered for id in chunk.ids]
            with (
                self._loras.rows([chunk.adapter for chunk in ordered], [len(chunk.ids) for chunk in ordered], prompts),
                self._attending(self._decoder, metadata.positions),
            ):
                logits: Tensor = self._model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states),
                    decoder_input_ids=self._state.tensor(ids)[None],
                    use_cache=False,
                    attention_metadata=metadata,
                ).logits[0]
            counts = np.array([len(chunk.ids) for chunk in chunks])
            first_rows = np.cumsum(counts) - counts
            rows = [first_rows[number] + step for number in order for step in range(counts[number])]
            return logits if rows == sorted(rows) else torch.empty_like(logits).index_copy_(0, self._state.tensor(rows), logits)

    def allocate(self, like: CachedEncoderDecoder) -> None:
        """Allocates the caches of both sides, for every layer that `like` has. Raises `ModelError` for too little memory."""
        self._state.own_cache.allocate(like._state.own_cache)
        self._state.cross_cache.allocate(like._state.cross_cache)

    def free(self, slot: int) -> None:
        """Returns the slot's memory on both sides to the system, as `KvCache.free` does."""
        self._state.own_cache.free(slot)
        self._state.cross_cache.free(slot)

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short requests, one with `adapter`, in caches of its own. Raises what the forward pass raises."""
        trial = CachedEncoderDecoder(self._model, slots=2, context=2)
        trial._loras = self._loras
        start = self._model.config.decoder_start_token_id
        trial.compute_logits([DecoderChunk(0, 0, [start, 0], [0, 0], adapter), DecoderChunk(1, 0, [start], [0])])

    def _encode(self, new: Sequence[DecoderChunk], adapters: Sequence[Lora | None], lengths: Sequence[int]) -> Tensor:
        """Encodes all new prompts: states (1, tokens, width). Without new prompts, one state of zeros that is never used."""
        if not new:
            width = self._model.config.d_model
            return torch.zeros(1, 1, width, dtype=self._model.dtype, device=self._model.device)
        positions = self._state.tensor(np.concatenate([np.arange(length) for length in lengths]))
        metadata = EncoderMetadata(self._state, lengths)
        with self._loras.rows(adapters, lengths), self._attending(self._encoder, positions):
            ids = self._state.tensor([id for chunk in new for id in chunk.prompt])
            states: Tensor = self._encoder(input_ids=ids[None], attention_metadata=metadata).last_hidden_state
        return states

    @contextmanager
    def _attending(self, side: Any, positions: Tensor) -> Iterator[None]:
        """Within it, `side` (encoder or decoder) uses our attention, and its learned positions are those of `positions`."""
        hook = None
        if (embedding := getattr(side, "embed_positions", None)) is not None:
            hook = embedding.register_forward_pre_hook(
                lambda _, arguments, options: (arguments, options | {"position_ids": positions}), with_kwargs=True
            )
        try:
            with using_attention(side.config, ATTENTION):
                yield
        finally:
            if hook is not None:
                hook.remove()


def probe_encoder_decoder(model: Any) -> CachedEncoderDecoder:
    """Checks on a few tokens that `CachedEncoderDecoder` gives the model's own logits; returns the small one of that check.

    Raises `CannotBatchError` if it does not, `ModelError` where the model's own logits are not finite.
    """
    kind = type(model).__name__
    length = 12
    ids = ((torch.arange(length) * 37 + 11) % model.config.vocab_size).tolist()
    start = model.config.decoder_start_token_id
    try:
        alone = []
        for size in (length, 5):
            reply = torch.tensor([[start, *ids[:5]]], device=model.device)
            with torch.inference_mode():
                prompt = torch.tensor([ids[:size]], device=model.device)
                alone.append(model(input_ids=prompt, decoder_input_ids=reply, use_cache=False).logits[0].float())
        probe = CachedEncoderDecoder(model, slots=3, context=length)
        probe.compute_logits([DecoderChunk(2, 0, [start, *ids[:2]], ids)])
        batched = [probe.compute_logits([DecoderChunk(2, 3, ids[2:3]), DecoderChunk(0, 0, [start], ids[:5])])[1]]
        probe.compute_logits([DecoderChunk(0, 1, ids[:1])])
        batched += list(probe.compute_logits([DecoderChunk(0, 2, ids[1:2]), DecoderChunk(2, 4, ids[3:4])]))
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise CannotBatchError(f"{kind} cannot be served here: {str(error).splitlines()[0] if str(error) else error!r}.") from error
    if not torch.cat(alone).isfinite().all():
        raise ModelError(f"{kind}: {NOT_FINITE}")
    expected = [alone[1][0], alone[1][2], alone[0][4]]
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(alone[0].abs().max())
    difference = max(float((one.float() - other).abs().max()) for one, other in zip(batched, expected, strict=True))
    if not difference <= tolerance:
        raise CannotBatchError(
            f"{kind} gives other logits in company than alone (apart by {difference:.2g}); it cannot be served here yet."
        )
    return probe
