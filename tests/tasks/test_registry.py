"""Task files: found by name, cluster, path or glob, and refused with one sentence that says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice.errors import TaskError
from apprentice.tasks.registry import find_tasks, library, load_task

GOOD = """
name: mine
cluster: own
sources: [{files: {train: data/rows.csv, test: data/more.csv}}, {dataset: mine}]
answer: "{{ answer }}"
metrics: [exact_match]
templates: [{name: ask, instruction: "{{ question }}"}]
"""


def write_task(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_a_library_task_by_name() -> None:
    assert [task.name for task in find_tasks("squad", Path())] == ["squad"]


def test_a_whole_cluster_by_name() -> None:
    assert {task.name for task in find_tasks("nli", Path())} == {
        *("anli_r1", "anli_r2", "anli_r3", "cb", "multi_nli", "rte", "sick", "snli"),
    }


def test_file_names_are_task_names() -> None:
    assert len(library()) > 20
    for name, path in library().items():
        assert (load_task(path).name, path.stem) == (name, name)


@pytest.mark.parametrize(("name", "near"), [("muliti_nli", "multi_nli"), ("squadd", "squad"), ("summarization", "summarisation")])
def test_an_unknown_task_is_answered_with_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(TaskError, match=rf"'{name}' is not a task\. Did you mean '{near}'\? `apprentice tasks` lists them\."):
        find_tasks(name, Path())


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(TaskError, match=r"'qqqqqq' is not a task\. `apprentice tasks`"):
        find_tasks("qqqqqq", Path())


def test_own_files_lie_beside_the_task_file(tmp_path: Path) -> None:
    (task,) = find_tasks(str(write_task(tmp_path, GOOD)), Path("/elsewhere"))
    assert task.sources[0].files == {"train": str(tmp_path / "data/rows.csv"), "test": str(tmp_path / "data/more.csv")}
    assert (task.sources[1].dataset, task.sources[1].files) == ("mine", None)


def test_a_glob_finds_files_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks", GOOD.replace("name: mine", "name: second"), "b.yaml")
    write_task(tmp_path / "tasks", GOOD, "a.yaml")
    assert [task.name for task in find_tasks("./tasks/*.yaml", tmp_path)] == ["mine", "second"]


def test_a_glob_that_finds_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no file matches 'tasks/\*\.yaml'"):
        find_tasks("tasks/*.yaml", tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in message_of(tmp_path / "mine.yaml")


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    assert "cannot be read as YAML" in message_of(write_task(tmp_path, "name: [unclosed"))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert "cannot be read as YAML" in message_of(path)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("cluster: own\n", "", "cluster: this key is needed, and missing."),
        ("cluster: own", "clusters: own", "clusters: a task has no such key. Did you mean 'cluster'?"),
        ("cluster: own", "cluster: own\nzzz: red", "zzz: a task has no such key. Remove it."),
        ("instruction:", "instructions:", "templates.0.instructions: a template has no such key. Did you mean 'instruction'?"),
        ("{dataset: mine}", "{dataset: mine, colums: {}}", "sources.1.colums: a source has no such key. Did you mean 'columns'?"),
        ("metrics: [exact_match]", "metrics: [exact]", "metrics.0: it must be 'accuracy', "),
        ('answer: "{{ answer }}"', 'answer: "{{ answer"', "answer: not a Jinja2 template"),
        (GOOD, "", "a block of keys is needed"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(tmp_path: Path, old: str, new: str, place: str) -> None:
    assert GOOD.count(old) == 1
    assert place in message_of(write_task(tmp_path, GOOD.replace(old, new)))
