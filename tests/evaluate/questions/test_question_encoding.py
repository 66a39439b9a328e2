"""Requests become the ids that training would have made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_format import Exemplar
from apprentice.data.encoding.render import Renderer
from apprentice.data.encoding.tokenize import encode
from apprentice.data.sampling.plan import exemplar_rows
from apprentice.evaluate.questions.question_encoding import EMPTY_CHOICE, NOT_A_CHOICE, encode_questions, has_enough_exemplars
from apprentice.evaluate.questions.row_selection import QuestionRequest
from apprentice.model_pool.answer_settings import TokenLimits
from apprentice.tasks.schema import Task

LIMITS = TokenLimits(prompt=700, reply=6)


def questions(corpus: Corpus, *requests: QuestionRequest, limits: TokenLimits = LIMITS) -> list[dict[str, Any]]:
    encoded: list[dict[str, Any]] = encode_questions(corpus, requests, corpus.layout, limits).to_pylist()
    return encoded


def test_a_ranked_question(corpus: Corpus) -> None:
    row = int(corpus.indices["same_meaning"].test[3])
    [question] = questions(corpus, QuestionRequest("same_meaning", row, "same_or_different", 0))
    example = Renderer(corpus.tasks, corpus.indices).example("same_meaning", "test", row, "same_or_different")
    assert (question["choices"], question["target"]) == (["different", "same"], example.target)
    [trained] = encode(corpus.layout, [(example, [])], 700)
    assert trained is not None
    right = question["choice_ids"][question["choices"].index(example.target)]
    # Prompt and right choice together are exactly what training would have seen, the end included.
    assert question["prompt_ids"] + right == trained.ids
    assert len(question["prompt_ids"]) == question["prompt_tokens"] == trained.prompt_length
    assert example.instruction in question["prompt"]
    assert (question["exemplars"], question["truncated"], question["dropped"]) == ([], "", "")


def test_a_generated_question_has_no_choices(corpus: Corpus) -> None:
    row = int(corpus.indices["written_dates"].test[0])
    template = next(task for task in corpus.tasks if task.name == "written_dates").scored_templates[0].name
    [question] = questions(corpus, QuestionRequest("written_dates", row, template, 0))
    assert (question["choices"], question["choice_ids"]) == ([], [])
    assert question["references"] == [question["target"]]


@pytest.mark.parametrize("task", ["same_meaning", "short_reviews"])  # the second is held out
def test_exemplars_are_nested_training_rows_in_the_same_wording(corpus: Corpus, task: str) -> None:
    index = corpus.indices[task]
    row = int(index.test[1])
    template = next(entry for entry in corpus.tasks if entry.name == task).scored_templates[1].name
    zero, one, two = questions(corpus, *(QuestionRequest(task, row, template, k) for k in (0, 1, 2)))
    assert [len(entry["exemplars"]) for entry in (zero, one, two)] == [0, 1, 2]
    assert two["exemplars"][:1] == one["exemplars"]
    assert tuple(two["exemplars"]) == exemplar_rows(5, task, row, 2, index.train)
    assert set(two["exemplars"]) <= set(index.train.tolist())
    renderer = Renderer(corpus.tasks, corpus.indices)
    shown = [renderer.example(task, "train", number, template) for number in two["exemplars"]]
    example = renderer.example(task, "test", row, template)
    text = corpus.layout.prompt(example.instruction, example.input, [Exemplar(s.instruction, s.input, s.target) for s in shown])
    assert two["prompt_ids"] == corpus.layout.encode_prompt(text)


def test_what_does_not_fit_is_cut_or_dropped_and_said(corpus: Corpus) -> None:
    row = int(corpus.indices["passage_questions"].test[0])
    request = QuestionRequest("passage_questions", row, "answer_from_passage", 2)
    [whole] = questions(corpus, replace_shots(request, 0))
    [fewer] = questions(corpus, request, limits=TokenLimits(prompt=whole["prompt_tokens"], reply=6))
    assert (fewer["truncated"], fewer["exemplars"]) == ("truncated_exemplars", [])
    assert fewer["prompt_ids"] == whole["prompt_ids"]
    [cut] = questions(corpus, request, limits=TokenLimits(prompt=whole["prompt_tokens"] - 5, reply=6))
    assert cut["truncated"] == "truncated_input"
    assert cut["prompt_tokens"] <= whole["prompt_tokens"] - 5
    [dropped] = questions(corpus, request, limits=TokenLimits(prompt=5, reply=6))
    assert (dropped["dropped"], dropped["prompt_ids"]) == ("too_long", None)


def replace_shots(request: QuestionRequest, shots: int) -> QuestionRequest:
    return request._replace(shots=shots)


def test_the_context_leaves_room_for_the_answer(corpus: Corpus) -> None:
    row = int(corpus.indices["passage_questions"].test[0])
    request = QuestionRequest("passage_questions", row, "answer_from_passage", 0)
    [whole] = questions(corpus, request)
    size = whole["prompt_tokens"]
    assert questions(corpus, request, limits=TokenLimits(700, 6, context=size + 6))[0]["truncated"] == ""
    [cut] = questions(corpus, request, limits=TokenLimits(700, 6, context=size + 5))
    assert (cut["truncated"], cut["prompt_tokens"] < size) == ("truncated_input", True)


def test_a_target_that_is_no_choice_is_dropped(corpus: Corpus) -> None:
    task = next(task for task in corpus.tasks if task.name == "same_meaning")
    dotted = task.model_dump() | {"templates": [template.model_dump() for template in task.templates]}
    dotted["templates"][0]["output"] = "{{ answer }}!"
    changed = replace(corpus, tasks=(Task.model_validate(dotted),))
    row = int(corpus.indices["same_meaning"].test[0])
    [question] = questions(changed, QuestionRequest("same_meaning", row, task.templates[0].name, 0))
    assert question["dropped"] == NOT_A_CHOICE


def test_a_choice_without_tokens_is_dropped(corpus: Corpus) -> None:
    task = next(task for task in corpus.tasks if task.name == "same_meaning")
    mute = task.model_dump() | {"templates": [template.model_dump() for template in task.templates]}
    mute["templates"][0]["choices"] = ["", *(task.templates[0].choices or task.choices)[1:]]
    changed = replace(corpus, tasks=(Task.model_validate(mute),))
    requests = [
        QuestionRequest("same_meaning", int(row), task.templates[0].name, 0) for row in corpus.indices["same_meaning"].test[:8]
    ]
    encoded = questions(changed, *requests)
    # A row whose answer is the empty choice cannot be rendered at all.
    assert {question["dropped"] for question in encoded} == {EMPTY_CHOICE, "empty_answer"}
    assert all(question["prompt_ids"] is None for question in encoded)


def test_exemplars_need_more_training_rows_than_their_number(corpus: Corpus) -> None:
    index = corpus.indices["same_meaning"]
    assert has_enough_exemplars(index, 5)
    few = replace(index, train=np.array([4, 9]))
    assert [has_enough_exemplars(few, k) for k in (0, 1, 2)] == [True, True, False]
    none = replace(index, train_source=None, train=np.array([], dtype=np.int64))
    assert [has_enough_exemplars(none, k) for k in (0, 1)] == [True, False]
