"""`apprentice init` of conversations, of preference pairs and of a dataset's name; and its questions on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from apprentice import DataError, create_project
from apprentice.pipeline.project import ready_tables
from apprentice.preflight.lookup import RecipeLookup


def lines_of(rows: list[dict[str, Any]], file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"The number {number}."}]


def test_conversations_become_a_recipe_without_a_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": number, "messages": turns(number)} for number in range(20)]
    rows.append({"id": 20, "messages": [{"role": "assistant", "content": "I begin."}]})  # no question: left out
    recipe = create_project(lines_of(rows, tmp_path / "talk.jsonl"))
    recipe_file = yaml.safe_load((tmp_path / "talk/recipe.yaml").read_text())
    assert recipe_file["data"]["tasks"] == [{"conversations": "./train.parquet", "test": "./test.parquet", "cluster": "own"}]
    assert not (tmp_path / "talk/task.yaml").exists()
    [train, test] = [pq.read_table(tmp_path / f"talk/{split}.parquet").to_pylist() for split in ("train", "test")]
    assert (len(train), len(test)) == (18, 2)
    assert {*train[0]} == {"messages"}
    [task] = RecipeLookup(recipe).tasks
    assert task.render(train[0], "conversation").target.startswith("The number")


def test_preference_pairs_become_a_recipe_for_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Add {n}.", "chosen": f"It is {n}.", "rejected": "No." if n else f"It is {n}."} for n in range(20)]
    recipe = create_project(lines_of(rows, tmp_path / "pairs.jsonl"), "better")
    assert recipe.training.objective == "dpo"
    assert sum(pq.read_table(tmp_path / f"better/{split}.parquet").num_rows for split in ("train", "test")) == 19  # one is no pair


@pytest.mark.parametrize(
    ("name", "is_name"),
    [("stanfordnlp/sst2", True), ("data/rows.csv", False), ("rows.csv", False), ("a/b/c", False), ("here/it", False)],
)
def test_what_is_a_datasets_name(name: str, is_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/it").mkdir(parents=True)
    assert ready_tables.is_hub_name(Path(name)) == is_name


def test_a_dataset_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"^dataset 'owner/name' cannot be reached on the hub \(\w+\); check the network and HF_TOKEN\.$"
    ):
        create_project("owner/name")
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_of_the_hub_brings_the_names_of_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": kinds}})}
    table = pa.table({"text": [f"row {n}" for n in range(30)], "label": [n % 3 - 1 for n in range(30)]}).replace_schema_metadata(
        metadata
    )
    pq.write_table(table, tmp_path / "hub.parquet")
    monkeypatch.setattr(ready_tables, "hub_files", lambda task, spec, name: [str(tmp_path / "hub.parquet")])
    create_project("owner/name")
    task = yaml.safe_load((tmp_path / "name/task.yaml").read_text())
    assert task["choices"] == ["bad", "good"]
    rows = [row for split in ("train", "test") for row in pq.read_table(tmp_path / f"name/{split}.parquet").to_pylist()]
    assert len(rows) == 20  # those with the label -1 have none


def test_a_split_saved_by_datasets_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    table = datasets.Dataset.from_dict(
        {"text": [f"row {n}" for n in range(30)], "label": ["a" if n % 2 else "b" for n in range(30)]}
    )
    table.save_to_disk(str(tmp_path / "saved"))
    create_project("saved", "own")
    assert yaml.safe_load((tmp_path / "own/task.yaml").read_text())["choices"] == ["a", "b"]


def test_its_questions_are_answered_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("words,verdict\n" + "".join(f"thing {n},{n % 2}\n" for n in range(20)))
    terminal, other_end = pty.openpty()
    code = "import sys; sys.argv = ['apprentice', 'init', 'own.csv']; from apprentice.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=other_end, stdout=other_end, stderr=other_end
    ) as command:
        os.close(other_end)
        shown = b""
        for question, reply in [(b"Which column", b"verdict"), (b"label, answer)", b"label"), (b"Enter keeps", b"bad,good")]:
            while question not in shown:
                shown += os.read(terminal, 4096)
            os.write(terminal, reply + b"\n")
            shown = b""
        assert command.wait(60) == 0
    os.close(terminal)
    task = yaml.safe_load((tmp_path / "own/task.yaml").read_text())
    assert task["choices"] == ["bad", "good"]
    assert {row["verdict"] for row in pq.read_table(tmp_path / "own/train.parquet").to_pylist()} == {"0", "1"}
