"""Classes of mixed-quality data: which class a task is in, what the prompt shows, what a token counts, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_contract import layout_of, layout_under, make_contract
from apprentice.data.encoding.quality import are_classes_shown, assign_classes, layout_of_each_class
from apprentice.data.stream import make_corpus, render_window
from apprentice.errors import ContractError, RecipeError
from apprentice.preflight import check
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import SHIPPED, Quality, Recipe, load_recipe, parse_recipe
from apprentice.run.folder import Run
from apprentice.run.identity import identity
from apprentice.storage import Folder
from apprentice.tasks.registry import select_tasks
from tests.support.recipes import tiny_recipe

TEMPLATE = parse_recipe(SHIPPED / "openchat.yaml").data.chat_template
QUALITIES = {"GPT3": {"tasks": ["paraphrase"], "weight": 0.1}, "GPT4": {"tasks": ["word_problems", "topic"], "weight": 1.0}}
TASKS = ["word_problems", "same_meaning", "composed_inference", "headline_topics"]


def recipe_of(folder: Path, model: Path, **changes: Any) -> Recipe:
    mixed: dict[str, Any] = {"data__tasks": TASKS, "data__chat_template": TEMPLATE, "data__qualities": QUALITIES}
    return load_recipe(tiny_recipe(folder, model, **(mixed | changes)))


def corpus_of(recipe: Recipe, folder: Path) -> Corpus:
    return make_corpus(recipe, Run(Folder.at(folder / "scratch")), parallel=False)


def test_the_published_text_of_both_classes(tiny_model, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model)
    layout = layout_of(recipe, Tokenizer(tiny_model))
    layouts = layout_of_each_class(recipe.data.qualities, layout)
    end = layout.tokenizer.end_text
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Who?"}]
    bos = layout.prompt("Hello").partition("GPT4")[0]
    assert layouts["GPT3"].chat_prompt(turns) == (
        f"{bos}GPT3 User: Hello{end}GPT3 Assistant:Hi{end}GPT3 User: Who?{end}GPT3 Assistant:"
    )
    assert layout.prompt("Hello") == layouts["GPT4"].prompt("Hello") == f"{bos}GPT4 User: Hello{end}GPT4 Assistant:"
    assert layout.end_ids == layouts["GPT3"].end_ids == (layout.tokenizer.end_id,)
    assert are_classes_shown(layouts)


def test_every_example_shows_its_class_and_counts_what_that_says(tiny_model, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model, data__hold_out=["headline_topics"])
    corpus = corpus_of(recipe, tmp_path)
    rows = render_window(corpus, 0)
    counts = dict.fromkeys(("GPT4", "GPT3"), 0)
    for ids, segments, tasks, weights in zip(
        *(rows[name] for name in ("input_ids", "segment_ids", "example_tasks", "example_weights")), strict=True
    ):
        assert len(tasks) == len(weights) == segments.max()
        for segment, (task, weight) in enumerate(zip(tasks, weights, strict=True), start=1):
            text = corpus.layout.tokenizer.decode(ids[segments == segment].tolist())
            quality = "GPT3" if corpus.tasks[task].cluster == "paraphrase" else "GPT4"  # what no class names belongs to the best
            assert f"{quality} User: " in text
            assert f"{'GPT4' if quality == 'GPT3' else 'GPT3'} User: " not in text
            assert weight == np.float32(recipe.data.qualities[quality].weight)
            counts[quality] += 1
    assert min(counts.values()) >= 10


def test_the_model_is_asked_in_the_first_class_and_its_folder_needs_nothing_else(tiny_model, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model)
    layout = layout_of(recipe, Tokenizer(tiny_model))
    contract = make_contract(recipe, layout, tiny_model)
    again = layout_under(contract, Tokenizer(tiny_model))  # a bare model gets the template from its contract
    assert again.encode_prompt(again.prompt("Hello")) == layout.encode_prompt(layout.prompt("Hello"))
    with pytest.raises(ContractError, match=r"the chat template in .* is not the one of the contract"):
        layout_under(contract.model_copy(update={"chat_template": None}), Tokenizer(tiny_model))


def test_classes_are_part_of_what_a_run_is(tiny_model, tmp_path):
    kept = identity(recipe_of(tmp_path, tiny_model))
    turned = identity(
        recipe_of(tmp_path, tiny_model, data__qualities={"GPT3": QUALITIES["GPT3"] | {"weight": 0.2}, "GPT4": QUALITIES["GPT4"]})
    )
    assert kept["data.qualities"] == [["GPT3", ["paraphrase"], 0.1], ["GPT4", ["word_problems", "topic"], 1.0]]
    assert turned["data.qualities"] != kept["data.qualities"]
    plain = identity(recipe_of(tmp_path, tiny_model, data__qualities=None, data__chat_template=None))
    assert not any("qualit" in key or "chat_template" in key for key in plain)


def test_a_name_that_is_no_task_and_a_task_in_two_classes_are_refused(tmp_path):
    tasks, _ = select_tasks(TASKS, (), tmp_path)
    with pytest.raises(
        RecipeError, match=r"data.qualities.best: 'word_problem' is neither a task .* Did you mean 'word_problems'\?"
    ):
        assign_classes({"best": Quality(tasks=("word_problem",))}, tasks)
    with pytest.raises(RecipeError, match="'same_meaning' is in both 'a' and 'b'; leave it in one of them"):
        assign_classes({"a": Quality(tasks=("same_meaning",)), "b": Quality(tasks=("paraphrase",))}, tasks)


def test_what_does_not_fit_is_refused_by_check(tiny_model, tmp_path):
    files = itertools.count()

    def said(**changes: Any) -> str:
        folder = tmp_path / str(next(files))
        folder.mkdir()
        return check.run_check("model", recipe_of(folder, tiny_model, **changes))

    assert said().endswith("classes GPT3 (0.1), GPT4 (1) shown in the prompt")
    assert said(data__chat_template=None).endswith("classes GPT3 (0.1), GPT4 (1) not shown in the prompt")
    with pytest.raises(RecipeError, match=r"the class that counts most, 'GPT3', .* write `quality \| default\('GPT3'\)`"):
        said(data__qualities={"GPT3": {"tasks": ["paraphrase"], "weight": 2.0}, "GPT4": {}})
    ordinary = TEMPLATE.replace("eos_token", "'<|end_of_turn|>'")
    with pytest.raises(ContractError, match=r"ends an answer with '<\|end_of_turn\|>', which is \d+ ordinary tokens"):
        said(data__chat_template=ordinary)
    with pytest.raises(RecipeError, match="`chat_template` belongs to `layout: chat`, and the layout is plain"):
        said(data__layout="plain")


def test_pairs_have_no_classes(tiny_model, tmp_path):
    with pytest.raises(RecipeError, match="objective dpo learns from pairs"):
        recipe_of(
            tmp_path,
            tiny_model,
            training__objective="dpo",
            data__max_length=128,
            data__formats={},
        )
