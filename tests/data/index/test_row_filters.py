"""Which rows stay, and what the others are counted under; through the index, on real rows of made-up tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.data.index.row_filters import RUN_ROWS, limit_rows
from apprentice.recipe import Recipe
from apprentice.run.folder import Run, open_run
from apprentice.storage import Folder

STORY = "the old lighthouse keeper rowed across the bay every morning before the fishermen had pulled in their nets"


def corpus_with(
    folder: Path, base: Path, rows: list[dict[str, Any]], tests: list[dict[str, Any]], *, parallel: bool = False, **data: Any
) -> Corpus:
    """The task `mood` with these rows, and a held-out task `other` with these test rows."""
    for name, cluster, files in (
        ("mood", "tone", {"train": rows}),
        ("other", "held", {"train": [{"text": "alone", "glad": 0}], "test": tests or [{"text": "alone too", "glad": 0}]}),
    ):
        for split, content in files.items():
            (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        task = {
            "name": name,
            "cluster": cluster,
            "sources": [{"files": {split: f"{name}_{split}.jsonl" for split in files}}],
            "choices": ["sad", "glad"],
            "label": "glad",
            "metrics": ["accuracy"],
            "templates": [{"name": "mood", "instruction": "Sad or glad?", "input": "{{ text }}"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    recipe = Recipe.model_validate(
        {
            "name": "filtered",
            "storage": str(folder / "runs"),
            "model": {"base": str(base)},
            "data": {
                "tasks": [str(folder / "mood.yaml"), str(folder / "other.yaml")],
                "hold_out": ["held"],
                "validation": 0.0,
                "max_length": 200,
            }
            | data,
            "training": {"steps": 1},
        }
    )
    return make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=parallel)


def test_without_filters_every_row_stays(tmp_path: Path, tiny_model: Path) -> None:
    corpus = corpus_with(tmp_path, tiny_model, [{"text": "same", "glad": 0}] * 5, [])
    assert (corpus.indices["mood"].train.tolist(), corpus.indices["mood"].filtered) == ([0, 1, 2, 3, 4], {})


ROWS = [
    {"text": "short", "glad": 0},
    {"text": "A cat sat on the mat, and slept!", "glad": 1},
    {"text": "a cat sat on the mat and slept", "glad": 1},  # the same words
    {"text": "a cat sat on the mat and slept", "glad": 0},  # another answer is another row
    {"text": f"{STORY} in spring", "glad": 1},
    {"text": f"{STORY} in autumn", "glad": 1},  # nearly the same
    {"text": "word " * 50, "glad": 0},
    {"text": f"They say that {STORY}", "glad": 0},
]


@pytest.mark.parametrize(
    ("filters", "kept", "dropped"),
    [
        ({"min_words": 5, "max_words": 40}, [1, 2, 3, 4, 5, 7], {"too_few_words": 1, "too_many_words": 1}),
        ({"duplicates": "exact"}, [0, 1, 3, 4, 5, 6, 7], {"duplicate": 1}),
        ({"duplicates": "near", "near_threshold": 0.65}, [0, 1, 4, 6], {"duplicate": 1, "near_duplicate": 3}),
        ({"decontaminate": True}, [0, 1, 2, 3, 6], {"in_a_test_row": 3}),
        ({"decontaminate": True, "ngram": 30}, list(range(8)), {}),
        (
            {"label_balance": 1.0, "min_words": 5, "max_words": 40},
            None,
            {"too_few_words": 1, "too_many_words": 1, "label_balance": 2},
        ),
    ],
)
def test_what_each_filter_drops(
    tmp_path: Path, tiny_model: Path, filters: dict[str, Any], kept: list[int] | None, dropped: dict[str, int]
) -> None:
    tests = [{"text": f"It was known that {STORY}.", "glad": 1}, {"text": "a cat sat", "glad": 1}]
    index = corpus_with(tmp_path, tiny_model, ROWS, tests, filters=filters).indices["mood"]
    assert index.filtered == dropped
    if kept is not None:
        assert index.train.tolist() == kept
    else:
        assert sorted(ROWS[row]["glad"] for row in index.train) == [0, 0, 1, 1]


def test_the_report_says_what_matched_and_where(tmp_path: Path, tiny_model: Path) -> None:
    tests = [{"text": "nothing of it, and long enough to be looked at as a passage of its own words", "glad": 0}]
    tests += [{"text": f"It was known that {STORY}.", "glad": 1}, {"text": "a cat, sat on the MAT and slept", "glad": 1}]
    corpus = corpus_with(tmp_path, tiny_model, ROWS, tests, filters={"decontaminate": True})
    report = (Folder.at(tmp_path / "runs" / "filtered" / "index") / "contamination.json").read_json()
    assert report["ngram"] == 13
    assert report["tasks"] == {"other": {"test_rows": 3, "shared": 2, "share": 0.6667, "training_rows_dropped": {"mood": 6}}}
    assert report["matches"][0] == {
        "task": "mood",
        "row": 1,
        "test_task": "other",
        "test_row": 2,
        "passage": "a cat sat on the mat and slept",
    }
    assert [match["row"] for match in report["matches"]] == [1, 2, 3, 4, 5, 7]
    assert report["matches"][3]["passage"] == " ".join(STORY.split()[:13])
    assert corpus.indices["mood"].train.tolist() == [0, 6]


def test_boilerplate_of_many_test_rows_is_no_passage(tmp_path: Path, tiny_model: Path) -> None:
    tests = [{"text": f"{STORY} {number}", "glad": 0} for number in range(11)]
    index = corpus_with(tmp_path, tiny_model, ROWS, tests, filters={"decontaminate": True}).indices["mood"]
    assert index.filtered == {}


def test_ray_gives_the_same(ray_cluster: None, tmp_path: Path, tiny_model: Path) -> None:
    filters = {"decontaminate": True, "duplicates": "near", "label_balance": 2.0}
    tests = [{"text": f"It was known that {STORY}.", "glad": 1}]
    reports = []
    for name, parallel in (("one", False), ("two", True)):
        (tmp_path / name).mkdir()
        rows = [{"text": f"{word} {number} goes by", "glad": number % 2} for number in range(50) for word in ("moon", "sun")]
        index = corpus_with(tmp_path / name, tiny_model, ROWS + rows, tests, parallel=parallel, filters=filters).indices["mood"]
        reports.append((index.train.tolist(), index.filtered))
    assert reports[0] == reports[1]
    assert reports[0][1]["in_a_test_row"] == 3


def test_at_most_so_many_rows_in_whole_stretches() -> None:
    rows = np.arange(100_000) * 3
    kept = limit_rows(rows, 3000, 7)
    assert len(kept) == 3000
    assert set(kept.tolist()) <= set(rows.tolist())
    assert (np.diff(kept) > 3).sum() <= 3000 // RUN_ROWS + 1  # few places to read from
    assert kept.tolist() == limit_rows(rows, 3000, 7).tolist() != limit_rows(rows, 3000, 8).tolist()
    assert limit_rows(rows, 100_000, 7) is limit_rows(rows, None, 7) is rows
    assert len(limit_rows(rows[:513], 512, 3)) == 512


def test_a_mixture_may_use_few_rows_of_a_task(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"text": f"row {number}", "glad": 0} for number in range(700)]
    index = corpus_with(tmp_path, tiny_model, rows, [], mixture={"max_rows": 100}).indices["mood"]
    assert (len(index.train), index.filtered) == (100, {"max_rows": 600})


def test_a_task_that_is_scored_later_is_looked_for_in_the_rows_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    """Its test rows came after the run's index, which stays as it is: what they share was trained on."""
    corpus = corpus_with(tmp_path, tiny_model, ROWS, [{"text": "a cat sat", "glad": 1}], filters={"decontaminate": True})
    run = open_run(corpus.recipe)
    before = {file.name: file.read_bytes() for file in run.index.children()}
    assert json.loads(before["contamination.json"])["tasks"]["other"]["shared"] == 0
    later = yaml.safe_load((tmp_path / "other.yaml").read_text()) | {"name": "later", "sources": [{"files": {"test": "l.jsonl"}}]}
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(later))
    rows = [f"It was known that {STORY}.", "nothing of this was ever read before, not by anybody who sat at that table"]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": text, "glad": 1}) + "\n" for text in rows))
    named = ("later", str(tmp_path / "later.yaml")), ("other", str(tmp_path / "other.yaml"))
    data = corpus.recipe.data.model_copy(update={"tasks": tuple(path for _, path in named), "hold_out": ("later", "other")})
    scored = make_corpus(corpus.recipe.model_copy(update={"data": data}), run, parallel=False, to_train=False)
    assert [(name, len(scored.indices[name].test)) for name, _ in named] == [("later", 2), ("other", 1)]
    assert scored.contamination["later"] == {"test_rows": 2, "shared": 1, "share": 0.5, "training_rows_kept": {"mood": 3}}
    assert scored.contamination["other"]["shared"] == 0
    assert {file.name: file.read_bytes() for file in run.index.children()} == before
