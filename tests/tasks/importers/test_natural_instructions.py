"""Super-NaturalInstructions: both schemas, what is shown before an instance, and the official splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.sources.locate import Reader, resolve
from apprentice.errors import TaskError
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.storage import Folder
from apprentice.tasks.importers.natural_instructions import instruction_tasks
from apprentice.tasks.registry import library, load_task, select_tasks

CONTENT: dict[str, Any] = {
    "Categories": ["Toxic Language Detection"],
    "Definition": ["Say {{ hello }}."],
    "Positive Examples": [{"input": "a", "output": "A", "explanation": "Large."}, {"input": "b", "output": "B"}],
    "Negative Examples": [{"input": "c", "output": "c", "explanation": "Small."}],
    "Instances": [{"id": "x-1", "input": " d ", "output": ["D", "d!"]}, {"id": "x-2", "input": "e", "output": ["E"]}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, changes in (("task1_new", {}), ("task2_old-style", {"Definition": "Say it."}), ("task3_excluded", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(CONTENT | changes, indent=4))
    (tmp_path / "train_tasks.txt").write_text("task1_new\ntask77_not_here\n")
    (tmp_path / "test_tasks.txt").write_text("task2_old-style\n")
    return tmp_path


def test_the_prompt_of_tk_instruct(folder: Path) -> None:
    task = instruction_tasks({"natural_instructions": str(folder / "task1_new.json")})[0]
    example = task.render({"input": " d ", "output": ["D", "d!"]}, task.templates[0])
    assert (task.name, task.cluster) == ("task1_new", "toxic_language_detection")
    assert example.instruction == (
        "Definition: Say {{ hello }}.\n\nPositive Example 1 -\nInput: a\nOutput: A\n\nPositive Example 2 -\nInput: b\nOutput: B\n\n"
        "Now complete the following example -"
    )
    assert (example.input, example.target, example.references) == ("Input: d\nOutput:", "D", ("D", "d!"))


def test_replies_are_scored_as_the_original_scores_them(folder: Path) -> None:
    """Articles count, and words are stemmed: neither is so for SQuAD's exact match and plain ROUGE-L."""
    [own] = instruction_tasks({"natural_instructions": str(folder / "task1_new.json")})
    for task in (own, load_task(library()["natural_instructions"])):
        scores = {name: METRICS[name].score_one("the dog barks", ["dog barking"]) for name in task.metrics}
        assert list(scores) == ["ni_rouge_l", "ni_exact_match"]
        assert scores["ni_rouge_l"] == pytest.approx(80.0)
        assert METRICS[task.metrics[1]].score_one("the dog", ["dog"]) == 0.0


def test_what_is_shown_can_be_chosen(folder: Path) -> None:
    chosen = {"definition": False, "positive": 1, "negative": 3, "explanations": True}
    task = instruction_tasks({"natural_instructions": str(folder / "task1_new.json"), **chosen})[0]
    assert task.templates[0].instruction == (
        "Positive Example 1 -\nInput: a\nOutput: A\nExplanation: Large.\n\nNegative Example 1 -\nInput: c\nOutput: c\nExplanation:"
        " Small.\n\nNow complete the following example -"
    )


def test_official_splits(folder: Path) -> None:
    entry = {"natural_instructions": str(folder / "*.json"), "official_splits": str(folder)}
    tasks, held_out = select_tasks([entry], (), folder)
    assert [(task.name, task.sources[0].files) for task in tasks] == [
        ("task1_new", {"train": str(folder / "task1_new.json")}),
        ("task2_old_style", {"test": str(folder / "task2_old-style.json")}),
    ]
    assert held_out == {"task2_old_style"}


def test_instances_become_rows(folder: Path) -> None:
    task = instruction_tasks({"natural_instructions": str(folder / "task1_new.json")})[0]
    source = resolve(task, "train", root=None, cache=Folder.at(folder / "cache"))
    assert source is not None
    assert Reader(source).rows([1, 0]) == [{"input": "e", "output": ["E"]}, {"input": " d ", "output": ["D", "d!"]}]
    assert resolve(task, "test", root=None, cache=Folder.at(folder / "cache")) is None


def test_what_is_wrong_is_one_sentence(folder: Path) -> None:
    with pytest.raises(TaskError, match=r"no file matches .*/none\*\.json"):
        instruction_tasks({"natural_instructions": str(folder / "none*.json")})
    (folder / "bad.json").write_text('{"Definition": "x"}')
    with pytest.raises(TaskError, match=r"bad\.json is not a task file of Super-NaturalInstructions"):
        instruction_tasks({"natural_instructions": str(folder / "bad.json")})


def test_published_files(shared_data: Path, tmp_path: Path) -> None:
    home = shared_data / "natural_instructions"
    tasks = instruction_tasks({"natural_instructions": str(home / "tasks" / "*.json")})
    assert len(tasks) == 13
    rows = 0
    for task in tasks:
        source = resolve(task, "train", root=None, cache=Folder.at(tmp_path))
        assert source is not None
        for row in Reader(source).rows(range(source.rows)):
            assert task.render(row, task.templates[0]).target
            rows += 1
    assert rows > 20_000
    splits = {"natural_instructions": str(home / "tasks" / "*.json"), "official_splits": str(home / "splits" / "default")}
    split_tasks, held_out = select_tasks([splits], (), home)
    assert 0 < len(held_out) < len(split_tasks) <= 13
