"""Ranking rules for answer choices: log-probabilities to one score per choice. Evaluation and the endpoint share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Logprobs = Sequence[float]

# Name → (summed log-probabilities, token counts, the same sums after an empty question) → the score of each choice.
RANKINGS: dict[str, Callable[[Logprobs, Sequence[int], Logprobs], list[float]]] = {
    "sum": lambda sums, tokens, priors: list(sums),
    "mean": lambda sums, tokens, priors: [value / count for value, count in zip(sums, tokens, strict=True)],
    "pmi": lambda sums, tokens, priors: [value - prior for value, prior in zip(sums, priors, strict=True)],
}
RANKING_TITLES = {
    "sum": "the summed log-probability of the choice and the end of the answer, as in T0",
    "mean": "the log-probability per token of the choice and the end of the answer",
    "pmi": "pointwise mutual information: the summed log-probability less the same after an empty question",
}


def index_of_best(scores: Sequence[float]) -> int:
    """Index of the largest score; the first of equal ones."""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))
