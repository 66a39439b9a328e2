"""Rank classification: the prediction is the choice with the largest log-probability after the prompt.

The tokens of a choice include those that end an answer in the prompt format, exactly as in training, so their sum is the
log-probability that the whole reply is this choice. Without the end, "card payment" would always beat "card payment fee", because a
prefix is never less likely than its continuation. `inference.choices.choice_ranking` has three rules of comparison; sums, as
in T0, are the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apprentice.errors import EvaluationError
from apprentice.inference.choices.choice_ranking import RANKINGS, index_of_best
from apprentice.model_pool.generate import question_name


def best_choice(record: Mapping[str, Any], rank_by: str) -> str:
    """Text of the best choice of a record with `choices`, `choice_logprobs`, `choice_tokens` and `choice_priors`.

    `rank_by` is a name in `choice_ranking.RANKINGS`. Raises `EvaluationError` where a score is not finite.
    """
    priors = record["choice_priors"] if rank_by == "pmi" else ()
    scores = RANKINGS[rank_by](record["choice_logprobs"], record["choice_tokens"], priors)
    check_finite(record, scores)
    return str(record["choices"][index_of_best(scores)])


def check_finite(record: Mapping[str, Any], numbers: Sequence[float]) -> None:
    """Raises `EvaluationError`, which names the question, if one of the model's `numbers` is NaN or infinite."""
    if not all(map(math.isfinite, numbers)):
        raise EvaluationError(
            f"{question_name(record)}: the model gives {', '.join(f'{value:.4g}' for value in numbers)}, and what is not finite has"
            " no order; its weights are damaged, or they leave their number format's range: try model.dtype float32."
        )


def score_priors(
    questions: Sequence[Mapping[str, Any]], score: Callable[[Sequence[Sequence[Sequence[int]]]], list[list[float]]]
) -> list[list[float]]:
    """Priors of the choices of every question; `score` computes those of lists of choices, and gets each distinct list once."""
    keys = [tuple(tuple(ids) for ids in question["choice_ids"]) for question in questions]
    different = list(dict.fromkeys(keys))
    prior_of = dict(zip(different, score([list(map(list, key)) for key in different]), strict=True))
    return [prior_of[key] for key in keys]
