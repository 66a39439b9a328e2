"""Rank classification: the prediction is the choice with the largest log-probability after the prompt.

A choice's tokens are its own and those that end an answer in the layout, exactly what training taught the model to write: the sum
is the probability that the whole reply is this choice. Without the end, "card payment" would always beat "card payment fee", as
a prefix is never less likely than what continues it. Three ways to compare are in `models.ranking`; sums, as in
T0, are the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apprentice.errors import EvaluationError
from apprentice.inference.choice_ranking import RANKINGS, best
from apprentice.model_pool.generate import question_name


def ranked(record: Mapping[str, Any], rank_by: str) -> str:
    """The choice that wins for a scored question: a record with `choices`, `choice_logprobs`, `choice_tokens`, `choice_priors`.

    Raises `EvaluationError` where a number is not finite: no choice is then larger than another.
    """
    priors = record["choice_priors"] if rank_by == "pmi" else ()
    scores = RANKINGS[rank_by](record["choice_logprobs"], record["choice_tokens"], priors)
    check_finite(record, scores)
    return str(record["choices"][best(scores)])


def check_finite(record: Mapping[str, Any], numbers: Sequence[float]) -> None:
    """Raises `EvaluationError` with the question's name where one of the model's `numbers` about it is NaN or infinite."""
    if not all(map(math.isfinite, numbers)):
        raise EvaluationError(
            f"{question_name(record)}: the model gives {', '.join(f'{value:.4g}' for value in numbers)}, and what is not finite has"
            " no order; its weights are damaged, or they leave their number format's range: try model.dtype float32."
        )


def by_prior(
    questions: Sequence[Mapping[str, Any]], score: Callable[[Sequence[Sequence[Sequence[int]]]], list[list[float]]]
) -> list[list[float]]:
    """The prior of every question's choices; `score` gives those of lists of choices, and meets each list of choices once."""
    keys = [tuple(tuple(ids) for ids in question["choice_ids"]) for question in questions]
    different = list(dict.fromkeys(keys))
    found = dict(zip(different, score([list(map(list, key)) for key in different]), strict=True))
    return [found[key] for key in keys]
