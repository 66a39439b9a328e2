"""Each change keeps the question, and what is right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.render import Renderer
from apprentice.evaluate.questions.perturbation import PERTURBATIONS, perturb
from apprentice.recipe.evaluation import Perturbation
from apprentice.tasks.schema import Example

EXAMPLE = Example(
    "moods", "w", "Is the review positive or negative?", "A warm film.", "positive", ("negative", "positive"), ("positive",)
)


def test_the_recipe_may_name_each() -> None:
    from typing import get_args

    assert set(PERTURBATIONS) == set(get_args(Perturbation))


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_change_is_seeded_and_keeps_the_answer(kind: str) -> None:
    first, again = (perturb(EXAMPLE, kind, 1, 7) for _ in range(2))
    assert first is not None
    assert first == again != EXAMPLE
    assert (first.target, first.choices, first.references) == (
        EXAMPLE.target,
        EXAMPLE.choices,
        EXAMPLE.references,
    )


def test_what_each_does() -> None:
    perturbed = {kind: perturb(EXAMPLE, kind, 1, 7) for kind in PERTURBATIONS}
    texts = {kind: example.instruction for kind, example in perturbed.items() if example}
    assert texts["choice_order"] == "Is the review negative or positive?"
    assert texts["input_first"] == "A warm film.\n\nIs the review positive or negative?"
    assert texts["case"] in ("is the review positive or negative?", "IS THE REVIEW positive OR negative?")
    assert texts["punctuation"].startswith("Is the review positive or negative")
    assert "positive or negative" in texts["synonyms"]
    assert "review" not in texts["synonyms"]
    assert EXAMPLE.instruction in texts["politeness"]


def test_what_cannot_be_changed_is_not_asked() -> None:
    bare = Example("t", "w", "Zzz", "", "yes", ("no", "yes"), ("yes",))
    assert perturb(bare, "input_first", 1, 1) is None  # no input
    assert perturb(bare, "choice_order", 1, 1) is None  # the choices are not in the text
    assert perturb(bare, "synonyms", 1, 1) is None  # no word with another
    twice = Example("t", "w", "yes or no, yes?", "", "yes", ("no", "yes"), ("yes",))
    assert perturb(twice, "choice_order", 1, 1) is None


def test_answers_are_not_exchanged_for_synonyms() -> None:
    example = Example("t", "w", "Which topic is this text about?", "", "text", ("text", "other"), ("text",))
    changed = perturb(example, "synonyms", 1, 1)
    assert changed is not None
    assert "this text about" in changed.instruction


def test_three_choices_all_move(corpus: Corpus) -> None:
    original = Example("t", "w", "Say yes, no or maybe.", "", "no", ("yes", "no", "maybe"), ("no",))
    instructions = {example.instruction for row in range(20) if (example := perturb(original, "choice_order", 1, row))}
    assert instructions == {"Say no, maybe or yes.", "Say maybe, yes or no."}


def test_on_real_wordings(corpus: Corpus) -> None:
    renderer = Renderer(corpus.tasks, corpus.indices)
    changed = 0
    for task in corpus.tasks:
        row = int(corpus.indices[task.name].test[0])
        for template in task.scored_templates:
            example = renderer.example(task.name, "test", row, template.name)
            for kind in PERTURBATIONS:
                other = perturb(example, kind, 3, row)
                if other is not None:
                    assert other.target == example.target
                    changed += 1
    assert changed > 50


@pytest.mark.parametrize("text", ["(A) a bird (B) a tree", "A. a bird\nB. a tree", "A: a bird, B: a tree"])
def test_letters_before_the_answers_stay_where_they_are(text: str) -> None:
    letters = Example("t", "letters", f"Which one sings?\n{text}", "", "A", ("A", "B"), ("A",))
    assert perturb(letters, "choice_order", 1, 1) is None
    words = replace(letters, instruction="Which one sings? Say A or B.")
    changed = perturb(words, "choice_order", 1, 1)
    assert changed is not None
    assert changed.instruction == "Which one sings? Say B or A."
