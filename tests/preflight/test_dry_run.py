"""What one window of rows and one pass of the model tell before anything is reserved."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apprentice.data.corpus import Corpus
from apprentice.errors import DataError, ModelError
from apprentice.models.loading import load_model
from apprentice.preflight import dry_run
from apprentice.preflight.dry_run import DryRunModel, Speed
from apprentice.recipe import Tuning
from apprentice.train.batch import PackedRows
from apprentice.train.compat import attention_name
from tests.data.small import make_small_corpus


@pytest.fixture(scope="module")
def corpus(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_small_corpus(tmp_path_factory.mktemp("dry_run"), tiny_model)


@pytest.fixture
def base(corpus: Corpus) -> DryRunModel:
    return DryRunModel(corpus.recipe)


@pytest.fixture(scope="module")
def rows(corpus: Corpus) -> PackedRows:
    return dry_run.render_first_rows(corpus)


def test_the_rows_are_told_in_one_sentence(corpus: Corpus, rows: PackedRows) -> None:
    description = dry_run.describe_rows(corpus, rows)
    examples = sum(len(row.examples) for row in rows.facts)
    assert description.startswith(f"{examples} examples in {len(rows)} rows, ")
    assert re.search(r"\(\d+ an example of \w+, \d+ of \w+\), each example's end among them; cut or dropped: ", description)
    dropped = sum(count for row in rows.facts for reasons in row.dropped.values() for count in reasons.values())
    assert description.endswith("nothing") is (dropped == 0)


def test_an_end_that_is_not_trained_on_is_found(corpus: Corpus, rows: PackedRows) -> None:
    mask = rows.loss_mask.copy()
    mask[2, np.flatnonzero(rows.segment_ids[2] == 1)[-1]] = 0
    with pytest.raises(DataError, match="row 2 in window 0 does not end with a token that is trained on"):
        dry_run.describe_rows(corpus, replace(rows, loss_mask=mask))


def test_a_task_without_targets_is_named(corpus: Corpus, rows: PackedRows) -> None:
    facts = [row._replace(targets=[0] * len(row.targets)) for row in rows.facts]
    with pytest.raises(DataError, match=r"'stories' has \d+ examples in the first window and no token to train on"):
        dry_run.describe_rows(corpus, replace(rows, facts=facts))


def test_a_task_that_is_cut_or_dropped_whole_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def description(name: str, **data: Any) -> str:
        (tmp_path / name).mkdir()
        corpus = make_small_corpus(tmp_path / name, tiny_model, **data)
        return dry_run.describe_rows(corpus, dry_run.render_first_rows(corpus))

    formats = {"zero_shot": 1.0, "few_shot": 0.0, "inverted": 0.0}
    assert "cut or dropped: nothing" in description("whole", formats=formats)
    with pytest.raises(DataError) as error:
        description("cut", formats=formats, max_length=60)
    assert re.fullmatch(
        r"task 'stories': all of its (\d+) examples in the first window are cut or dropped \(\1 truncated input\); raise"
        r" data\.max_length \(60\), shorten the wordings, or leave the task out of data\.tasks\.",
        str(error.value),
    )
    few_shot = {"zero_shot": 0.0, "few_shot": 1.0, "inverted": 0.0}
    assert "of stories" in description("exemplars", formats=few_shot, max_length=150, shots=[5, 5])


def test_packing_that_mixes_examples_is_refused(corpus: Corpus, rows: PackedRows, base: DryRunModel) -> None:
    assert dry_run.compare_packing(corpus, rows, base).endswith("in one row and each alone they have the same loss")
    straight = np.broadcast_to(np.arange(rows.positions.shape[1], dtype=rows.positions.dtype), rows.positions.shape)
    with pytest.raises(ModelError, match="packed examples see each other"):
        dry_run.compare_packing(corpus, replace(rows, positions=straight), base)


def test_the_attention_is_that_of_training_on_cpus(corpus: Corpus, tiny_model: Path) -> None:
    def attention(**changes: Any) -> str:
        return attention_name(DryRunModel(corpus.recipe.model_copy(update=changes)).load(torch.float32))

    assert attention() == "segments"
    flash = corpus.recipe.model.model_copy(update={"attention": "flash"})
    assert attention(model=flash) == "segments"  # of GPUs that are not here
    assert attention(tuning=Tuning(method="prefix")) == "sdpa"


def test_examples_that_weigh_differently_have_the_same_loss_alone(corpus: Corpus, rows: PackedRows, base: DryRunModel) -> None:
    weights = [np.linspace(1.0, 0.1, len(row.examples), dtype=np.float32) for row in rows.facts]
    plain, weighted = (dry_run.compare_packing(corpus, each, base) for each in (rows, replace(rows, weights=weights)))
    assert weighted == plain
    assert weighted.endswith("in one row and each alone they have the same loss")


def test_time_is_told_where_it_is_known(corpus: Corpus, rows: PackedRows, base: DryRunModel) -> None:
    speed = dry_run.measure_speed(corpus, rows, base)
    assert speed.training
    assert speed.reading_per_cpu
    assert " tokens/s a worker" in dry_run.describe_duration(corpus, speed)
    assert dry_run.describe_duration(corpus, Speed(None, None)).endswith("how long it takes shows after the first steps")
    spoken = [dry_run.format_duration(seconds) for seconds in (12, 100, 5399, 9000)]
    assert spoken == ["under a minute", "about 2 minutes", "about 90 minutes", "about 2.5 hours"]


def test_reading_is_measured_with_a_workers_threads_and_told_for_one(
    corpus: Corpus, rows: PackedRows, base: DryRunModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation spreads over all CPUs, one thread on each; the speed of a worker's four would be counted four times."""
    seconds = iter(range(100))
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    resources = corpus.recipe.training.resources.model_copy(update={"cpus": 4})
    training = corpus.recipe.training.model_copy(update={"resources": resources})
    speed = dry_run.measure_speed(replace(corpus, recipe=corpus.recipe.model_copy(update={"training": training})), rows, base)
    assert speed.training
    assert speed.reading_per_cpu == speed.training / 4  # each pass takes a second by this clock


def test_the_model_is_read_once(corpus: Corpus, rows: PackedRows, base: DryRunModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(
        dry_run, "load_model", lambda *arguments, **settings: loads.append(arguments) or load_model(*arguments, **settings)
    )
    dry_run.compare_packing(corpus, rows, base)
    assert dry_run.measure_speed(corpus, rows, base).training
    assert len(loads) == 1
    assert base.load(torch.bfloat16).dtype == torch.bfloat16


def test_a_large_model_is_not_tried(corpus: Corpus, rows: PackedRows, base: DryRunModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "count_parameters", lambda folder: 7_000_000_000)
    assert dry_run.compare_packing(corpus, rows, base) == "not tried: the model has 7.0 billion numbers, too many for this process"
    assert dry_run.measure_speed(corpus, rows, base) == Speed(None, None)
