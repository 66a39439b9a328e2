"""One forward pass over many sequences of different lengths, without padding; keys and values lie in a preallocated KV cache.

The new tokens of all sequences form one flat row: a sequence in decoding adds one token, a new prompt adds a chunk of many. Each
weight is therefore read once a step, however many sequences there are. Only attention must know which token belongs to which
sequence, and transformers' attention interface lets us replace it:

    sequences  slot 0 at position 5: [x], slot 1 at position 9: [y], slot 3 at position 0: [a, b, c]
    flat row   x  y  a  b  c
    positions  5  9  0  1  2
    attention  x and y together (adjacent slots, lengths of one bucket), then a, b, c causally

A pass copies no cache: keys and values are written in place, and adjacent slots are read as one view. The logits of a sequence
do not depend on the other sequences: its attention reads up to the end of its own length bucket and is always masked, so the
arithmetic is the same in every batch. Only the matrix products may sum in another order for few rows than for many (in bf16 they
did not, where measured: AVX512-BF16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from apprentice.errors import ModelError
from apprentice.inference.lora import Lora, LoraLayers

ATTENTION = "apprentice_ragged"
NOT_FINITE = (
    "the model's logits are not finite, and nothing can be written by them; its weights are damaged, or they leave their number"
    " format's range: try model.dtype float32."
)
# Attention reads the cache up to a multiple of this many positions. Larger: more sequences share one product; smaller: fewer
# masked positions are read.
BUCKET = 128


class Segment(NamedTuple):
    """New tokens `ids` of the sequence in cache slot `slot`, the first at position `start`.

    Logits are computed after every token if `every`, else after the last one. `adapter` is applied to this sequence alone.
    """

    slot: int
    start: int
    ids: Sequence[int]
    every: bool = False
    adapter: Lora | None = None

    @property
    def kept(self) -> int:
        """Number of rows of logits that the segment gets."""
        return len(self.ids) if self.every else 1

    @property
    def place(self) -> tuple[bool, int]:
        """Sort key of the flat row: segments of one token first, then longer ones, each by slot."""
        return len(self.ids) > 1, self.slot


class KvMemory:
    """KV cache: keys and values of every layer, (slots, key heads, context, head width) each.

    The dtype is the one that attention computes in. On a CPU that is float32 for every model: few queries over many keys multiply
    faster that way, though twice as many bytes are read.
    """

    def __init__(self, slots: int, context: int) -> None:
        self.slots = slots
        self.context = context
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pages: list[mmap] = []  # buffers of the layers' tensors, on a CPU

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `keys` and `values` (tokens, heads, width) at `slots` and `positions` (tokens each).

        Returns the keys and values of the whole layer. Allocates the layer at its first write.
        """
        if layer not in self._layers:
            self._layers[layer] = self._allocate(keys), self._allocate(values)
        stored_keys, stored_values = self._layers[layer]
        stored_keys[slots, :, positions] = keys.to(stored_keys.dtype)
        stored_values[slots, :, positions] = values.to(stored_values.dtype)
        return stored_keys, stored_values

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole layer; `KeyError` before its first write."""
        return self._layers[layer]

    def allocate(self, like: KvMemory) -> None:
        """Allocates every layer that `like` has, so that a GPU with too little memory fails now and not at the first request.

        Raises `ModelError`.
        """
        try:
            for layer, (keys, values) in like._layers.items():
                self._layers[layer] = self._allocate(keys), self._allocate(values)
        except (torch.OutOfMemoryError, OSError) as error:
            total = like.position_bytes * self.slots * self.context / 1e9
            raise ModelError(
                f"keys and values of {self.slots} contexts of {self.context} tokens take {total:.1f} GB, and there is not so much"
                " memory; lower serving.kv_memory_gb, serving.max_running or serving.context."
            ) from error

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` positions of slot `source` to slot `target`, in every layer."""
        with torch.inference_mode():
            for stored in (part for layer in self._layers.values() for part in layer):
                stored[target, :, :count] = stored[source, :, :count]

    def give_back(self, slot: int) -> None:
        """Returns the memory pages that lie wholly inside `slot` to the system (CPU only); the contents of the slot are lost."""
        for pages in self._pages:
            size = len(pages) // self.slots
            first, end = -(-slot * size // PAGESIZE) * PAGESIZE, (slot + 1) * size // PAGESIZE * PAGESIZE
            if first < end:
                pages.madvise(MADV_DONTNEED, first, end - first)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in all layers that have been written to."""
        parts = (part for layer in self._layers.values() for part in layer)
        return sum(part.nbytes // (self.slots * self.context) for part in parts)

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.slots, like.shape[1], self.context, like.shape[-1])
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # Fresh pages take no memory before they are written, so unused slots and context cost nothing. They are zeros, which is
        # needed because a masked NaN is still NaN.
        pages = mmap(-1, math.prod(shape) * torch.float32.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._pages.append(pages)
        return torch.frombuffer(pages, dtype=torch.float32).view(shape)


@dataclass(frozen=True)
class Group:
    """`count` sequences in adjacent slots, from `slot` on, that add one token each: tokens [first, first + count) of the flat row.

    Each attends over `read` positions of the cache: the end of the bucket that its own length falls into.
    """

    first: int
    slot: int
    count: int
    read: int


@dataclass(frozen=True)
class Chunk:
    """`count` new tokens of one sequence: tokens [first, first + count) of the flat row, at positions from `start` on."""

    first: int
    slot: int
    start: int
    count: int


def group_slots(slots: Sequence[int], lengths: Sequence[int], context: int) -> list[Group]:
    """Groups adjacent slots (ascending) whose lengths, new token included, fall into one bucket of `BUCKET` positions.

    Slots [0, 1, 2, 4] with lengths [9, 10, 900, 8] give groups of slots [0, 1], [2] and [4], which read 128, 1024 and 128
    positions.
    """
    groups: list[Group] = []
    for token, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        read = min(context, -(-length // BUCKET) * BUCKET)
        last = groups[-1] if groups else None
        if last is not None and (last.slot + last.count, last.read) == (slot, read):
            groups[-1] = Group(last.first, last.slot, last.count + 1, read)
        else:
            groups.append(Group(token, slot, 1, read))
    return groups


class Ragged:
    """Attention metadata of a batch: slots, positions and masks of its flat row. The model hands it to every layer's attention."""

    def __init__(self, memory: KvMemory, segments: Sequence[Segment], device: torch.device) -> None:
        self.memory = memory
        self.order = sorted(range(len(segments)), key=lambda number: segments[number].place)
        ordered = [segments[number] for number in self.order]
        singles = [segment for segment in ordered if len(segment.ids) == 1]
        self.singles = len(singles)
        lengths = [segment.start + 1 for segment in singles]
        self.groups = group_slots([segment.slot for segment in singles], lengths, memory.context)
        self.chunks: list[Chunk] = []
        first = len(singles)
        for segment in ordered[len(singles) :]:
            self.chunks.append(Chunk(first, segment.slot, segment.start, len(segment.ids)))
            first += len(segment.ids)
        self.adapters = [segment.adapter for segment in ordered]
        self.counts = [len(segment.ids) for segment in ordered]
        counts = np.array(self.counts)
        starts = np.array([segment.start for segment in ordered])
        before = np.cumsum(counts) - counts
        positions = np.arange(counts.sum()) - np.repeat(before - starts, counts)

        def on_device(values: Any) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

        self.ids = on_device([token for segment in ordered for token in segment.ids])
        self.slots = on_device(np.repeat([segment.slot for segment in ordered], counts))
        self.positions = on_device(positions)
        # `kept`: places in the flat row whose logits are computed; `order_kept`: the caller's row of each of these logits.
        ends = before + counts
        self.kept = on_device([at for end, segment in zip(ends, ordered, strict=True) for at in range(end - segment.kept, end)])
        given = np.array([segment.kept for segment in segments])
        starts = np.cumsum(given) - given
        self.order_kept = on_device([starts[number] + step for number in self.order for step in range(given[number])])
        self._masks: dict[tuple[Group | Chunk, int | None, int], torch.Tensor | None] = {}

    @overload
    def mask(self, part: Group, window: int | None, keys: torch.Tensor) -> torch.Tensor: ...
    @overload
    def mask(self, part: Chunk, window: int | None, keys: torch.Tensor) -> torch.Tensor | None: ...
    def mask(self, part: Group | Chunk, window: int | None, keys: torch.Tensor) -> torch.Tensor | None:
        """Additive attention mask of `part` for attention over the last `window` positions (None: all of them).

        0 for positions that a token may see, else -inf; the dtype is that of `keys`. The shape is (sequences, key heads, 1,
        positions) for a group, (1, 1, tokens, positions) for a chunk; None for a chunk that is plainly causal. Computed once for
        all layers.
        """
        heads = keys.shape[1]
        if (part, window, heads) not in self._masks:
            self._masks[part, window, heads] = self._make_mask(part, window, heads, keys.dtype)
        return self._masks[part, window, heads]

    def _make_mask(self, part: Group | Chunk, window: int | None, heads: int, dtype: torch.dtype) -> torch.Tensor | None:
        asking = self.positions[part.first : part.first + part.count]
        if isinstance(part, Group):
            read, asking = part.read, asking.view(-1, 1, 1, 1)
        else:
            read, asking = part.start + part.count, asking.view(1, 1, -1, 1)
            if part.start == 0 and (window is None or read <= window):
                return None
        seen = torch.arange(read, device=self.positions.device)
        hidden = seen > asking
        if window is not None:
            hidden |= seen <= asking - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return mask.expand(-1, heads, -1, -1).contiguous() if isinstance(part, Group) else mask


def forward(model: Any, memory: KvMemory, segments: Sequence[Segment], loras: LoraLayers | None = None) -> torch.Tensor:
    """Computes logits (rows, vocabulary) after the last token, or after every token, of each segment, in the order of `segments`.

    At most one segment for each slot. Segments with adapters need `loras`, made for this model. Runs under
    `torch.inference_mode()`. `model` must have been through `prepare`.
    """
    ragged = Ragged(memory, segments, model.device)
    was = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        with torch.inference_mode(), loras.rows(ragged.adapters, ragged.counts) if loras is not None else nullcontext():
            logits = model(
                input_ids=ragged.ids[None],
                position_ids=ragged.positions[None],
                use_cache=False,
                logits_to_keep=ragged.kept,
                ragged=ragged,
            ).logits[0]
    finally:
        model.config._attn_implementation = was
    in_order = ragged.order == list(range(len(segments)))
    return logits if in_order else torch.empty_like(logits).index_copy_(0, ragged.order_kept, logits)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    masks: Sequence[tuple[Group, torch.Tensor]],
    scale: float | None,
) -> torch.Tensor:
    """Decode attention: sequences that add one token each, group by group. Returns (tokens, query heads, width).

    `query` is (tokens, key heads, query heads of each key head, width); `keys` and `values` are the cache of a whole layer; the
    mask of a group is (sequences, key heads, 1, positions), in the cache's dtype. On a CPU PyTorch's own attention multiplies head
    by head; here all heads of a group are one product.
    """
    tokens, heads, shared, width = query.shape
    scale = width**-0.5 if scale is None else scale
    if keys.device.type != "cpu":
        parts = []
        for group, mask in masks:
            of_slots = slice(group.slot, group.slot + group.count)
            seen, told = keys[of_slots, :, : group.read], values[of_slots, :, : group.read]
            asking = query[group.first : group.first + group.count]
            parts.append(scaled_dot_product_attention(asking, seen, told, attn_mask=mask, scale=scale))
        return torch.cat(parts).flatten(1, 2)
    asking = (query.to(keys.dtype) * scale).reshape(tokens * heads, shared, width)
    result = asking.new_empty(tokens * heads, shared, values.shape[-1])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    for group, mask in masks:
        rows = slice(group.first * heads, (group.first + group.count) * heads)
        places = slice(group.slot * heads, (group.slot + group.count) * heads)
        scores = torch.baddbmm(mask.flatten(0, 1), asking[rows], keys[places, : group.read].transpose(1, 2))
        torch.bmm(scores.softmax(dim=-1), values[places, : group.read], out=result[rows])
    return result.view(tokens, heads * shared, -1).to(query.dtype)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    ragged: Ragged | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, for transformers' attention interface: `query` (1, heads, tokens, width) → (1, tokens, heads, width).

    Writes the new keys and values to the cache first.
    """
    name = type(module).__name__
    if (
        ragged is None
        or attention_mask is not None
        or any(rest.get(extra) is not None for extra in ("softcap", "s_aux", "position_bias"))
    ):
        raise ModelError(
            f"{name} attends in a way that our decoder does not know; this model cannot be served or generate here yet."
        )
    keys, values = ragged.memory.write(
        module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1), ragged.slots, ragged.positions
    )
    heads, kv_heads = query.shape[1], keys.shape[1]
    parts = []
    if ragged.groups:
        # Query heads that share a key head take the token dimension, so that keys need not be repeated.
        asking = query[0, :, : ragged.singles].transpose(0, 1).unflatten(1, (kv_heads, heads // kv_heads))
        masks = [(group, ragged.mask(group, sliding_window, keys)) for group in ragged.groups]
        parts.append(attend(asking, keys, values, masks, scaling))
    for chunk in ragged.chunks:
        of_chunk, end = slice(chunk.first, chunk.first + chunk.count), chunk.start + chunk.count
        mask = ragged.mask(chunk, sliding_window, keys)
        if mask is None:  # it sees new tokens only, so the cache need not be read
            asking, seen, told = query[:, :, of_chunk], key[:, :, of_chunk], value[:, :, of_chunk]
        else:
            of_slot = slice(chunk.slot, chunk.slot + 1)
            asking, seen, told = query[:, :, of_chunk].to(keys.dtype), keys[of_slot, :, :end], values[of_slot, :, :end]
        attended = scaled_dot_product_attention(
            asking, seen, told, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != kv_heads
        )
        parts.append(attended[0].transpose(0, 1).to(query.dtype))
    return torch.cat(parts)[None], None


def prepare(model: Any) -> KvMemory:
    """Registers our attention with transformers, and checks on a few tokens that `forward` gives the model's own logits.

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
        memory = KvMemory(slots=3, context=length)
        tokens = ids.tolist()
        forward(model, memory, [Segment(2, 0, tokens[:3]), Segment(0, 0, tokens[:1])])
        forward(model, memory, [Segment(2, 3, tokens[3:8]), Segment(0, 1, tokens[1:2])])
        found = forward(model, memory, [Segment(2, 8, tokens[8:9]), Segment(0, 2, tokens[2:])]).float()
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{kind} cannot generate here: {str(error).splitlines()[0] if str(error) else error!r}.") from error
    if not expected.isfinite().all():
        raise ModelError(f"{kind}: {NOT_FINITE}")
    # Rounding differs with the order of sums; a wrong position or mask is far above this.
    allowed = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(expected.abs().max())
    apart = float((found - expected[[8, length - 1]]).abs().max())
    if not apart <= allowed:
        raise ModelError(f"{kind} gives other logits in company than alone (apart by {apart:.2g}); it cannot generate here yet.")
    return memory
