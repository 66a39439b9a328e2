"""The benchmark of a reward's rise reads the rounds that a run left, and makes a model that can be tuned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import find_recipe, load_recipe
from apprentice.run.folder import open_run
from benchmarks.learning import reward_rise


def test_rewards_are_means_over_the_replies_to_each_prompt(tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("sums"), [f"storage={tmp_path}", "model.base=m", *reward_rise.TINY])
    run = open_run(recipe)
    run.rounds.make()
    for number, scale in enumerate((1.0, 3.0)):
        rewards = [[scale * value for value in row] for row in ([0.0, 1.0, 1.0], [], [1.0])]
        table = pa.table({"examples": [[7, 7, 8], [], [8]], "rewards": rewards})
        pq.write_table(table, (run.rounds / f"{number:06d}-0.parquet").local)
    assert reward_rise.round_rewards(recipe) == [[0.5, 1.0], [1.5, 3.0]]
    assert reward_rise._rounded(np.array([0.12345, 1.0])) == [0.123, 1.0]


@pytest.mark.slow  # imports transformers' models
def test_its_model_is_small_and_reads_digits_one_by_one(tmp_path: Path) -> None:
    reward_rise.save_model(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 4_000_000
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer.encode("7 + 15")) == len(tokenizer.encode("7 + 1")) + 1
