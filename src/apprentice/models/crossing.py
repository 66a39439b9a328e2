"""The decoder of an encoder-decoder run over many requests at once, its keys and values in preallocated memory, nothing padded.

Two passes. `read` takes one new request: the encoder reads its prompt once, the decoder its first tokens, and what cross-attention
needs of the prompt is kept. `step` adds one token to each of many requests, as one flat row (see ragged.py):

    requests   slot 0 at position 5: [x], slot 3 at position 0: [y]
    flat row   x  y
    attention  each over its own decoder's positions; each over its own prompt

What a request gets does not depend on its company: buckets and masks are its own. T5's relative positions are a bias on the
scores, BART's absolute ones are put in where the model would count from 0. Knows nothing of sampling or the end of a reply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutput

from apprentice.errors import ModelError
from apprentice.models.lora import Lora, LoraLayers
from apprentice.models.ragged import Group, KvMemory, group_slots

ATTENTION = "apprentice_crossing"
_CROSSING = ("EncDecAttention", "encoder_attn")  # what T5 and BART call attention to the prompt


class CrossingDecoder:
    """`model` with memory for `slots` requests of up to `context` tokens on each side.

    Raises `ModelError` for a model whose logits are other ones here than its own.
    """

    def __init__(self, model: Any, slots: int, context: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        self._model = model
        self._loras = LoraLayers(model)
        self._decoder = model.get_decoder()
        self._own, self._cross = KvMemory(slots, context), KvMemory(slots, context)
        self._prompts = [0] * slots  # tokens of the prompt that each slot holds
        self._crossing = {id(part) for name, part in self._decoder.named_modules() if name.endswith(_CROSSING)}
        self._biases = self._distance_biases(context)

    def read(self, slot: int, prompt: Sequence[int], first: Sequence[int], adapter: Lora | None = None) -> Tensor:
        """Logits (tokens, vocabulary) after each of the decoder's `first` tokens, the prompt read."""
        device = self._model.device
        with torch.inference_mode(), self._loras.rows([adapter], [1]):
            states = self._model.get_encoder()(input_ids=torch.tensor([list(prompt)], device=device)).last_hidden_state
            self._prompts[slot] = len(prompt)
            return self._run(_Reading(self, slot, len(first), len(prompt), device), states, first)

    def step(
        self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int], adapters: Sequence[Lora | None] = (None,)
    ) -> Tensor:
        """Logits (requests, vocabulary) after one more token each, given with the decoder's position; slots ascend.

        `adapters` are the requests', or one for all.
        """
        # Cross-attention takes what `read` kept; the one state here is computed and not looked at.
        width = self._model.config.d_model
        states = torch.zeros(1, 1, width, dtype=self._model.dtype, device=self._model.device)
        lengths = [self._prompts[slot] for slot in slots]
        with self._loras.rows(adapters, [1] * len(adapters)):
            return self._run(_Stepping(self, slots, positions, lengths, self._model.device), states, ids)

    def _run(self, crossing: _Reading | _Stepping, states: Tensor, ids: Sequence[int]) -> Tensor:
        config = self._decoder.config
        was = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            with torch.inference_mode(), self._placed(crossing.positions):
                logits: Tensor = self._model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states),
                    decoder_input_ids=torch.tensor([list(ids)], device=self._model.device),
                    use_cache=False,
                    crossing=crossing,
                ).logits[0]
        finally:
            config._attn_implementation = was
        return logits

    @contextmanager
    def _placed(self, positions: Tensor) -> Iterator[None]:
        """The decoder's tokens stand at `positions`, not at 0, 1, …, where their place is looked up by number."""
        if (places := getattr(self._decoder, "embed_positions", None)) is None:
            yield
            return
        hook = places.register_forward_pre_hook(
            lambda _, given, named: (given, named | {"position_ids": positions}), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()

    def _distance_biases(self, context: int) -> Tensor | None:
        """T5's bias (heads, context) on the score of a token so many positions back; None for a model without."""
        for part in self._decoder.modules():
            if getattr(part, "has_relative_attention_bias", False):
                back = -torch.arange(context, device=self._model.device)
                buckets = part._relative_position_bucket(
                    back,
                    bidirectional=False,
                    num_buckets=part.relative_attention_num_buckets,
                    max_distance=part.relative_attention_max_distance,
                )
                with torch.inference_mode():
                    return part.relative_attention_bias(buckets).T.contiguous()  # type: ignore[no-any-return]
        return None

    def give_back(self, slot: int) -> None:
        """Frees the memory that `slot` takes."""
        self._own.give_back(slot)
        self._cross.give_back(slot)

    def is_crossing(self, module: Any) -> bool:
        """True for attention to the prompt."""
        return id(module) in self._crossing

    def memory(self, *, crosses: bool) -> KvMemory:
        return self._cross if crosses else self._own

    def mask(self, asking: Tensor, read: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores of tokens at positions `asking` (n) with the first `read` ones: (n, heads or 1, read)."""
        back = asking[:, None] - torch.arange(read, device=asking.device)  # (n, read)
        hidden = (back < 0)[:, None]
        if self._biases is None:
            return torch.zeros(hidden.shape, dtype=dtype, device=asking.device).masked_fill_(hidden, float("-inf"))
        return self._biases[:, back.clamp(min=0)].transpose(0, 1).to(dtype).masked_fill(hidden, float("-inf"))


class _Reading:
    """One new request: `count` tokens of the decoder in `slot`, over a prompt of `length` tokens."""

    def __init__(self, decoder: CrossingDecoder, slot: int, count: int, length: int, device: Any) -> None:
        self._decoder = decoder
        self.positions = torch.arange(count, device=device)
        self._places = {False: self.positions, True: torch.arange(length, device=device)}
        self._slot = slot
        self._mask: Tensor | None = None

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`query` (1, heads, tokens, width) → (1, tokens, heads, width)."""
        crosses = self._decoder.is_crossing(module)
        places = self._places[crosses]
        slots = torch.full_like(places, self._slot)
        self._decoder.memory(crosses=crosses).write(
            module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1), slots, places
        )
        mask = None
        if not crosses:
            if self._mask is None:
                self._mask = self._decoder.mask(self.positions, len(self.positions), query.dtype).transpose(0, 1)[None]
            mask = self._mask
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)


