"""Admission to the memory for keys and values: what fits is let in, what past requests left goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.errors import ModelError
from apprentice.models.slots import Slots, Taken, common, positions_within


def test_the_example_of_the_module() -> None:
    for need, expected in ((10, Taken(1, 1, 0, ())), (15, Taken(1, 1, 0, (2,))), (18, Taken(1, 1, 0, (2,))), (19, None)):
        slots = Slots(3, tokens=30)
        assert [slots.take(size) for size in (12, 10, 8)] == [Taken(place, place, 0, ()) for place in range(3)]
        assert slots.take(1) is None  # no slot
        slots.release(1, used=10)
        slots.release(2, used=8)
        assert slots.take(need) == expected
        if expected is None:
            slots.release(0, used=12)
            assert slots.take(need) == Taken(0, 0, 0, (1,))  # 12 grow to 19; of 10 and 8 the older go


def test_what_was_used_longest_ago_is_given_up_first() -> None:
    slots = Slots(4, tokens=100)
    for _ in range(3):
        slots.take(30)
    for place in (2, 0, 1):
        slots.release(place, used=30)
    taken = slots.take(70)
    assert taken == Taken(0, 0, 0, (2,))  # 90 are taken; slot 0 grows by 40, and 30 of slot 2 make up for it
    assert slots.take(31) is None
    assert slots.take(30) == Taken(1, 1, 0, ())


def test_a_prompt_that_begins_alike_is_shared_under_the_same_adapter_alone() -> None:
    slots = Slots(3, tokens=300)
    prompt = list(range(40))
    slots.take(50, prompt, adapter=7)
    slots.hold(0, prompt)
    assert slots.take(50, [*prompt, 5], adapter=7) == Taken(1, 0, 40, ())
    assert (slots.shared(prompt, 7), slots.shared(prompt[:31], 7), slots.shared(prompt, 8), slots.shared(prompt, 0)) == (
        40,
        0,
        0,
        0,
    )
    assert slots.take(50, prompt, adapter=8) == Taken(2, 2, 0, ())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1), st.booleans()), min_size=1, max_size=60))
def test_the_limit_holds_and_nobody_waits_for_ever(requests: list[tuple[int, int, bool]]) -> None:
    slots, touched, running = Slots(4, tokens=60), [0] * 4, {}
    for need, adapter, ends in requests:
        while (taken := slots.take(need, list(range(need)), adapter)) is None:
            assert running  # with nobody running everything fits
            place, size = running.popitem()
            slots.release(place, size)
        assert taken.slot not in running
        assert taken.source not in taken.emptied or not taken.shared
        for place in taken.emptied:
            assert place not in running
            touched[place] = 0
        touched[taken.slot] = max(touched[taken.slot], need)
        running[taken.slot] = need
        slots.hold(taken.slot, list(range(need))[taken.shared :])
        assert sum(touched) <= 60
        if ends:
            slots.release(taken.slot, running.pop(taken.slot))


def test_bytes_become_positions() -> None:
    assert positions_within(None, 100, slots=4, context=50) == 200
    assert positions_within(12_345, 100, slots=4, context=50) == 123
    assert positions_within(10**9, 100, slots=4, context=50) == 200
    with pytest.raises(ModelError, match="room for 1 tokens of 100 bytes each"):
        positions_within(199, 100, slots=4, context=50)
    assert [common(one, [1, 2, 3]) for one in ([], [2], [1, 2], [1, 2, 3, 4], [1, 3])] == [0, 0, 2, 3, 1]
