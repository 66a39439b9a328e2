"""The majority answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.render import Renderer
from apprentice.evaluate.scoring.majority_baseline import baseline_records, majority_answer


def test_of_a_ranked_task_it_is_the_most_frequent_place(corpus: Corpus) -> None:
    task = next(task for task in corpus.tasks if task.name == "same_meaning")
    renderer = Renderer(corpus.tasks, corpus.indices)
    places: dict[int, list[int]] = {0: [], 1: []}
    for row in corpus.indices["same_meaning"].train.tolist():
        example = renderer.example("same_meaning", "train", row, task.scored_templates[0].name)
        places[example.choices.index(example.target)].append(row)
    for often, seldom in ((0, 1), (1, 0)):
        rows = np.sort(np.array(places[often][:9] + places[seldom][:3]))
        skewed = replace(corpus, indices={"same_meaning": replace(corpus.indices["same_meaning"], train=rows)})
        assert majority_answer(skewed, "same_meaning") == {"label": often, "text": "", "share": 0.75, "sample": 12}


def test_of_a_generated_task_it_is_a_frequent_answer_or_nothing(corpus: Corpus) -> None:
    renderer = Renderer(corpus.tasks, corpus.indices)
    template = next(task for task in corpus.tasks if task.name == "passage_questions").scored_templates[0].name
    rows = corpus.indices["passage_questions"].train
    answers = Counter(renderer.example("passage_questions", "train", int(row), template).target for row in rows)
    frequent = majority_answer(corpus, "passage_questions")
    assert frequent is not None
    assert frequent["label"] is None
    assert answers[frequent["text"]] == max(answers.values()) == round(frequent["share"] * len(rows))
    # Dates are all different: no answer is frequent.
    assert majority_answer(corpus, "written_dates") is None


def test_without_training_rows_there_is_none(corpus: Corpus) -> None:
    index = replace(corpus.indices["same_meaning"], train_source=None, train=np.array([], dtype=np.int64))
    assert majority_answer(replace(corpus, indices={**corpus.indices, "same_meaning": index}), "same_meaning") is None


def test_it_answers_in_the_words_of_the_wording() -> None:
    blank = {"row": 1, "template": "t", "shots": 2, "exemplars": [4], "prompt": "p", "prompt_tokens": 3, "truncated": "x"}
    questions = [
        {"task": "a", "choices": ["no", "yes"], "dropped": "", **blank},
        {"task": "a", "choices": ["different", "same"], "dropped": "", **blank},
        {"task": "a", "choices": ["no", "yes"], "dropped": "too_long", **blank},
        {"task": "b", "choices": [], "dropped": "", **blank},
        {"task": "c", "choices": [], "dropped": "", **blank},
    ]
    majorities = {"a": {"label": 1, "text": ""}, "b": {"label": None, "text": "42"}, "c": None}
    records = baseline_records(questions, majorities)
    assert [(answer["task"], answer["prediction"]) for answer in records] == [("a", "yes"), ("a", "same"), ("b", "42")]
    assert {(answer["subject"], answer["shots"], answer["truncated"]) for answer in records} == {("majority", 0, "")}
