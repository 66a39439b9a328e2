"""Metrics: a prediction against its references, as statistics that can be summed over examples.

Every metric gives each example a short vector, and turns a sum of such vectors into a score, 0 to 100 for most. Means and corpus
BLEU are then computed alike, and a bootstrap only adds vectors.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apprentice.evaluate.compat import chrf_score, chrf_statistics
from apprentice.tasks.dialogue import are_same_calls, read_calls

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

Floats = NDArray[np.float64]
Statistics = Callable[[str, Sequence[str], Sequence[str]], tuple[float, ...]]  # (prediction, references, choices) → vector


@dataclass(frozen=True)
class Metric:
    """Metric: `statistics(prediction, references, choices)` is the vector of one example, `value(sums, counts)` the score of many.

    `sums` has shape (…, width) and `counts`, the number of examples in each sum, shape (…); the scores have shape (…). Vectors of
    different widths are padded with zeros at the end before they are added. `single` is the metric for a single prediction, if this
    one is defined for many only. A `binary` metric finds each prediction right or wrong, and its score is the share of right ones.
    `least` is the lowest possible score.
    """

    title: str
    statistics: Statistics
    value: Callable[[Floats, Floats], Floats]
    single: str | None = None
    binary: bool = False
    least: float = 0.0
    signature: Callable[[], str] | None = None  # the reference implementation's name of its settings

    def score_one(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        """Score of a single prediction, by the metric `single` if there is one."""
        if self.single:
            return METRICS[self.single].score_one(prediction, references, choices)
        return float(self.value(np.array(self._vector(prediction, references, choices)), np.array(1.0)))

    def statistics_of(self, answers: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> Floats:
        """Vectors of many (prediction, references, choices), padded to one shape (answers, width)."""
        vectors = [self._vector(*answer) for answer in answers]
        width = max(map(len, vectors), default=0)
        return np.array([[*vector, *[0.0] * (width - len(vector))] for vector in vectors]).reshape(len(vectors), width)

    def _vector(self, prediction: str, references: Sequence[str], choices: Sequence[str]) -> tuple[float, ...]:
        return _statistics_once(self.statistics, prediction, tuple(references), tuple(choices or ()))


@lru_cache(maxsize=1 << 16)
def _statistics_once(
    statistics: Statistics, prediction: str, references: tuple[str, ...], choices: tuple[str, ...]
) -> tuple[float, ...]:
    """Vector of one example, remembered: the table of predictions and the report need the same ones, as do some metrics."""
    return statistics(prediction, references, choices)


def normalise_squad(text: str) -> str:
    """Text in SQuAD's normal form: lower case, without ASCII punctuation and the articles a, an, the; single blanks.

    "The  Eiffel Tower!" becomes "eiffel tower".
    """
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def strip_punctuation(text: str) -> str:
    """Text in Super-NaturalInstructions' normal form: lower case, without ASCII punctuation, single blanks; articles stay."""
    return " ".join("".join(character for character in text.lower() if character not in _PUNCTUATION).split())


