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

from apprentice.errors import ModelError

# Shorter common prefixes than this, in tokens, are computed again instead of copied from another slot.
LEAST_SHARED = 32


@dataclass
class _Slot:
    held: list[int]  # token ids whose keys and values the slot has, of past requests too
    adapter: int = 0  # number of the adapter that they were computed with, 0 for none
    reserved: int = 0  # positions that the running request may come to need; 0: free
    touched: int = 0  # positions that take memory
    used_at: int = 0  # number of the slot's last release, for the order of eviction


@dataclass(frozen=True)
class Taken:
    """Slot allocated to a request. The caller frees the memory of the slots `emptied`, then copies the prefix from `source`.

    `shared` is the number of positions to reuse; nothing is to be copied where `source` is `slot`.
    """

    slot: int
    source: int
    shared: int
    emptied: tuple[int, ...]


class Slots:
    """Allocator of `count` slots that together hold up to `tokens` positions."""

    def __init__(self, count: int, tokens: int) -> None:
        self.tokens = tokens
        self._all = [_Slot([]) for _ in range(count)]
        self._releases = 0

    @property
    def reserved(self) -> int:
        """Positions reserved for the running requests."""
        return sum(slot.reserved for slot in self._all)

    def take(self, need: int, prefix: Sequence[int] = (), adapter: int = 0) -> Taken | None:
        """Allocates a slot for a request of up to `need` positions; None if it must wait.

        `prefix` are the prompt's token ids that may be reused from the cache, `adapter` the number of its adapter, 0 for none.
        """
        free = [place for place, slot in enumerate(self._all) if not slot.reserved]
        if not free:
            return None
        source, shared = self._like(prefix, adapter)
        taken = sum(max(slot.touched, slot.reserved) for slot in self._all)
        chosen = self._choose(free, source, shared, self.tokens - taken - need)
        left = self.tokens - taken - max(0, need - self._all[chosen].touched)
        # Evicted first: the least recently used; last: the slot to copy from, then the contents of the chosen slot.
        victims = sorted((place for place in free if place != chosen), key=lambda at: (at == source, self._all[at].used_at))
        emptied = []
        for place in (*victims, chosen):
            if left >= 0:
                break
            if (gain := self._all[place].touched - (need if place == chosen else 0)) > 0:
                emptied.append(place)
                left += gain
        if left < 0:
            return None
        if source in emptied or not shared:
            source, shared = chosen, 0
        held = list(prefix[:shared])
        for place in emptied:
            self._all[place].held, self._all[place].touched = [], 0
        self._all[chosen] = _Slot(held, adapter, reserved=need, touched=self._all[chosen].touched)
        return Taken(chosen, source, shared, tuple(emptied))

    def _choose(self, free: Sequence[int], source: int, shared: int, left: int) -> int:
        """The free slot to use; `left` positions would stay unused if it were an empty one.

        First choice is the slot whose whole contents are shared, which needs no copy; then an empty slot, if memory allows; then
        the least recently used. Ties go to the lowest slot, because adjacent slots in use are read as one view.
        """
        if shared and source in free and len(self._all[source].held) == shared:
            return source
        empty = [place for place in free if not self._all[place].held]
        if empty and (left >= 0 or len(empty) == len(free)):
            return empty[0]
        return min((place for place in free if self._all[place].held), key=lambda place: self._all[place].used_at)

    def shared(self, prefix: Sequence[int], adapter: int) -> int:
        """Number of positions that a request with this prefix would reuse now."""
        return self._like(prefix, adapter)[1]

    def hold(self, place: int, ids: Sequence[int]) -> None:
        """Records that the slot now has the keys and values of `ids` too."""
        self._all[place].held += ids

    def release(self, place: int, used: int) -> None:
        """Frees the slot of a request that has ended and used `used` positions; its contents stay for reuse."""
        slot = self._all[place]
        self._releases += 1
        slot.touched, slot.reserved, slot.used_at = max(slot.touched, min(used, slot.reserved)), 0, self._releases

    def _like(self, prefix: Sequence[int], adapter: int) -> tuple[int, int]:
        """The slot with the longest common beginning with `prefix`, and its length; 0 below `LEAST_SHARED`."""
        alike = ((common(slot.held, prefix) if slot.adapter == adapter else 0, -place) for place, slot in enumerate(self._all))
        shared, source = max(alike)
        return (-source, shared) if shared >= LEAST_SHARED else (-source, 0)


def positions_within(limit: int | None, of_one: int, slots: int, context: int) -> int:
    """Number of positions of `of_one` bytes that fit into `limit` bytes (None: no limit), at most `slots` times `context`.

    Raises `ModelError` where not even two positions fit, one for a prompt and one for a reply.
    """
    most = slots * context
    if limit is None:
        return most
    if limit < 2 * of_one:
        raise ModelError(f"serving.kv_memory_gb gives room for {limit // of_one} tokens of {of_one} bytes each; give more.")
    return min(most, limit // of_one)


def common(one: Sequence[int], other: Sequence[int]) -> int:
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