class _Stepping:
    """One token more of each request."""

    def __init__(
        self, decoder: CrossingDecoder, slots: Sequence[int], positions: Sequence[int], lengths: Sequence[int], device: Any
    ) -> None:
        self._decoder = decoder
        self.positions = torch.tensor(list(positions), device=device)
        self._slots = torch.tensor(list(slots), device=device)
        self._lengths = torch.tensor(list(lengths), device=device)
        context = decoder.memory(crosses=False).context
        own = [position + 1 for position in positions]
        self._groups = {False: group_slots(slots, own, context), True: group_slots(slots, lengths, context)}
        self._masks: dict[tuple[bool, Group], Tensor] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`query` (1, heads, requests, width) → (1, requests, heads, width)."""
        crosses = self._decoder.is_crossing(module)
        memory = self._decoder.memory(crosses=crosses)
        if crosses:
            keys, values = memory.layer(module.layer_idx)
        else:
            keys, values = memory.write(
                module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1), self._slots, self.positions
            )
        rows = query[0].transpose(0, 1)[:, :, None]  # (requests, heads, 1, width)
        parts = []
        for group in self._groups[crosses]:
            slots = slice(group.slot, group.slot + group.count)
            attended = scaled_dot_product_attention(
                rows[group.first : group.first + group.count],
                keys[slots, :, : group.read],
                values[slots, :, : group.read],
                attn_mask=self._mask(crosses, group, query.dtype),
                scale=scaling,
            )
            parts.append(attended[:, :, 0])
        return torch.cat(parts)[None]

    def _mask(self, crosses: bool, group: Group, dtype: torch.dtype) -> Tensor:
        """(requests, heads or 1, 1, positions); all layers share it."""
        key = (crosses, group)
        if key not in self._masks:
            of_group = slice(group.first, group.first + group.count)
            if crosses:
                hidden = torch.arange(group.read, device=self._lengths.device) >= self._lengths[of_group, None, None, None]
                self._masks[key] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            else:
                self._masks[key] = self._decoder.mask(self.positions[of_group], group.read, dtype)[:, :, None]
        return self._masks[key]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    crossing: _Reading | _Stepping | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for transformers' interface. T5's `position_bias` in `rest` counts from 0; ours takes its place."""
    if crossing is None or any(rest.get(extra) is not None for extra in ("softcap", "s_aux", "sliding_window")):
        raise ModelError(
            f"{type(module).__name__} attends in a way that our decoder does not know; this model cannot be served here."
        )
    return crossing.attend(module, query, key, value, scaling), None


def check(model: Any) -> int:
    """Tries on a few tokens whether the model's own logits come out; the bytes that one token's keys and values take on one side.

    Raises `ModelError` if they do not.
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
        tried.read(2, ids, [start, *ids[:2]])
        found = [tried.read(0, ids[:5], [start])[-1]]
        tried.step([0, 2], [1, 3], [ids[0], ids[2]])
        found += list(tried.step([0, 2], [2, 4], [ids[1], ids[3]]))
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{kind} cannot be served here: {str(error).splitlines()[0] if str(error) else error!r}.") from error
    wanted = [expected[1][0], expected[1][2], expected[0][4]]
    allowed = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(expected[0].abs().max())
    apart = max(float((one.float() - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    if not apart <= allowed:
        raise ModelError(f"{kind} gives other logits in company than alone (apart by {apart:.2g}); it cannot be served here yet.")
    return tried.memory(crosses=False).position_bytes
