"""Metrics: a prediction against its references, as small statistics that add up over examples.

Every metric gives each example a short vector and turns a sum of such vectors into a score from 0 to 100. Means and corpus
BLEU then look alike, and a bootstrap only adds vectors. Knows nothing of models, rows or wordings.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """`statistics(prediction, references)` is one example's vector; `value(sums, counts)` is the score of many.

    `sums` has shape (…, width) and `counts` (how many examples are in each sum) has shape (…); the scores have shape (…).
    """

    title: str
    statistics: Callable[[str, Sequence[str]], tuple[float, ...]]
    value: Callable[[Floats, Floats], Floats]

    def of_one(self, prediction: str, references: Sequence[str]) -> float:
        """The score of a single prediction, 0 to 100."""
        return float(self.value(np.array(self.statistics(prediction, references)), np.array(1.0)))


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and the articles a, an, the; single blanks.

    "The  Eiffel Tower!" becomes "eiffel tower".
    """
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _accuracy(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    return (float(prediction.strip() in [reference.strip() for reference in references]),)


def _exact_match(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    return (float(normalised(prediction) in [normalised(reference) for reference in references]),)


def _token_f1(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    return (max(_overlap(normalised(prediction).split(), normalised(reference).split()) for reference in references),)


def _overlap(said: list[str], right: list[str]) -> float:
    """F1 of the two bags of words; as in SQuAD 2.0, an empty side agrees only with an empty side."""
    if not said or not right:
        return float(said == right)
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right))


def _rouge_l(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    return (float(_rouge_scorer().score_multi(list(references), prediction)["rougeL"].fmeasure),)


def _bleu(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """Matching n-grams (4), n-grams said (4), length said, length of the nearest reference: sacrebleu adds these over a corpus."""
    found = _bleu_scorer().corpus_score([prediction], [[reference] for reference in references])
    return (*map(float, found.counts), *map(float, found.totals), float(found.sys_len), float(found.ref_len))


def _mean(sums: Floats, counts: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(100.0 * sums[..., 0] / counts)


def _corpus_bleu(sums: Floats, counts: Floats) -> Floats:
    flat = sums.reshape(-1, 10).round().astype(int)
    scores = [_bleu_of(row.tolist()) if count else float("nan") for row, count in zip(flat, counts.reshape(-1), strict=True)]
    return np.array(scores).reshape(counts.shape)


def _bleu_of(row: list[int]) -> float:
    scorer = _bleu_scorer()
    return float(scorer.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method=scorer.smooth_method).score)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)  # as in T5 and FLAN; the stemmer knows English only


@cache
def _bleu_scorer() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()  # 13a tokens, exponential smoothing, mixed case: sacrebleu's own defaults


_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy, _mean),
    "exact_match": Metric("exact match", _exact_match, _mean),
    "token_f1": Metric("token F1", _token_f1, _mean),
    "rouge_l": Metric("ROUGE-L", _rouge_l, _mean),
    "bleu": Metric("BLEU", _bleu, _corpus_bleu),
}
