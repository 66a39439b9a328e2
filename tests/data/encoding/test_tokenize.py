"""Examples to ids: what is trained on, and the rule for what is too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.tokenize import CUT_EXEMPLARS, CUT_INPUT, Tokenized, encode, fit_prompt
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.tasks.schema import Example

WORDS = "The film was a delight from the first scene to the last. " * 4
SHOTS = [Exemplar("Is it good?", f"Film {number}.", "yes") for number in range(3)]


def example(input: str = WORDS, target: str = "yes") -> Example:
    return Example("films", "good", "Is it good?", input, target)


@pytest.fixture(scope="module", params=["plain", "alpaca", "chat"])
def layout(request: pytest.FixtureRequest, tiny_model: Path) -> Layout:
    return Layout(request.param, Tokenizer(tiny_model))


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Layout:
    return Layout("plain", Tokenizer(tiny_model))


def one(layout: Layout, max_length: int, shots: list[Exemplar] | None = None, item: Example | None = None) -> Tokenized | None:
    return encode(layout, [(item or example(), shots or [])], max_length)[0]


def test_prompt_answer_and_end(layout: Layout) -> None:
    encoded = one(layout, 1000, SHOTS)
    assert encoded is not None
    text = layout.prompt("Is it good?", WORDS, SHOTS)
    assert encoded.ids[: encoded.prompt_length] == layout.encode_prompt(text)
    assert encoded.ids[encoded.prompt_length :] == [*layout.tokenizer.encode("yes"), *layout.end_ids]
    assert encoded.ids[-1] == layout.tokenizer.end_id
    assert (encoded.exemplars_used, encoded.truncated) == (3, None)


def test_many_at_once_are_as_one_by_one(layout: Layout) -> None:
    items = [(example(WORDS * number), SHOTS[:number]) for number in range(4)]
    assert encode(layout, items, 150) == [encode(layout, [item], 150)[0] for item in items]


def test_exemplars_go_first_and_from_the_last(layout: Layout) -> None:
    lengths = [len(layout.encode_prompt(layout.prompt("Is it good?", WORDS, SHOTS[:used]))) for used in range(4)]
    answer = len(layout.tokenizer.encode("yes")) + len(layout.end_ids)
    for used in range(4):
        encoded = one(layout, lengths[used] + answer, SHOTS)
        assert encoded is not None
        assert encoded.ids[: encoded.prompt_length] == layout.encode_prompt(layout.prompt("Is it good?", WORDS, SHOTS[:used]))
        assert (encoded.exemplars_used, encoded.truncated) == (used, CUT_EXEMPLARS if used < 3 else None)


def test_then_the_input_from_its_end_and_nothing_else(layout: Layout) -> None:
    whole = one(layout, 1000)
    least = one(layout, 1000, item=example(input=""))
    assert whole is not None
    assert least is not None
    shortened = 0
    for max_length in range(len(least.ids), len(whole.ids)):
        encoded = one(layout, max_length, SHOTS)
        assert encoded is not None
        assert len(encoded.ids) <= max_length
        assert (encoded.exemplars_used, encoded.truncated) == (0, CUT_INPUT)
        prompt = layout.tokenizer.decode(encoded.ids[: encoded.prompt_length], skip_special=False)
        kept = next(
            WORDS[:size] for size in range(len(WORDS), -1, -1) if layout.prompt("Is it good?", WORDS[:size].rstrip()) == prompt
        )
        assert WORDS.startswith(kept)
        assert encoded.ids[encoded.prompt_length :] == whole.ids[whole.prompt_length :]
        assert len(encoded.ids) > max_length - 12 or not kept  # not much more is cut than has to be
        shortened += 1
    assert shortened > 50
    assert one(layout, len(least.ids) - 1, SHOTS) is None


def test_answers_are_never_cut(plain: Layout) -> None:
    assert one(plain, 60, item=example(input="", target=WORDS)) is None


def test_characters_are_never_halved(plain: Layout) -> None:
    shortened = 0
    for room in range(14, 60):
        fitted = fit_prompt(plain, example("🙂你好é" * 8), [], room)
        if fitted is not None:
            text = plain.tokenizer.decode(fitted.ids)
            assert "\ufffd" not in text
            assert plain.prompt("Is it good?", "🙂你好é" * 8).startswith(text.rstrip())
            shortened += 1
    assert shortened > 20


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80), room=st.integers(1, 60), shots=st.integers(0, 3))
def test_a_fitted_prompt_keeps_to_its_limit(plain: Layout, text: str, room: int, shots: int) -> None:
    fitted = fit_prompt(plain, example(text), SHOTS[:shots], room)
    bare = len(plain.encode_prompt(plain.prompt("Is it good?")))
    if fitted is None:
        assert bare > room
    else:
        assert len(fitted.ids) <= room
        assert (fitted.truncated is None) == (fitted.ids == plain.encode_prompt(plain.prompt("Is it good?", text, SHOTS[:shots])))
