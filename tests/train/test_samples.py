"""Replies to fixed instructions: as many passes whatever is said, and cut where the model ends them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from apprentice.data.layout import Layout
from apprentice.recipe import Training
from apprentice.tokenizer import Tokenizer
from apprentice.train.samples import MOST_TOKENS, Samples


def test_a_reply_ends_where_the_model_ends_it_and_takes_no_fewer_passes(tiny_model: Path) -> None:
    layout = Layout("plain", Tokenizer(tiny_model))
    said = layout.encode_answers(["a red kite"])[0]
    asked: list[tuple[list[int], list[int]]] = []

    def likeliest(prompt: Sequence[int], reply: Sequence[int]) -> int:
        asked.append((list(prompt), list(reply)))
        return said[len(reply)] if len(reply) < len(said) else layout.stop_ids[0]

    taken = Samples(layout, ["Name a thing.", "And another."]).taken(likeliest)
    assert taken == [{"instruction": text, "reply": "a red kite"} for text in ("Name a thing.", "And another.")]
    assert len(asked) == 2 * MOST_TOKENS
    assert asked[0] == (layout.encode_prompt(layout.prompt("Name a thing.")), [])
    assert asked[MOST_TOKENS - 1][1][: len(said)] == said


def test_a_reward_model_is_not_asked_for_replies() -> None:
    with pytest.raises(ValidationError, match="`sample_every_steps` shows replies, and a reward model writes none; leave it out"):
        Training(objective="reward", steps=2, sample_every_steps=1)
