"""Which request has which slot of the memory for keys and values, what slots still hold of past ones, and how much all may hold.

A request is let in when all that it may come to need (its prompt and its longest reply) fits beside what the running ones may come
to need. What past requests left is kept for prompts that begin alike, and given up, oldest first, where the room is wanted.

    30 positions   slot 0 runs and may come to 12; slots 1 and 2 are free and hold 10 and 8 of past requests
    one of 15      takes slot 1, which grows by 5, and the 8 of slot 2 go
    one of 19      waits until slot 0 is free

Knows nothing of models, tokens' meaning or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apprentice.errors import ModelError

# Positions worth copying from another request's memory instead of computing them.
LEAST_SHARED = 32


@dataclass
class _Slot:
    held: list[int]  # whose keys and values it has, of past requests too
    adapter: int = 0  # under which adapter they were computed, 0 for none
    reserved: int = 0  # positions that the request in it may come to need; 0: free
    touched: int = 0  # positions that take memory
    used_at: int = 0  # count of releases at the time of its own


@dataclass(frozen=True)
class Taken:
    """A request's `slot`; the memory of those in `emptied` is to be given back, `shared` positions to be copied from `source`."""

    slot: int
    source: int
    shared: int
    emptied: tuple[int, ...]


class Slots:
    """`count` slots that together hold up to `tokens` positions."""

    def __init__(self, count: int, tokens: int) -> None:
        self.tokens = tokens
        self._all = [_Slot([]) for _ in range(count)]
        self._releases = 0

    @property
    def reserved(self) -> int:
        """Positions that the running requests may come to need."""
        return sum(slot.reserved for slot in self._all)

    def take(self, need: int, prefix: Sequence[int] = (), adapter: int = 0) -> Taken | None:
        """A slot for a request of up to `need` positions whose prompt begins with `prefix`; None while there is none."""
        free = [place for place, slot in enumerate(self._all) if not slot.reserved]
        if not free:
            return None
        source, shared = self._like(prefix, adapter)
        taken = sum(max(slot.touched, slot.reserved) for slot in self._all)
        chosen = self._choose(free, source, shared, self.tokens - taken - need)
        left = self.tokens - taken - max(0, need - self._all[chosen].touched)
        # Given up first what was used longest ago; last what would be copied, and the chosen slot's own.
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
        """The slot of `free` whose content is worth least; `left` positions stay free where an empty one is taken.

        One of which all is shared goes on where it is; else an empty one is taken, where memory allows; else the one that was used
        longest ago. Of like ones it is the lowest: slots in use that are adjacent are read as one view.
        """
        if shared and source in free and len(self._all[source].held) == shared:
            return source
        empty = [place for place in free if not self._all[place].held]
        if empty and (left >= 0 or len(empty) == len(free)):
            return empty[0]
        return min((place for place in free if self._all[place].held), key=lambda place: self._all[place].used_at)

    def shared(self, prefix: Sequence[int], adapter: int) -> int:
        """How many positions a request with this prefix would take from a slot now."""
        return self._like(prefix, adapter)[1]

    def hold(self, place: int, ids: Sequence[int]) -> None:
        """The slot has the keys and values of `ids` too."""
        self._all[place].held += ids

    def release(self, place: int, used: int) -> None:
        """The request in the slot has ended and used so many positions."""
        slot = self._all[place]
        self._releases += 1
        slot.touched, slot.reserved, slot.used_at = max(slot.touched, min(used, slot.reserved)), 0, self._releases

    def _like(self, prefix: Sequence[int], adapter: int) -> tuple[int, int]:
        """The slot whose memory begins most like `prefix`, and how many positions of it are worth taking."""
        alike = ((common(slot.held, prefix) if slot.adapter == adapter else 0, -place) for place, slot in enumerate(self._all))
        shared, source = max(alike)
        return (-source, shared) if shared >= LEAST_SHARED else (-source, 0)


def positions_within(limit: int | None, of_one: int, slots: int, context: int) -> int:
    """How many positions of `of_one` bytes fit into `limit` bytes, and no more than `slots` contexts; None: no limit.

    Raises `ModelError` where there is no room for a prompt and a reply.
    """
    most = slots * context
    if limit is None:
        return most
    if limit < 2 * of_one:
        raise ModelError(f"serving.kv_memory_gb gives room for {limit // of_one} tokens of {of_one} bytes each; give more.")
    return min(most, limit // of_one)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids the two have in common at their start, by halving."""
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
