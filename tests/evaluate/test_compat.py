"""Private API of sacrebleu: summed statistics of sentences still have the score that its public call gives to the corpus."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF

from apprentice.evaluate.compat import chrf_score, chrf_statistics

PREDICTIONS = ["the cat sat on the mat", "a dog", ""]
REFERENCES = [["the cat is on the mat", "there is a cat"], ["a dog barks", "dogs bark"], ["nothing", "none"]]


def test_summed_statistics_have_the_score_of_the_corpus() -> None:
    scorer = CHRF()
    statistics = [chrf_statistics(scorer, text, references) for text, references in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert {len(numbers) for numbers in statistics} == {3 * scorer.order}
    corpus = scorer.corpus_score(PREDICTIONS, [list(column) for column in zip(*REFERENCES, strict=True)])
    assert chrf_score(scorer, np.sum(statistics, axis=0).tolist()) == pytest.approx(corpus.score)
