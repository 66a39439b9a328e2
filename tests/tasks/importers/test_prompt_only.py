"""Questions without answers: texts and conversations, of use to a model that learns from its own replies alone."""

from __future__ import annotations

import json

import pytest

from apprentice.errors import RecipeError, RowError
from apprentice.preflight.check import run_check
from apprentice.recipe import load_recipe
from apprentice.tasks.importers.prompt_only import prompt_only_tasks
from apprentice.tasks.schema import Example
from tests.support.on_policy import round_recipe
from tests.support.recipes import tiny_recipe
from tests.train.on_policy.test_rollout import RoundWriter, corpus_of, torch


def question_of(row: dict[str, object]) -> Example:
    [task] = prompt_only_tasks({"prompts": "questions.jsonl"})
    return task.templates[0].example(task.name, row)


def test_a_text_and_messages_are_questions():
    assert (question_of({"prompt": "Name a colour."}).instruction, question_of({"prompt": "Name a colour."}).history) == (
        "Name a colour.",
        (),
    )
    turns = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "Who are you?")]
    example = question_of({"prompt": [{"role": role, "content": text} for role, text in turns]})
    assert (example.instruction, example.history, example.system) == ("Who are you?", (("Hello", "Hi!"),), "Be kind.")
    assert (example.target, example.choices, example.references) == ("", (), ())


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [(None, "null"), ("", "null"), ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "turns")],
)
def test_what_asks_nothing_is_a_bad_row(prompt, reason):
    with pytest.raises(RowError) as caught:
        question_of({"prompt": prompt})
    assert caught.value.reason == reason


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Name colour {number}."}) + "\n" for number in range(30)))
    return [{"prompts": str(file)}]


def test_rounds_are_made_of_them(tiny_model, tmp_path, questions):
    corpus = corpus_of(tmp_path, tiny_model, data__tasks=questions)
    assert run_check("tasks", corpus.recipe) == "1 task, 0 of them held out"
    rows = RoundWriter(corpus, torch.device("cpu")).rows(0, 0, None)
    assert sum(map(len, rows["rewards"])) == 32
    assert "Name colour" in corpus.layout.tokenizer.decode(rows["input_ids"][0].tolist())


def test_other_objectives_and_evaluation_refuse_them(tiny_model, tmp_path, questions):
    words = r"task 'prompts_questions' has prompts without answers, from which only training\.objective grpo learns"
    with pytest.raises(RecipeError, match=words):
        run_check("tasks", load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=[*questions, "quickstart"])))
    data = {"data__tasks": [*questions, "quickstart"], "data__hold_out": ["prompts_questions"]}
    with pytest.raises(RecipeError, match=words):
        run_check("tasks", load_recipe(round_recipe(tmp_path, tiny_model, **data)))
