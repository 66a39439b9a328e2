"""Attention metadata of a batch: which token of the flat row belongs to which slot, at which position, and what it may see.

The new tokens of all sequences form one flat row without padding: a sequence in decoding adds one token, a prompt a chunk of many.
Each weight is therefore read once a pass, however many sequences there are. Only attention must know whose token is whose:

    chunks     slot 0 at position 5: [x], slot 1 at position 9: [y], slot 3 at position 0: [a, b, c]
    flat row   x  y  a  b  c
    slots      0  1  3  3  3
    positions  5  9  0  1  2
    attention  x and y together (adjacent slots, lengths of one bucket): a `DecodeGroup`; then a, b, c causally: a `PrefillChunk`

What a sequence sees does not depend on the other sequences: its attention reads up to the end of its own length bucket and is
always masked, so the arithmetic is the same in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from apprentice.inference.kv_cache import KvCache
from apprentice.inference.lora import Lora

# Attention reads the cache up to a multiple of this many positions. Larger: more sequences share one product; smaller: fewer
# masked positions are read.
BUCKET = 128


class TokenChunk(NamedTuple):
    """New tokens `ids` of the sequence in cache slot `slot`, the first at position `start`.

    Logits are computed after every token if `all_logits`, else after the last one. `adapter` is applied to this sequence alone.
    """

    slot: int
    start: int
    ids: Sequence[int]
    all_logits: bool = False
    adapter: Lora | None = None

    @property
    def logit_rows(self) -> int:
        """Number of rows of logits that the chunk gets."""
        return len(self.ids) if self.all_logits else 1

    @property
    def layout_key(self) -> tuple[bool, int]:
        """Sort key of the flat row: chunks of one token first, then longer ones, each by slot."""
        return len(self.ids) > 1, self.slot


@dataclass(frozen=True)
class DecodeGroup:
    """`count` sequences in adjacent slots, from `slot` on, that add one token each: tokens [first, first + count) of the flat row.

    Each attends over `length` positions of the cache: the end of the bucket that its own length falls into.
    """

    first: int
    slot: int
    count: int
    length: int


@dataclass(frozen=True)
class PrefillChunk:
    """`count` new tokens of one sequence: tokens [first, first + count) of the flat row, at positions from `start` on."""

    first: int
    slot: int
    start: int
    count: int


def group_slots(slots: Sequence[int], lengths: Sequence[int], context: int) -> list[DecodeGroup]:
    """Groups adjacent slots (ascending) whose lengths, new token included, fall into one bucket of `BUCKET` positions.

    Slots [0, 1, 2, 4] with lengths [9, 10, 900, 8] give groups of slots [0, 1], [2] and [4], which read 128, 1024 and 128
    positions.
    """
    groups: list[DecodeGroup] = []
    for token, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        end = min(context, -(-length // BUCKET) * BUCKET)
        last = groups[-1] if groups else None
        if last is not None and (last.slot + last.count, last.length) == (slot, end):
            groups[-1] = DecodeGroup(last.first, last.slot, last.count + 1, end)
        else:
            groups.append(DecodeGroup(token, slot, 1, end))
    return groups


class AttentionMetadata:
    """Attention metadata of a batch: slots, positions and masks of its flat row. The model hands it to every layer's attention.

    `order` has the indices of `chunks` in the order of the flat row, `decode_tokens` the number of tokens that stand alone.
    `logit_places` are the places in the flat row whose logits are computed; `logit_rows` the caller's row of each of them.
    """

    def __init__(self, cache: KvCache, chunks: Sequence[TokenChunk], device: torch.device) -> None:
        self.cache = cache
        self.order = sorted(range(len(chunks)), key=lambda number: chunks[number].layout_key)
        ordered = [chunks[number] for number in self.order]
        singles = [chunk for chunk in ordered if len(chunk.ids) == 1]
        self.decode_tokens = len(singles)
        lengths = [chunk.start + 1 for chunk in singles]
        self.groups = group_slots([chunk.slot for chunk in singles], lengths, cache.context)
        self.prefills: list[PrefillChunk] = []
        first = len(singles)
        for chunk in ordered[len(singles) :]:
            self.prefills.append(PrefillChunk(first, chunk.slot, chunk.start, len(chunk.ids)))
            first += len(chunk.ids)
        self.adapters = [chunk.adapter for chunk in ordered]
        self.counts = [len(chunk.ids) for chunk in ordered]
        counts = np.array(self.counts)
        starts = np.array([chunk.start for chunk in ordered])
        before = np.cumsum(counts) - counts
        positions = np.arange(counts.sum()) - np.repeat(before - starts, counts)

        def on_device(values: Any) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

        self.ids = on_device([token for chunk in ordered for token in chunk.ids])
        self.slots = on_device(np.repeat([chunk.slot for chunk in ordered], counts))
        self.positions = on_device(positions)
        ends = before + counts
        self.logit_places = on_device(
            [place for end, chunk in zip(ends, ordered, strict=True) for place in range(end - chunk.logit_rows, end)]
        )
        rows = np.array([chunk.logit_rows for chunk in chunks])
        first_rows = np.cumsum(rows) - rows
        self.logit_rows = on_device([first_rows[number] + step for number in self.order for step in range(rows[number])])
        self._masks: dict[tuple[DecodeGroup | PrefillChunk, int | None, int], torch.Tensor | None] = {}

    @overload
    def mask(self, part: DecodeGroup, window: int | None, keys: torch.Tensor) -> torch.Tensor: ...
    @overload
    def mask(self, part: PrefillChunk, window: int | None, keys: torch.Tensor) -> torch.Tensor | None: ...
    def mask(self, part: DecodeGroup | PrefillChunk, window: int | None, keys: torch.Tensor) -> torch.Tensor | None:
        """Additive attention mask of `part` for attention over the last `window` positions (None: all of them).

        0 for positions that a token may see, else -inf; the dtype is that of `keys`. The shape is (sequences, key heads, 1,
        positions) for a group, (1, 1, tokens, positions) for a chunk; None for a chunk that is plainly causal. Computed once for
        all layers.
        """
        heads = keys.shape[1]
        if (part, window, heads) not in self._masks:
            self._masks[part, window, heads] = self._make_mask(part, window, heads, keys.dtype)
        return self._masks[part, window, heads]

    def _make_mask(
        self, part: DecodeGroup | PrefillChunk, window: int | None, heads: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        queries = self.positions[part.first : part.first + part.count]
        if isinstance(part, DecodeGroup):
            length, queries = part.length, queries.view(-1, 1, 1, 1)
        else:
            length, queries = part.start + part.count, queries.view(1, 1, -1, 1)
            if part.start == 0 and (window is None or length <= window):
                return None
        keys = torch.arange(length, device=self.positions.device)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return mask.expand(-1, heads, -1, -1).contiguous() if isinstance(part, DecodeGroup) else mask
