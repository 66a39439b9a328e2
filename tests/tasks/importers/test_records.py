"""Records of finished instructions, from the files that people have to examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.sources import parquet_conversion
from apprentice.data.sources.locate import Reader, resolve
from apprentice.errors import DataError, RecipeError, RowError
from apprentice.recipe import load_recipe
from apprentice.storage import Folder
from apprentice.tasks.importers.records import record_tasks
from apprentice.tasks.registry import select_tasks

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": None, "output": "Hi."},
    ],
    "dolly": [
        {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "qa"},
        {"instruction": "Greet.", "context": "", "response": "Hi."},
    ],
    "self_instruct": [
        {"id": "1", "instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}, {"input": "x", "output": "y"}]},
        {"id": "2", "instruction": "Greet.", "instances": [{"input": "", "output": "Hi."}]},
    ],
    "p3": [
        {"inputs_pretokenized": "Add.\n1 and 2", "targets_pretokenized": "\n3"},
        {"inputs_pretokenized": "Greet. ", "targets_pretokenized": " Hi."},
    ],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_from_a_file_to_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ending: str) -> None:
    monkeypatch.setattr(parquet_conversion, "_READ_CHARACTERS", 7)
    file = tmp_path / f"my-rows.{ending}"
    file.write_text(json.dumps(ROWS[kind], indent=1) if ending == "json" else "\n".join(map(json.dumps, ROWS[kind])))
    (task,) = record_tasks({kind: str(file)})
    source = resolve(task, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    assert task.name == f"{kind}_my_rows"
    examples = [task.render(row, task.templates[0]) for row in Reader(source).rows([0, 1])]
    question = ("Add.\n1 and 2", "") if kind == "p3" else ("Add.", "1 and 2")
    assert [(one.instruction, one.input, one.target) for one in examples] == [(*question, "3"), ("Greet.", "", "Hi.")]


def test_a_column_that_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "Greet.", "output": "Hi."}\n')
    (task,) = record_tasks({"alpaca": str(tmp_path / "a.jsonl")})
    source = resolve(task, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    assert source.columns == {"instruction": "instruction", "output": "output"}
    (tmp_path / "a.jsonl").write_text('{"instruction": "Greet.", "response": "Hi."}\n')
    with pytest.raises(DataError, match="has no column 'output'"):
        resolve(task, "train", root=None, cache=Folder.at(tmp_path / "cache"))


def test_empty_and_null_answers_are_bad_rows(tmp_path: Path) -> None:
    (task,) = record_tasks({"alpaca": "a.json"})
    for answer, reason in (("  ", "empty_answer"), (None, "null")):
        with pytest.raises(RowError) as error:
            task.render({"instruction": "Greet.", "output": answer}, task.templates[0])
        assert error.value.reason == reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ]', "object 2 is not JSON"),
        ('[{"a": 1}, 3]', "element 2 is int, not an object"),
        ('[{"a": 1}', "object 2 is not JSON"),
        ('{"rows": []}', "neither a list of objects nor a task file"),
    ],
)
def test_broken_documents_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        parquet_conversion.parquet_file(str(tmp_path / "a.json"), Folder.at(tmp_path / "cache"), "a")


def recipe_with(folder: Path, entry: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"name: r\nmodel: {{base: x}}\ntraining: {{steps: 1}}\ndata: {{tasks: [{entry}]}}\n")
    return file


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    data = load_recipe(recipe_with(tmp_path, "{alpaca: rows.json, test: more.json, cluster: own}")).data
    (task,), _ = select_tasks(data.entries, (), Path("/elsewhere"))
    assert task.sources[0].files == {"train": str(tmp_path / "rows.json"), "test": str(tmp_path / "more.json")}
    assert task.cluster == "own"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{alpaca: a.json, dolly: b.json}", "exactly one of the keys promptsource, natural_instructions, conv"),
        ("{cluster: own}", "exactly one of the keys"),
        ("{alpaca: a.json, positive: 2}", "`positive` does not belong to `alpaca`, which takes test, cluster"),
        ("{alpacca: a.json}", "Did you mean 'alpaca'"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_line(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(recipe_with(tmp_path, entry))
    assert ":4: data.tasks.0" in str(error.value)


def test_real_records(shared_data: Path, tmp_path: Path) -> None:
    for kind, dataset, least in (
        ("alpaca", "alpaca_demo", 880),
        ("self_instruct", "self_instruct", 170),
        ("p3", "t0_p3_sample", 19_000),
    ):
        (task,) = record_tasks({kind: str(shared_data / dataset / "train.parquet")})
        source = resolve(task, "train", root=None, cache=Folder.at(tmp_path))
        assert source is not None
        usable, reasons = 0, set[str]()
        for row in Reader(source).rows(range(source.rows)):
            try:
                usable += bool(task.render(row, task.templates[0]).target)
            except RowError as error:
                reasons.add(error.reason)
        assert usable >= least
        assert reasons <= {"empty_answer", "broken_character"}
