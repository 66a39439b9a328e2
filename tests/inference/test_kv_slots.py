"""Admission to the memory for keys and values: what fits is let in, what past requests left goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.errors import ModelError
from apprentice.inference.kv_slots import Slots, Taken, common, positions_within


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


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("count", [4, 32])
def test_prompts_that_take_turns_are_all_kept(prompts: int, count: int) -> None:
    """One request after another, each with one of some system prompts of 500 tokens, a question and a reply of its own."""
    slots, shared = Slots(count, tokens=count * 1000), 0
    for number in range(20):
        system = [10_000 * (number % prompts) + place for place in range(500)]
        prompt = [*system, *(100_000 + 100 * number + place for place in range(60))]
        taken = slots.take(700, prompt[:-1])
        assert taken is not None
        shared += taken.shared
        slots.hold(taken.slot, prompt[taken.shared :])
        slots.release(taken.slot, used=600)
    assert shared == (20 - prompts) * 500


def test_a_conversation_goes_on_where_it_is_and_does_not_cost_the_others_theirs() -> None:
    slots = Slots(2, tokens=2000)
    histories = [list(range(base, base + 100)) for base in (0, 1000)]
    places = set()
    for turn in range(4):
        for talk, history in enumerate(histories):
            taken = slots.take(len(history) + 50, history)
            assert taken is not None
            places.add((talk, taken.slot))
            assert taken.shared == (len(history) - 5 if turn else 0)
            slots.hold(taken.slot, history[taken.shared :])
            slots.release(taken.slot, len(history))
            history += range(len(history), len(history) + 5)
    assert len(places) == 2


def test_an_empty_slot_costs_no_memory_that_others_hold() -> None:
    slots = Slots(3, tokens=100)
    for place, ids in enumerate((range(50), range(100, 140))):
        assert slots.take(50, list(ids)) == Taken(place, place, 0, ())
        slots.hold(place, list(ids))
        slots.release(place, used=50)
    assert slots.take(40, list(range(200, 240))) == Taken(0, 0, 0, ())  # the empty one would have to take 40 from the others


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
