"""Forward pass of an encoder-decoder over many requests, without padding; keys and values lie in preallocated KV caches.

A pass adds tokens to the decoder of each request. First the encoder reads the prompts of new requests, all as one flat row, and
the keys and values that cross-attention needs of them are cached. The decoder's tokens form one flat row too (as in `batch`):

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutput

from apprentice.errors import ModelError
from apprentice.inference.batch import NOT_FINITE, Chunk, Group, KvMemory, attend, group_slots
from apprentice.inference.lora import Lora, LoraLayers

ATTENTION = "apprentice_crossing"
_CROSSING = ("EncDecAttention", "encoder_attn")  # names of cross-attention in T5 and BART
_OF_PROMPT = ("k", "v", "k_proj", "v_proj")  # its projections of the encoder's states


class Part(NamedTuple):
    """Next decoder tokens `ids` of the request in `slot`, the first at position `start`; a new request has its `prompt` too.

    `adapter` is applied to this request alone.
    """

    slot: int
    start: int
    ids: Sequence[int]
    prompt: Sequence[int] = ()
    adapter: Lora | None = None


class CannotShareError(ModelError):
    """The encoder-decoder cannot compute several requests in one pass here; `unbatched` computes them one by one."""


class CrossingDecoder:
    """Encoder-decoder with KV caches for `slots` requests of up to `context` tokens on each side.

    Cross-attention keys and values of the prompt have a cache of their own. `check` proves that a model computes correctly here.
    """

    def __init__(self, model: Any, slots: int, context: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        self._model = model
        self._decoder, self._encoder = model.get_decoder(), model.get_encoder()
        self._own, self._cross = KvMemory(slots, context), KvMemory(slots, context)
        self._prompts = [0] * slots  # prompt length of each slot, in tokens
        crossing = {name: part for name, part in model.named_modules() if name.endswith(_CROSSING)}
        self._crossing = {id(part) for part in crossing.values()}
        self._loras = LoraLayers(model, apart={f"{name}.{layer}" for name in crossing for layer in _OF_PROMPT})
        self._ahead, self._behind = self._distance_biases(self._encoder, context), self._distance_biases(self._decoder, context)

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Computes logits (tokens, vocabulary) after each token of `parts`, in the order given; at most one part for each slot.

        A part with a prompt begins a request in its slot.
        """
        new = [part for part in parts if part.prompt]
        for part in new:
            self._prompts[part.slot] = len(part.prompt)
        prompts = [part.adapter for part in new], [len(part.prompt) for part in new]
        order = sorted(range(len(parts)), key=lambda number: (len(parts[number].ids) > 1, parts[number].slot))
        ordered = [parts[number] for number in order]
        decoding = _Decoding(self, ordered, new)
        with torch.inference_mode():
            states = self._read(new, *prompts)
            ids = [id for part in ordered for id in part.ids]
            with (
                self._loras.rows([part.adapter for part in ordered], [len(part.ids) for part in ordered], prompts),
                self._attending(self._decoder, decoding.positions),
            ):
                logits: Tensor = self._model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states),
                    decoder_input_ids=self._tensor(ids)[None],
                    use_cache=False,
                    crossing=decoding,
                ).logits[0]
            counts = np.array([len(part.ids) for part in parts])
            given = np.cumsum(counts) - counts
            places = [given[number] + step for number in order for step in range(counts[number])]
            return logits if places == sorted(places) else torch.empty_like(logits).index_copy_(0, self._tensor(places), logits)

    def allocate(self, like: CrossingDecoder) -> None:
        """Allocates the caches of both sides, for every layer that `like` has. Raises `ModelError` for too little memory."""
        self._own.allocate(like._own)
        self._cross.allocate(like._cross)

    def try_adapter(self, adapter: Lora) -> None:
        """Runs one pass over two short requests, one with `adapter`, in caches of its own. Raises what the forward pass raises."""
        tried = CrossingDecoder(self._model, slots=2, context=2)
        tried._loras = self._loras
        start = self._model.config.decoder_start_token_id
        tried.forward([Part(0, 0, [start, 0], [0, 0], adapter), Part(1, 0, [start], [0])])

    def _read(self, new: Sequence[Part], adapters: Sequence[Lora | None], lengths: Sequence[int]) -> Tensor:
        """Encodes all new prompts: states (1, tokens, width). Without new prompts, one state of zeros that is never used."""
        if not new:
            width = self._model.config.d_model
            return torch.zeros(1, 1, width, dtype=self._model.dtype, device=self._model.device)
        positions = self._tensor(np.concatenate([np.arange(length) for length in lengths]))
        with self._loras.rows(adapters, lengths), self._attending(self._encoder, positions):
            ids = self._tensor([id for part in new for id in part.prompt])
            states: Tensor = self._encoder(input_ids=ids[None], crossing=_Encoding(self, lengths)).last_hidden_state
        return states

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self._model.device)

    @contextmanager
    def _attending(self, side: Any, positions: Tensor) -> Iterator[None]:
        """Within it, `side` (encoder or decoder) uses our attention, and its learned positions are those of `positions`."""
        was = side.config._attn_implementation
        side.config._attn_implementation = ATTENTION
        hook = None
        if (places := getattr(side, "embed_positions", None)) is not None:
            hook = places.register_forward_pre_hook(
                lambda _, given, named: (given, named | {"position_ids": positions}), with_kwargs=True
            )
        try:
            yield
        finally:
            side.config._attn_implementation = was
            if hook is not None:
                hook.remove()

    def _distance_biases(self, side: Any, context: int) -> Tensor | None:
        """T5's relative position bias (heads, 2 · context - 1), for distances from `1 - context` to `context - 1`.

        None for a model without relative positions.
        """
        for part in side.modules():
            if getattr(part, "has_relative_attention_bias", False):
                buckets = part._relative_position_bucket(
                    torch.arange(1 - context, context, device=self._model.device),
                    bidirectional=not part.is_decoder,
                    num_buckets=part.relative_attention_num_buckets,
                    max_distance=part.relative_attention_max_distance,
                )
                with torch.inference_mode():
                    return part.relative_attention_bias(buckets).T.contiguous()  # type: ignore[no-any-return]
        return None

    def give_back(self, slot: int) -> None:
        """Returns the slot's memory on both sides to the system, as `KvMemory.give_back` does."""
        self._own.give_back(slot)
        self._cross.give_back(slot)

    def is_crossing(self, module: Any) -> bool:
        """True for a cross-attention module."""
        return id(module) in self._crossing

    def memory(self, *, crosses: bool) -> KvMemory:
        return self._cross if crosses else self._own

    def prompt_length(self, slot: int) -> int:
        return self._prompts[slot]

    def bias_among(self, length: int, dtype: torch.dtype) -> Tensor | None:
        """Position bias of the encoder's self-attention, (1, heads, length, length); None without relative positions."""
        if self._ahead is None:
            return None
        places = torch.arange(length, device=self._ahead.device)
        return self._ahead[:, places - places[:, None] + (self._ahead.shape[1] - 1) // 2].to(dtype)[None]

    def mask(self, asking: Tensor, read: int, dtype: torch.dtype) -> Tensor:
        """Additive mask of decoder self-attention, bias included, for tokens at positions `asking` (n): (n, heads or 1, read)."""
        ahead = torch.arange(read, device=asking.device) - asking[:, None]  # (n, read)
        hidden = (ahead > 0)[:, None]
        if self._behind is None:
            return torch.zeros(hidden.shape, dtype=dtype, device=asking.device).masked_fill_(hidden, float("-inf"))
        biases = self._behind[:, ahead + (self._behind.shape[1] - 1) // 2]
        return biases.transpose(0, 1).to(dtype).masked_fill(hidden, float("-inf"))


class _Encoding:
    """Attention metadata of an encoder pass: the lengths of the prompts that stand one after another in the flat row."""

    def __init__(self, decoder: CrossingDecoder, lengths: Sequence[int]) -> None:
        self._decoder = decoder
        self._lengths = lengths
        self._biases: dict[int, Tensor | None] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`query` (1, heads, tokens, width) → (1, tokens, heads, width)."""
        parts, first = [], 0
        for length in self._lengths:
            if length not in self._biases:
                self._biases[length] = self._decoder.bias_among(length, query.dtype)
            of_prompt = slice(first, first := first + length)
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, of_prompt],
                    key[:, :, of_prompt],
                    value[:, :, of_prompt],
                    attn_mask=self._biases[length],
                    scale=scaling,
                )
            )
        return torch.cat(parts, dim=2).transpose(1, 2)


class _Decoding:
    """Attention metadata of a decoder pass. `parts` of one token come first, in order of their slots; `new` have a prompt."""

    def __init__(self, decoder: CrossingDecoder, parts: Sequence[Part], new: Sequence[Part]) -> None:
        self._decoder = decoder
        counts = np.array([len(part.ids) for part in parts])
        before = np.cumsum(counts) - counts
        self.positions = decoder._tensor(np.concatenate([part.start + np.arange(len(part.ids)) for part in parts]))
        self._slots = decoder._tensor(np.repeat([part.slot for part in parts], counts))
        lengths = [len(part.prompt) for part in new]
        self._read_slots = decoder._tensor(np.repeat([part.slot for part in new], lengths))
        self._read_places = decoder._tensor([place for length in lengths for place in range(length)])
        singles = [part for part in parts if len(part.ids) == 1]
        self._singles = len(singles)
        slots = [part.slot for part in singles]
        prompts = [decoder.prompt_length(slot) for slot in slots]
        self._lengths = decoder._tensor(prompts)
        context = decoder.memory(crosses=False).context
        self._groups = {
            False: group_slots(slots, [part.start + 1 for part in singles], context),
            True: group_slots(slots, prompts, context),
        }
        self._chunks = [
            Chunk(int(first), part.slot, part.start, len(part.ids))
            for part, first in zip(parts[len(singles) :], before[len(singles) :], strict=True)
        ]
        self._masks: dict[tuple[bool, Group | Chunk], Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`query` (1, heads, tokens, width) → (1, tokens, heads, width)."""
        crosses = self._decoder.is_crossing(module)
        keys, values = self._keep(module.layer_idx, key, value, crosses=crosses)
        parts = []
        if groups := self._groups[crosses]:
            masks = [(group, self._mask(crosses, group, keys)) for group in groups]
            parts.append(attend(query[0, :, : self._singles].transpose(0, 1)[:, :, None], keys, values, masks, scaling))
        for chunk in self._chunks:
            read = self._decoder.prompt_length(chunk.slot) if crosses else chunk.start + chunk.count
            attended = scaled_dot_product_attention(
                query[:, :, chunk.first : chunk.first + chunk.count].to(keys.dtype),
                keys[chunk.slot : chunk.slot + 1, :, :read],
                values[chunk.slot : chunk.slot + 1, :, :read],
                attn_mask=None if crosses else self._mask(crosses, chunk, keys),
                scale=scaling,
            )
            parts.append(attended[0].transpose(0, 1).to(query.dtype))
        return torch.cat(parts)[None]

    def _keep(self, layer: int, key: Tensor, value: Tensor, *, crosses: bool) -> tuple[Tensor, Tensor]:
        """Writes new keys and values to the cache, for cross-attention those of new prompts only; returns the whole layer."""
        memory = self._decoder.memory(crosses=crosses)
        slots, places = (self._read_slots, self._read_places) if crosses else (self._slots, self.positions)
        if not len(slots):
            return memory.layer(layer)
        return memory.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), slots, places)

    def _mask(self, crosses: bool, part: Group | Chunk, keys: Tensor) -> Tensor:
        """Additive mask, (requests, heads, 1, positions) of a group, (1, heads or 1, tokens, positions) of a chunk.

        Computed once for all layers.
        """
        key, dtype = (crosses, part), keys.dtype
        if key not in self._masks:
            of_part = slice(part.first, part.first + part.count)
            if isinstance(part, Chunk):
                mask = self._decoder.mask(self.positions[of_part], part.start + part.count, dtype).transpose(0, 1)[None]
            elif crosses:
                hidden = torch.arange(part.read, device=self._lengths.device) >= self._lengths[of_part, None, None, None]
                mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            else:
                mask = self._decoder.mask(self.positions[of_part], part.read, dtype)[:, :, None]
            of_heads = mask.expand(-1, keys.shape[1], -1, -1).contiguous() if isinstance(part, Group) else mask
            self._masks[key] = of_heads
        return self._masks[key]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    crossing: _Encoding | _Decoding | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for transformers' attention interface.

    T5's `position_bias` in `rest` is ignored: it counts positions from 0, and `_Encoding` and `_Decoding` add their own.
    """
    if crossing is None or any(rest.get(extra) is not None for extra in ("softcap", "s_aux", "sliding_window")):
        raise CannotShareError(
            f"{type(module).__name__} attends in a way that our decoder does not know; this model cannot be served here."
        )
    return crossing.attend(module, query, key, value, scaling), None


def check(model: Any) -> CrossingDecoder:
    """Checks on a few tokens that `CrossingDecoder` gives the model's own logits; returns the decoder of that check.

    Raises `CannotShareError` if it does not, `ModelError` where the model's own logits are not finite.
    """
    kind = type(model).__name__
    length = 12
    ids = ((torch.arange(length) * 37 + 11) % model.config.vocab_size).tolist()
    start = model.config.decoder_start_token_id
    try:
        expected = []
        for size in (length, 5):
            said = torch.tensor([[start, *ids[:5]]], device=model.device)
            with torch.inference_mode():
                prompt = torch.tensor([ids[:size]], device=model.device)
                expected.append(model(input_ids=prompt, decoder_input_ids=said, use_cache=False).logits[0].float())
        tried = CrossingDecoder(model, slots=3, context=length)
        tried.forward([Part(2, 0, [start, *ids[:2]], ids)])
        found = [tried.forward([Part(2, 3, ids[2:3]), Part(0, 0, [start], ids[:5])])[1]]
        tried.forward([Part(0, 1, ids[:1])])
        found += list(tried.forward([Part(0, 2, ids[1:2]), Part(2, 4, ids[3:4])]))
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise CannotShareError(f"{kind} cannot be served here: {str(error).splitlines()[0] if str(error) else error!r}.") from error
    if not torch.cat(expected).isfinite().all():
        raise ModelError(f"{kind}: {NOT_FINITE}")
    wanted = [expected[1][0], expected[1][2], expected[0][4]]
    allowed = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(expected[0].abs().max())
    apart = max(float((one.float() - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    if not apart <= allowed:
        raise CannotShareError(
            f"{kind} gives other logits in company than alone (apart by {apart:.2g}); it cannot be served here yet."
        )
    return tried
