"""Metrics against the packages and definitions they follow."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from apprentice.evaluate.stats.metrics import METRICS, Metric, normalise_squad

SAID = [
    "The cat sat on the mat.",
    "a dog barks at night",
    "",
    "Two men are playing chess in the park, slowly.",
    "yes",
]
RIGHT = [
    ["The cat sat on the mat.", "A cat was on a mat."],
    ["The dog barked all night long."],
    ["something"],
    ["Two men play chess in the park.", "Men play chess."],
    ["no"],
]


def score(name: str, said: list[str], right: list[list[str]]) -> float:
    """The score of a whole corpus."""
    metric = METRICS[name]
    vectors = np.array([metric.statistics(*pair) for pair in zip(said, right, strict=True)])
    return float(metric.value(vectors.sum(axis=0), np.array(float(len(said)))))


def test_the_table_has_what_tasks_may_name() -> None:
    from typing import get_args

    from apprentice.tasks.schema import Metric

    assert set(METRICS) == set(get_args(Metric))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a b an c the d", "b c d"),
        ("U.S.A.", "usa"),
        ("it's", "its"),
        ("theory another", "theory another"),
        ("well-known", "wellknown"),
        ("  \n ", ""),
        ("São Paulo", "são paulo"),
    ],
)
def test_normal_form_is_squads(text: str, expected: str) -> None:
    assert normalise_squad(text) == expected


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel tower."], 100.0, 100.0),
        ("Eiffel Tower in Paris", ["Eiffel Tower"], 0.0, 100 * 2 * 1.0 * 0.5 / 1.5),
        ("Paris", ["London", "Paris, France"], 0.0, 100 * 2 / 3),
        ("dog dog cat", ["dog cat cat"], 0.0, 100 * 2 / 3),
        ("Rome", ["London"], 0.0, 0.0),
        ("", ["London"], 0.0, 0.0),
        ("the", ["a"], 100.0, 100.0),
        ("", [""], 100.0, 100.0),
    ],
)
def test_exact_match_and_f1_are_squads(said: str, right: list[str], exact: float, f1: float) -> None:
    assert METRICS["exact_match"].score_one(said, right) == exact
    assert METRICS["token_f1"].score_one(said, right) == pytest.approx(f1)


def test_accuracy_is_of_the_text_itself() -> None:
    assert score("accuracy", ["yes", " no ", "Yes", "maybe"], [["yes"], ["no"], ["yes"], ["no"]]) == 50.0


def test_rouge_is_rouge_scores() -> None:
    scorer = RougeScorer(["rougeL"])
    expected = [max(scorer.score(ref, said)["rougeL"].fmeasure for ref in refs) for said, refs in zip(SAID, RIGHT, strict=True)]
    assert score("rouge_l", SAID, RIGHT) == pytest.approx(100 * sum(expected) / len(expected))
    assert 0 < sum(expected) < len(expected)


def test_bleu_of_a_corpus_is_sacrebleus() -> None:
    said, right = SAID * 3, [[refs[0], refs[-1]] for refs in RIGHT] * 3
    expected = corpus_bleu(said, [[refs[place] for refs in right] for place in (0, 1)]).score
    assert score("bleu", said, right) == pytest.approx(expected)
    assert 10 < expected < 90


def test_bleu_statistics_add_up_in_any_grouping() -> None:
    metric = METRICS["bleu"]
    vectors = np.array([metric.statistics(*pair) for pair in zip(SAID, RIGHT, strict=True)])
    both = metric.value(np.stack([vectors.sum(axis=0), vectors[:1].sum(axis=0)]), np.array([5.0, 1.0]))
    assert both[0] == pytest.approx(score("bleu", SAID, RIGHT))
    assert both[1] == pytest.approx(100.0)


def test_no_examples_have_no_score() -> None:
    for metric in METRICS.values():
        width = len(metric.statistics("a", ["b"]))
        assert np.isnan(metric.value(np.zeros(width), np.array(0.0)))


@pytest.mark.parametrize(("name", "kind"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2")])
def test_shorter_rouges_are_rouge_scores(name: str, kind: str) -> None:
    scorer = RougeScorer([kind])
    expected = [max(scorer.score(ref, said)[kind].fmeasure for ref in refs) for said, refs in zip(SAID, RIGHT, strict=True)]
    assert score(name, SAID, RIGHT) == pytest.approx(100 * sum(expected) / len(expected))


def test_chrf_of_a_corpus_is_sacrebleus() -> None:
    from sacrebleu import corpus_chrf

    said, right = SAID * 3, [[refs[0], refs[-1]] for refs in RIGHT] * 3
    expected = corpus_chrf(said, [[refs[place] for refs in right] for place in (0, 1)]).score
    assert score("chrf", said, right) == pytest.approx(expected)


def test_signatures_are_sacrebleus() -> None:
    bleu, chrf = (METRICS[name].signature for name in ("bleu", "chrf"))
    assert bleu is not None
    assert chrf is not None
    assert bleu().startswith("sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert chrf().startswith("sacrebleu nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def labelled(name: str, said: str, right: str, choices: str) -> float:
    metric = METRICS[name]
    vectors = metric.statistics_of([(one, [other], list(choices)) for one, other in zip(said, right, strict=True)])
    return float(metric.value(vectors.sum(axis=0), np.array(float(len(said)))))


def test_matthews_is_the_correlation() -> None:
    said, right = "aabbabbbab", "abbbaabbab"
    numbers = [[float(letter == "a") for letter in text] for text in (said, right)]
    assert labelled("matthews", said, right, "ab") == pytest.approx(100 * float(np.corrcoef(numbers)[0, 1]))
    assert labelled("matthews", "aaaa", "abab", "ab") == 0.0  # always the same answer
    assert labelled("matthews", "abcabc", "abcabc", "abc") == 100.0
    # Worked by hand: 3 of 4 right, said 2 1 1, wanted 1 1 2: (12 - 5) / sqrt((16 - 6) (16 - 6)).
    assert labelled("matthews", "aabc", "acbc", "abc") == pytest.approx(100 * (12 - 5) / 10)


def test_label_distribution_compares_shares() -> None:
    assert labelled("label_distribution", "aabb", "bbaa", "ab") == 100.0
    assert labelled("label_distribution", "aaaa", "abab", "ab") == 50.0
    assert labelled("label_distribution", "zzzz", "abab", "ab") == 0.0


def test_natural_instructions_keeps_articles_and_stems() -> None:
    assert METRICS["ni_exact_match"].score_one("The  Cat!", ["the cat"]) == 100.0
    assert METRICS["ni_exact_match"].score_one("cat", ["the cat"]) == 0.0
    expected = RougeScorer(["rougeL"], use_stemmer=True).score("dogs barking", "the dog barks")["rougeL"].fmeasure
    assert METRICS["ni_rouge_l"].score_one("the dog barks", ["dogs barking"]) == pytest.approx(100 * expected)
    assert expected > 0


def official_squad(said: str, right: str) -> tuple[float, float]:
    """Exact match and F1 as SQuAD's paper defines them: lower case, no punctuation, no articles, white space as one blank."""

    def words(text: str) -> list[str]:
        bare = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    ours, theirs = words(said), words(right)
    shared = sum(min(count, Counter(theirs)[word]) for word, count in Counter(ours).items())
    if not ours or not theirs:
        return float(ours == theirs), float(ours == theirs)
    precision, recall = shared / len(ours), shared / len(theirs)
    return float(ours == theirs), 0.0 if not shared else 2 * precision * recall / (precision + recall)


