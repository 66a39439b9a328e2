"""Built-in rows of `quickstart` and of tasks beside it, made by seeded pure functions, so that a fresh machine needs no dataset.

A generator takes a random source (`SeededRandom`) and the row's number and returns one row: a flat dict whose *first* column is the
text by which rows are told apart. The wordings of each task are in `tasks/library/quickstart/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from apprentice.errors import TaskError, did_you_mean
from apprentice.tasks.builtin.knowledge import one_of_a_kind
from apprentice.tasks.builtin.numbers import word_problems, written_dates
from apprentice.tasks.builtin.opinions import message_moods, short_reviews
from apprentice.tasks.builtin.pairs import composed_inference, same_meaning
from apprentice.tasks.builtin.passages import passage_questions, product_sentences
from apprentice.tasks.builtin.seeded_random import SeededRandom
from apprentice.tasks.builtin.subjects import assistant_requests, headline_topics
from apprentice.tasks.builtin.tool_calls import device_calls, thought_sums

VERSION = 2  # raise it with any change of the rows; a test compares their checksum
ROWS = {"train": 400, "test": 100}

GENERATORS: dict[str, Callable[[SeededRandom, int], dict[str, Any]]] = {
    "assistant_requests": assistant_requests,
    "composed_inference": composed_inference,
    "headline_topics": headline_topics,
    "message_moods": message_moods,
    "one_of_a_kind": one_of_a_kind,
    "passage_questions": passage_questions,
    "product_sentences": product_sentences,
    "same_meaning": same_meaning,
    "short_reviews": short_reviews,
    "word_problems": word_problems,
    "written_dates": written_dates,
}
# Of tasks that are not in the mixture.
OTHER_GENERATORS: dict[str, Callable[[SeededRandom, int], dict[str, Any]]] = {
    "device_calls": device_calls,
    "thought_sums": thought_sums,
}


def rows(name: str, split: Literal["train", "test"]) -> list[dict[str, Any]]:
    """All rows of one split of a generator, the same in every process.

    No two rows of a task have the same words in their first column, so none of a test split is in the training split. Raises
    `TaskError` for an unknown name or split.
    """
    generators = GENERATORS | OTHER_GENERATORS
    if name not in generators:
        raise TaskError(f"builtin: {name!r} is not built in.{did_you_mean(name, generators)} Built in are {', '.join(generators)}.")
    if split not in ROWS:
        raise TaskError(f"builtin {name!r} has no split {split!r}.{did_you_mean(split, ROWS)} Its splits are {', '.join(ROWS)}.")
    row_of_words: dict[tuple[str, ...], dict[str, Any]] = {}
    rng = SeededRandom(f"{VERSION}/{name}")
    while len(row_of_words) < sum(ROWS.values()):
        row = generators[name](rng, len(row_of_words))
        row_of_words.setdefault(_words(next(iter(row.values()))), row)
    table = list(row_of_words.values())
    # Generators cycle through their labels, which balances each split; shuffling removes the order of labels.
    return rng.shuffled(table[: ROWS["train"]]) if split == "train" else rng.shuffled(table[ROWS["train"] :])


def _words(text: str | list[str]) -> tuple[str, ...]:
    """Key by which rows are told apart: their words in sorted order, so that `a, b` in test is not `b, a` in train."""
    words = text.split() if isinstance(text, str) else text
    return tuple(sorted(word.strip(".,;:!?").lower() for word in words))
