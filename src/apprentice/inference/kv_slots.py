"""KV-slot allocator: admission by reserved length, prefix reuse, eviction of the least recently used.

A request is admitted when the longest it can become (its prompt and its longest reply) fits beside the reservations of the running
requests. Keys and values of past requests stay in the cache for prompts with the same beginning. They are evicted, oldest first,
when their memory is needed.

    limit: 30 positions    slot 0 runs and reserves 12; slots 1 and 2 are free and cache 10 and 8 of past requests
    a request of 15        takes slot 1, which grows by 5; the 8 of slot 2 are evicted
    a request of 19        instead waits until slot 0 is free
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Shorter common prefixes than this, in tokens, are computed again instead of copied from another slot.
LEAST_REUSED = 32


@dataclass
class _Slot:
    cached_ids: list[int]  # token ids whose keys and values the slot has, of past requests too
    adapter: int = 0  # number of the adapter that they were computed with, 0 for none
    reserved: int = 0  # positions that the running request may come to need; 0: free
    touched: int = 0  # positions that take memory
    used_at: int = 0  # number of the slot's last release, for the order of eviction


@dataclass(frozen=True)
class SlotAllocation:
    """Slot allocated to a request. The caller frees the memory of the slots `evicted`, then copies the prefix from `source`.

    `reused` is the number of positions to reuse; nothing is to be copied where `source` is `slot`.
    """

    slot: int
    source: int
    reused: int
    evicted: tuple[int, ...]


class KvSlots:
    """Allocator of `count` slots that together use up to `positions` positions of the KV cache."""

    def __init__(self, count: int, positions: int) -> None:
        self._positions = positions
        self._slots = [_Slot([]) for _ in range(count)]
        self._releases = 0

    @property
    def reserved(self) -> int:
        """Positions reserved for the running requests."""
        return sum(slot.reserved for slot in self._slots)

    def allocate(self, need: int, prefix: Sequence[int] = (), adapter: int = 0) -> SlotAllocation | None:
        """Allocates a slot for a request of up to `need` positions; None if it must wait.

        `prefix` are the prompt's token ids that may be reused from the cache, `adapter` the number of its adapter, 0 for none.
        """
        free = [place for place, slot in enumerate(self._slots) if not slot.reserved]
        if not free:
            return None
        source, reused = self._longest_match(prefix, adapter)
        in_use = sum(max(slot.touched, slot.reserved) for slot in self._slots)
        chosen = self._choose(free, source, reused, self._positions - in_use - need)
        left = self._positions - in_use - max(0, need - self._slots[chosen].touched)
        # Evicted first: the least recently used; last: the slot to copy from, then the contents of the chosen slot.
        victims = sorted((place for place in free if place != chosen), key=lambda at: (at == source, self._slots[at].used_at))
        evicted = []
        for place in (*victims, chosen):
            if left >= 0:
                break
            if (gain := self._slots[place].touched - (need if place == chosen else 0)) > 0:
                evicted.append(place)
                left += gain
        if left < 0:
            return None
        if source in evicted or not reused:
            source, reused = chosen, 0
        cached_ids = list(prefix[:reused])
        for place in evicted:
            self._slots[place].cached_ids, self._slots[place].touched = [], 0
        self._slots[chosen] = _Slot(cached_ids, adapter, reserved=need, touched=self._slots[chosen].touched)
        return SlotAllocation(chosen, source, reused, tuple(evicted))

    def _choose(self, free: Sequence[int], source: int, reused: int, left: int) -> int:
        """The free slot to use; `left` positions would stay unused if it were an empty one.

        First choice is the slot whose whole contents are reused, which needs no copy; then an empty slot, if memory allows; then
        the least recently used. Ties go to the lowest slot, because adjacent slots in use are read as one view.
        """
        if reused and source in free and len(self._slots[source].cached_ids) == reused:
            return source
        empty = [place for place in free if not self._slots[place].cached_ids]
        if empty and (left >= 0 or len(empty) == len(free)):
            return empty[0]
        return min((place for place in free if self._slots[place].cached_ids), key=lambda place: self._slots[place].used_at)

    def count_reusable(self, prefix: Sequence[int], adapter: int) -> int:
        """Number of positions that a request with this prefix would reuse now."""
        return self._longest_match(prefix, adapter)[1]

    def append(self, place: int, ids: Sequence[int]) -> None:
        """Records that the slot now has the keys and values of `ids` too."""
        self._slots[place].cached_ids += ids

    def release(self, place: int, used: int) -> None:
        """Frees the slot of a request that has ended and used `used` positions; its contents stay for reuse."""
        slot = self._slots[place]
        self._releases += 1
        slot.touched, slot.reserved, slot.used_at = max(slot.touched, min(used, slot.reserved)), 0, self._releases

    def _longest_match(self, prefix: Sequence[int], adapter: int) -> tuple[int, int]:
        """The slot with the longest common beginning with `prefix`, and its length; 0 below `LEAST_REUSED`."""
        lengths = (
            (common_prefix_length(slot.cached_ids, prefix) if slot.adapter == adapter else 0, -place)
            for place, slot in enumerate(self._slots)
        )
        reused, source = max(lengths)
        return (-source, reused) if reused >= LEAST_REUSED else (-source, 0)


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix, by bisection."""
    low, high = 0, min(len(one), len(other))
    if not high or one[0] != other[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