def test_people_who_answered_squad(shared_data: Path) -> None:
    """One annotator's answer, and the first words of the passage, against all other annotators'."""
    rows = pq.read_table(shared_data / "squad" / "test.parquet", columns=["context", "answers"]).slice(0, 400).to_pylist()
    compared = 0
    for row in rows:
        [said, *right] = row["answers"]["text"]
        for text in (said, f"The {said}!", " ".join(row["context"].split()[:6])):
            if right:
                scores = [official_squad(text, answer) for answer in right]
                assert METRICS["exact_match"].score_one(text, right) == pytest.approx(100 * max(exact for exact, _ in scores))
                assert METRICS["token_f1"].score_one(text, right) == pytest.approx(100 * max(f1 for _, f1 in scores))
                compared += 1
    assert compared >= 900


def test_people_who_summed_up_dialogues(shared_data: Path) -> None:
    """One person's summary against two others' of the same dialogue: ROUGE of rouge-score, BLEU and chrF of sacrebleu."""
    summaries: dict[str, list[str]] = {}
    for row in pq.read_table(shared_data / "dialogsum" / "test.parquet", columns=["dialogue", "summary"]).to_pylist():
        summaries.setdefault(row["dialogue"], []).append(row["summary"])
    pairs = [(said, right) for said, *right in summaries.values() if len(right) == 2][:120]
    assert len(pairs) == 120
    said, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        scorer = RougeScorer([kind])
        best = [max(scorer.score(reference, text)[kind].fmeasure for reference in references) for text, references in pairs]
        assert score(name, said, right) == pytest.approx(100 * float(np.mean(best)))
    columns = [[references[place] for references in right] for place in (0, 1)]
    assert score("bleu", said, right) == pytest.approx(corpus_bleu(said, columns).score)
    assert score("chrf", said, right) == pytest.approx(corpus_chrf(said, columns).score)


def test_length_bias_is_how_much_more_often_the_longer_answer_is_said():
    metric = METRICS["length_bias"]
    pair = ("long answer", "short")
    answers = [("long answer", ["short"], pair), ("long answer", ["long answer"], pair), ("short", ["short"], pair)]
    vectors = metric.statistics_of([*answers, ("ab", ["cd"], ("ab", "cd"))])
    assert vectors[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float(metric.value(vectors.sum(axis=0), np.array(4.0))) == 25.0
    assert metric.score_one("short", ["long answer"], pair) == 0.0


def test_an_answer_is_measured_once_for_table_and_report() -> None:
    calls: list[str] = []

    def length(prediction: str, references: Sequence[str], choices: Sequence[str]) -> tuple[float, ...]:
        calls.append(prediction)
        return (float(len(prediction)),)

    metric, other = (Metric(title, length, lambda sums, counts: sums[..., 0] / counts) for title in ("length", "the same again"))
    answer = ("four", ["any"], ["a", "b"])
    assert metric.score_one(*answer) == 4.0
    assert metric.statistics_of([answer]).tolist() == other.statistics_of([answer]).tolist() == [[4.0]]
    assert calls == ["four"]
    assert metric.score_one("four", ["another"]) == 4.0
    assert calls == ["four", "four"]
