"""Admission to the memory for keys and values: what fits is let in, what past requests left goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.inference.kv_slots import KvSlots, SlotAllocation, common_prefix_length


def test_the_example_of_the_module() -> None:
    for need, expected in (
        (10, SlotAllocation(1, 1, 0, ())),
        (15, SlotAllocation(1, 1, 0, (2,))),
        (18, SlotAllocation(1, 1, 0, (2,))),
        (19, None),
    ):
        slots = KvSlots(3, positions=30)
        assert [slots.allocate(size) for size in (12, 10, 8)] == [SlotAllocation(place, place, 0, ()) for place in range(3)]
        assert slots.allocate(1) is None  # no slot
        slots.release(1, used=10)
        slots.release(2, used=8)
        assert slots.allocate(need) == expected
        if expected is None:
            slots.release(0, used=12)
            assert slots.allocate(need) == SlotAllocation(0, 0, 0, (1,))  # 12 grow to 19; of 10 and 8 the older go


def test_what_was_used_longest_ago_is_given_up_first() -> None:
    slots = KvSlots(4, positions=100)
    for _ in range(3):
        slots.allocate(30)
    for place in (2, 0, 1):
        slots.release(place, used=30)
    allocation = slots.allocate(70)
    assert allocation == SlotAllocation(0, 0, 0, (2,))  # 90 are allocation; slot 0 grows by 40, and 30 of slot 2 make up for it
    assert slots.allocate(31) is None
    assert slots.allocate(30) == SlotAllocation(1, 1, 0, ())


def test_a_prompt_that_begins_alike_is_shared_under_the_same_adapter_alone() -> None:
    slots = KvSlots(3, positions=300)
    prompt = list(range(40))
    slots.allocate(50, prompt, adapter=7)
    slots.append(0, prompt)
    assert slots.allocate(50, [*prompt, 5], adapter=7) == SlotAllocation(1, 0, 40, ())
    assert (
        slots.count_reusable(prompt, 7),
        slots.count_reusable(prompt[:31], 7),
        slots.count_reusable(prompt, 8),
        slots.count_reusable(prompt, 0),
    ) == (
        40,
        0,
        0,
        0,
    )
    assert slots.allocate(50, prompt, adapter=8) == SlotAllocation(2, 2, 0, ())


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("count", [4, 32])
def test_prompts_that_take_turns_are_all_kept(prompts: int, count: int) -> None:
    """One request after another, each with one of some system prompts of 500 tokens, a question and a reply of its own."""
    slots, shared = KvSlots(count, positions=count * 1000), 0
    for number in range(20):
        system = [10_000 * (number % prompts) + place for place in range(500)]
        prompt = [*system, *(100_000 + 100 * number + place for place in range(60))]
        allocation = slots.allocate(700, prompt[:-1])
        assert allocation is not None
        shared += allocation.reused
        slots.append(allocation.slot, prompt[allocation.reused :])
        slots.release(allocation.slot, used=600)
    assert shared == (20 - prompts) * 500


def test_a_conversation_goes_on_where_it_is_and_does_not_cost_the_others_theirs() -> None:
    slots = KvSlots(2, positions=2000)
    histories = [list(range(base, base + 100)) for base in (0, 1000)]
    places = set()
    for turn in range(4):
        for talk, history in enumerate(histories):
            allocation = slots.allocate(len(history) + 50, history)
            assert allocation is not None
            places.add((talk, allocation.slot))
            assert allocation.reused == (len(history) - 5 if turn else 0)
            slots.append(allocation.slot, history[allocation.reused :])
            slots.release(allocation.slot, len(history))
            history += range(len(history), len(history) + 5)
    assert len(places) == 2


def test_an_empty_slot_costs_no_memory_that_others_hold() -> None:
    slots = KvSlots(3, positions=100)
    for place, ids in enumerate((range(50), range(100, 140))):
        assert slots.allocate(50, list(ids)) == SlotAllocation(place, place, 0, ())
        slots.append(place, list(ids))
        slots.release(place, used=50)
    assert slots.allocate(40, list(range(200, 240))) == SlotAllocation(
        0, 0, 0, ()
    )  # the empty one would have to take 40 from the others


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1), st.booleans()), min_size=1, max_size=60))
def test_the_limit_holds_and_nobody_waits_for_ever(requests: list[tuple[int, int, bool]]) -> None:
    slots, touched, running = KvSlots(4, positions=60), [0] * 4, {}
    for need, adapter, ends in requests:
        while (allocation := slots.allocate(need, list(range(need)), adapter)) is None:
            assert running  # with nobody running everything fits
            place, size = running.popitem()
            slots.release(place, size)
        assert allocation.slot not in running
        assert allocation.source not in allocation.evicted or not allocation.reused
        for place in allocation.evicted:
            assert place not in running
            touched[place] = 0
        touched[allocation.slot] = max(touched[allocation.slot], need)
        running[allocation.slot] = need
        slots.append(allocation.slot, list(range(need))[allocation.reused :])
        assert sum(touched) <= 60
        if ends:
            slots.release(allocation.slot, running.pop(allocation.slot))


def test_common_prefixes_have_a_length() -> None:
    assert [common_prefix_length(one, [1, 2, 3]) for one in ([], [2], [1, 2], [1, 2, 3, 4], [1, 3])] == [0, 0, 2, 3, 1]
