"""Private API of sacrebleu, with the version it was read in.

sacrebleu has no public way to a sentence's chrF statistics, nor from summed statistics to a score. tests/evaluate/test_compat.py
fails where these change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF


def chrf_statistics(scorer: CHRF, prediction: str, references: Sequence[str]) -> list[int]:
    """Statistics of one sentence, three numbers for each order of n-grams (sacrebleu 2.6): of the prediction, reference, shared."""
    [statistics] = scorer._extract_corpus_statistics([prediction], [[reference] for reference in references])
    return [int(count) for count in statistics]


def chrf_score(scorer: CHRF, statistics: Sequence[int]) -> float:
    """Score, 0 to 100, of statistics summed over sentences (sacrebleu 2.6)."""
    return float(scorer._compute_f_score(list(statistics)))
