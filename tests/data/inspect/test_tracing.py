"""From an optimizer step back to the examples it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apprentice import pipeline
from apprentice.errors import RunError
from apprentice.run.folder import open_run
from apprentice.tasks.registry import load_task
from tests.data.small import CorpusOf


def test_the_examples_of_a_step(corpus_of: CorpusOf) -> None:
    corpus = corpus_of()
    run = open_run(corpus.recipe)
    records = [{"step": 1, "examples": [9, 4]}, {"step": 2, "examples": [7]}, {"step": 2, "validation_loss": 1.0}]
    again = {"step": 2, "examples": [5, 70_001]}  # after a restart: what counts is the last time
    (run.folder / "steps.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*records, again]) + '{"step": 3, "exam'
    )  # a torn tail
    storage = corpus.recipe.storage
    shown = pipeline.trace_examples("small", storage, step=2, position=None)
    assert [item.position for item in shown] == [5, 70_001]
    drawn = [corpus.plan.draws(item.position, item.position + 1)[0] for item in shown]
    assert [(item.task, item.row, item.template) for item in shown] == [(one.task, one.row, one.template) for one in drawn]
    [one] = pipeline.trace_examples(str(run.folder), storage, step=None, position=5)
    assert one == shown[0]
    with pytest.raises(RunError, match="has made 2 steps, counted from 1; step 3 is not among them"):
        pipeline.trace_examples("small", storage, step=3, position=None)


def test_the_examples_of_a_run_whose_package_is_gone(corpus_of: CorpusOf) -> None:
    """A job's working directory, with the task files and their rows, goes with the job; the run and its cache stay."""
    corpus = corpus_of()
    open_run(corpus.recipe)
    storage = corpus.recipe.storage
    [before] = pipeline.trace_examples("small", storage, step=None, position=5)
    for file in Path(storage).parent.glob("*.*"):
        file.unlink()
    load_task.cache_clear()
    assert pipeline.trace_examples("small", storage, step=None, position=5) == [before]


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"'nobody' is not a run in .*; `apprentice runs` lists them"):
        pipeline.trace_examples("nobody", str(tmp_path), step=1, position=None)
