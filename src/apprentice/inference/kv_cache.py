"""KV cache: preallocated keys and values of every layer, and the size that a limit in bytes gives it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

import torch

from apprentice.errors import ModelError


@dataclass(frozen=True)
class KvCacheSize:
    """Size of a KV cache: `slots` of `context` positions each, of which at most `positions` may take memory together.

    An encoder-decoder has a cache on each of its two sides: a slot has `context` positions in both, and `positions` counts both.
    """

    slots: int
    context: int
    positions: int

    @classmethod
    def within(
        cls, kv_bytes: int | None, position_bytes: int, *, slots: int, context: int, on_cpu: bool, sides: int = 1
    ) -> KvCacheSize:
        """The largest size up to `slots` and `context` that fits into `kv_bytes` (None: no limit).

        `position_bytes` is what a position takes in all sides together. On a CPU untouched memory costs nothing, so all slots stay;
        on a GPU every slot has all its positions from the start. Raises `ModelError` as `positions_within` does.
        """
        positions = positions_within(kv_bytes, position_bytes, slots, context)
        context = min(context, positions)
        return cls(slots if on_cpu else max(1, min(slots, positions // context)), context, sides * positions)


def positions_within(kv_bytes: int | None, position_bytes: int, slots: int, context: int) -> int:
    """Number of positions of `position_bytes` that fit into `kv_bytes` (None: no limit), at most `slots` times `context`.

    Raises `ModelError` where not even two positions fit, one for a prompt and one for a reply.
    """
    most = slots * context
    if kv_bytes is None:
        return most
    if kv_bytes < 2 * position_bytes:
        raise ModelError(
            f"serving.kv_memory_gb gives room for {kv_bytes // position_bytes} tokens of {position_bytes} bytes each; give more."
        )
    return min(most, kv_bytes // position_bytes)


class KvCache:
    """Keys and values of every layer, (slots, key heads, context, head width) each.

    The dtype is the one that attention computes in. On a CPU that is float32 for every model: few queries over many keys multiply
    faster that way, though twice as many bytes are read.
    """

    def __init__(self, slots: int, context: int) -> None:
        self.slots = slots
        self.context = context
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._buffers: list[mmap] = []  # of the layers' tensors, on a CPU

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

    def allocate(self, like: KvCache) -> None:
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

    def free(self, slot: int) -> None:
        """Returns the memory pages that lie wholly inside `slot` to the system (CPU only); the contents of the slot are lost."""
        for buffer in self._buffers:
            size = len(buffer) // self.slots
            first, end = -(-slot * size // PAGESIZE) * PAGESIZE, (slot + 1) * size // PAGESIZE * PAGESIZE
            if first < end:
                buffer.madvise(MADV_DONTNEED, first, end - first)

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
        buffer = mmap(-1, math.prod(shape) * torch.float32.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._buffers.append(buffer)
        return torch.frombuffer(buffer, dtype=torch.float32).view(shape)