def _accuracy(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    return (float(prediction.strip() in [reference.strip() for reference in references]),)


def _exact_match(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    return (float(normalise_squad(prediction) in [normalise_squad(reference) for reference in references]),)


def _same_calls(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    """1 if the prediction makes the calls of a reference; see `model_pool.generate.answer_in` for their form."""
    calls = read_calls(prediction)
    return (float(any(are_same_calls(calls, read_calls(reference)) for reference in references)),)


def _token_f1(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    return (max(_overlap(normalise_squad(prediction).split(), normalise_squad(reference).split()) for reference in references),)


def _overlap(predicted: list[str], right: list[str]) -> float:
    """F1 of the two bags of words; as in SQuAD 2.0, an empty side agrees only with an empty side."""
    if not predicted or not right:
        return float(predicted == right)
    shared = sum((Counter(predicted) & Counter(right)).values())
    return 2 * shared / (len(predicted) + len(right))


def _ni_exact_match(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    return (float(strip_punctuation(prediction) in [strip_punctuation(reference) for reference in references]),)


def _rouge(kind: str, *, stemmer: bool = False) -> Statistics:
    """Statistics of `rouge1`, `rouge2` or `rougeL`: the best F-measure over the references."""

    def statistics(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
        return (float(_rouge_scorer(kind, stemmer).score_multi(list(references), prediction)[kind].fmeasure),)

    return statistics


def _bleu(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    """Matching n-grams (4), n-grams of the prediction (4), its length, that of the nearest reference; sacrebleu sums them so."""
    score = _bleu_scorer().corpus_score([prediction], [[reference] for reference in references])
    return (*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len))


def _chrf(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    """For each order: n-grams of the prediction, of the best reference, and shared; sacrebleu sums these over a corpus."""
    return tuple(map(float, chrf_statistics(_chrf_scorer(), prediction, references)))


def _labels(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    """[right, predicted 0, expected 0, predicted 1, expected 1, …] over the indices of the choices, and one for other texts."""
    predicted, expected = label_of(prediction, choices), label_of(references[0], choices)
    vector = [0.0] * (1 + 2 * max(len(choices), predicted + 1, expected + 1))
    vector[0] = float(predicted == expected)
    vector[1 + 2 * predicted] = 1.0
    vector[2 + 2 * expected] = 1.0
    return tuple(vector)


def _longer(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> tuple[float, ...]:
    """1 if a longest choice (in characters) was predicted, less 1 if a longest is right; 0 if all are equally long."""
    sizes = {len(choice.strip()) for choice in choices}
    if len(sizes) < 2:
        return (0.0,)
    return (float(len(prediction.strip()) == max(sizes)) - float(len(references[0].strip()) == max(sizes)),)


def label_of(text: str, choices: Sequence[str]) -> int:
    """Index of `text` among `choices`; `len(choices)` for any other text."""
    return next((place for place, choice in enumerate(choices) if choice.strip() == text.strip()), len(choices))


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


def _corpus_chrf(sums: Floats, counts: Floats) -> Floats:
    scorer = _chrf_scorer()
    flat = sums.reshape(-1, sums.shape[-1]).round().astype(int)
    scores = [
        chrf_score(scorer, row.tolist()) if count else float("nan") for row, count in zip(flat, counts.reshape(-1), strict=True)
    ]
    return np.array(scores).reshape(counts.shape)


def _matthews(sums: Floats, counts: Floats) -> Floats:
    """Matthews correlation of predicted and right labels, for any number of labels (Gorodkin's R_K); 0 where one is constant."""
    right, predicted, expected = sums[..., 0], sums[..., 1::2], sums[..., 2::2]
    covariance = right * counts - (predicted * expected).sum(axis=-1)
    spread = (counts**2 - (predicted**2).sum(axis=-1)) * (counts**2 - (expected**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.where(spread > 0, 100.0 * covariance / np.sqrt(np.maximum(spread, 1e-12)), 0.0)
    return np.asarray(np.where(counts > 0, correlation, np.nan))


def _agreement(sums: Floats, counts: Floats) -> Floats:
    """Similarity of the shares of labels among predictions and right answers: 100 less half the summed difference in percent."""
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.abs(sums[..., 1::2] - sums[..., 2::2]).sum(axis=-1) / (2 * counts)
    return np.asarray(100.0 * (1.0 - apart))


@cache
def _rouge_scorer(kind: str, stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=stemmer)


def _bleu_signature() -> str:
    scorer = _bleu_scorer()
    scorer.corpus_score(["a"], [["a"]])  # the signature has the number of references, which is set by scoring
    return f"sacrebleu {scorer.get_signature().format()}"


def _chrf_signature() -> str:
    scorer = _chrf_scorer()
    scorer.corpus_score(["a"], [["a"]])
    return f"sacrebleu {scorer.get_signature().format()}"


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()  # chrF2, characters up to 6, no words: sacrebleu's own defaults


@cache
def _bleu_scorer() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()  # 13a tokens, exponential smoothing, mixed case: sacrebleu's own defaults


_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

# A metric is one line here and its name in `apprentice.tasks.report_schema.Metric`.
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy, _mean, binary=True),
    "exact_match": Metric("exact match", _exact_match, _mean, binary=True),
    "token_f1": Metric("token F1", _token_f1, _mean),
    # Without a stemmer, as in T5 and FLAN; it knows English only.
    "rouge_1": Metric("ROUGE-1", _rouge("rouge1"), _mean),
    "rouge_2": Metric("ROUGE-2", _rouge("rouge2"), _mean),
    "rouge_l": Metric("ROUGE-L", _rouge("rougeL"), _mean),
    "bleu": Metric("BLEU", _bleu, _corpus_bleu, signature=_bleu_signature),
    "chrf": Metric("chrF", _chrf, _corpus_chrf, signature=_chrf_signature),
    "matthews": Metric("Matthews", _labels, _matthews, single="accuracy", least=-100.0),
    "label_distribution": Metric("label distribution", _labels, _agreement, single="accuracy"),
    # In points: +10 means that the longer answer of a pair is chosen 10 times in 100 more often than it is the better one.
    "length_bias": Metric("length bias", _longer, _mean, single="accuracy", least=-100.0),
    # As Super-NaturalInstructions scores: with a stemmer, and articles count.
    "ni_rouge_l": Metric("ROUGE-L (NI)", _rouge("rougeL", stemmer=True), _mean),
    # By the parsed form: names and arguments by type, parallel calls in any order; where no call is right, none must be made.
    "tool_calls": Metric("calls", _same_calls, _mean, binary=True),
    "ni_exact_match": Metric("exact match (NI)", _ni_exact_match, _mean, binary=True),
}
