"""The corpus: made from a recipe, picklable, and how many steps it means."""

from __future__ import annotations

import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice.data.corpus import Corpus, packing_strategy
from apprentice.data.run_length import estimate_steps, positions_of_epochs
from apprentice.data.window import WindowRenderer
from apprentice.errors import RecipeError, TaskError
from apprentice.recipe import Model, Packing
from tests.data.small import CorpusOf

TRAINING = {"workers": 1, "global_batch": 4}


def test_it_is_made_from_the_recipe(corpus: Corpus) -> None:
    assert [task.name for task in corpus.tasks] == ["sums", "stories"]
    assert corpus.held_out == frozenset()
    assert corpus.plan.tasks == ("stories", "sums")
    assert corpus.layout.name == "chat"
    assert corpus.row_length == 256
    for index, rows in ((corpus.indices["sums"], 150), (corpus.indices["stories"], 90)):
        assert len(index.train) + len(index.validation) == rows
        assert 0 < len(index.validation) < rows // 5


def test_it_travels(corpus: Corpus) -> None:
    again = pickle.loads(pickle.dumps(corpus))
    assert again.plan.draws(0, 50) == corpus.plan.draws(0, 50)
    ours, theirs = WindowRenderer(corpus).window(1), WindowRenderer(again).window(1)
    assert np.array_equal(ours["input_ids"], theirs["input_ids"])


def test_held_out_tasks_are_there_and_not_in_the_plan(corpus_of: CorpusOf) -> None:
    corpus = corpus_of(hold_out=["tone"])
    assert corpus.held_out == {"stories"}
    assert corpus.plan.tasks == ("sums",)
    assert len(corpus.indices["stories"].train) == 90  # exemplars; nothing is held back for validation
    with pytest.raises(TaskError, match=r"hold_out: 'tones' is neither a task nor a cluster .* Did you mean 'tone'\?"):
        corpus_of(hold_out=["tones"])


@pytest.mark.parametrize("data", [{}, {"packing": {"length": 256, "strategy": "none"}}, {"formats": {"zero_shot": 1.0}}])
def test_the_estimate_is_near_what_comes(corpus_of: CorpusOf, data: dict[str, Any]) -> None:
    corpus = corpus_of(**data)
    windows = [WindowRenderer(corpus).window(number) for number in range(4)]
    rows = sum(len(window["row"]) for window in windows)
    tokens = sum(int((window["segment_ids"] > 0).sum()) for window in windows)
    estimate = estimate_steps(corpus)
    assert estimate["steps"] == 5
    assert estimate["rows_per_window"] == pytest.approx(rows / 4, rel=0.2)
    assert estimate["tokens_per_step"] == pytest.approx(4 * tokens / rows, rel=0.2)
    assert 0 < estimate["target_tokens_per_step"] < estimate["tokens_per_step"]


@pytest.mark.parametrize("strategy", ["best_fit", "greedy", "none"])
def test_the_estimate_for_an_encoder_decoder(pairs_of: CorpusOf, strategy: str) -> None:
    corpus = pairs_of(packing={"length": 256, "target_length": 48, "strategy": strategy})
    rows = sum(len(WindowRenderer(corpus).window(number)["row"]) for number in range(4))
    assert estimate_steps(corpus)["rows_per_window"] == pytest.approx(rows / 4, rel=0.25)


def test_auto_packs_where_that_is_exact(corpus_of: CorpusOf, pairs_of: CorpusOf, encoder_decoder: Path, tmp_path: Path) -> None:
    assert (corpus_of().strategy, corpus_of().target_length) == ("best_fit", None)
    one = pairs_of()
    assert (one.strategy, one.target_length, one.row_bytes) == ("best_fit", 64, 12 * (256 + 64) + 64)
    bart = tmp_path / "bart"
    shutil.copytree(encoder_decoder, bart)
    (bart / "config.json").write_text('{"model_type": "bart", "is_encoder_decoder": true}')
    recipe = one.recipe.model_copy(update={"model": Model(base=str(bart))})
    assert packing_strategy(recipe, bart) == "none"
    hybrid = tmp_path / "hybrid"
    hybrid.mkdir()
    (hybrid / "config.json").write_text('{"model_type": "new", "layer_types": ["linear_attention", "full_attention"]}')
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": Packing(length=256)})})
    assert (packing_strategy(plain, hybrid), packing_strategy(plain, hybrid, 1)) == ("none", "best_fit")
    greedy = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": Packing(length=256, strategy="greedy")})})
    with pytest.raises(RecipeError, match=r"strategy greedy would .* see each other: the positions of bart count .*choose `none`"):
        packing_strategy(greedy, bart)
    with pytest.raises(RecipeError, match=r"target_length is for encoder-decoders, and .* leave it out"):
        corpus_of(packing={"length": 256, "target_length": 32})


def test_tokens_and_epochs_become_steps(corpus_of: CorpusOf) -> None:
    formats = {"zero_shot": 1.0}
    corpus = corpus_of(TRAINING | {"tokens": 10_000}, formats=formats)
    estimate = estimate_steps(corpus)
    assert estimate["steps"] == -(-10_000 // estimate["tokens_per_step"])
    rows = {name: len(index.train) for name, index in corpus.indices.items()}
    once = estimate_steps(corpus_of(TRAINING | {"epochs": 1}, formats=formats))
    examples_per_step = 32 / once["rows_per_window"] * 4
    assert once["steps"] == pytest.approx(sum(rows.values()) / examples_per_step, abs=1)
    capped = estimate_steps(corpus_of(TRAINING | {"epochs": 2}, formats=formats, mixture={"cap": 50}))
    assert capped["steps"] == pytest.approx(2 * 100 / (32 / capped["rows_per_window"] * 4), abs=1)
    groups = {"numbers": {"share": 1, "cap": 20, "tasks": ["sums"]}, "rest": {"share": 1, "tasks": ["stories"]}}
    grouped = corpus_of(TRAINING | {"epochs": 1.5}, formats=formats, mixture={"groups": groups})
    assert positions_of_epochs(grouped) == math.ceil(1.5 * (20 + rows["stories"]))
    one = corpus_of(TRAINING | {"steps": 1}, formats=formats, packing={"length": 256, "strategy": "none"})
    assert one.row_length == 200
    assert estimate_steps(one)["rows_per_window"] == 32
