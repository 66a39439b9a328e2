"""`apprentice init`: a newcomer's own table to a task file and a recipe that can be trained on."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from apprentice import cli
from apprentice.console import Screen
from apprentice.data.corpus import make_corpus
from apprentice.data.sources.locate import Reader, Split, resolve
from apprentice.preflight import check
from apprentice.preflight.dry_run import describe_rows, render_first_rows
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.tasks.registry import load_task
from apprentice.tasks.schema import Task

Command = Callable[..., tuple[int, str, str]]
CSV = "Review,Stars\n" + "".join(f'"Parcel {n}, as described",{["bad", "good"][n % 2]}\n' for n in range(40)) + '"No verdict",\n'
SPLITS: tuple[Split, ...] = ("train", "test")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `apprentice …` in this process, in a folder with `My reviews.csv`; gives (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My reviews.csv").write_text(CSV)

    def _command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["apprentice", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return _command


def test_a_table_becomes_a_task_and_a_recipe(command: Command, tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = command("init", "My reviews.csv", "--label", "Stars", "--base", tiny_model, "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "folder": "my_reviews",
        "recipe": "my_reviews/recipe.yaml",
        "task": "my_reviews/task.yaml",
        "columns": {"inputs": ["Review"], "label": "Stars"},
        "choices": ["bad", "good"],
        "train_rows": 36,
        "test_rows": 4,
        "left_out": 1,
    }
    rows = [pq.read_table(tmp_path / "my_reviews" / f"{split}.parquet").to_pylist() for split in ("train", "test")]
    assert len({row["Review"] for split in rows for row in split}) == 40
    shown = check_all_that_needs_no_ray("my_reviews/recipe.yaml", tmp_path)
    assert re.search(r"trained on \(\d+ an example of my_reviews\), each", shown)

    code, out, err = command("tasks", "my_reviews/task.yaml")
    assert (code, "Choose the label that fits: bad, good." in out) == (0, True), err
    code, _, err = command("init", "My reviews.csv", "--label", "Stars")
    assert (code, "my_reviews is there already and not empty; say --out FOLDER" in err) == (1, True)


def test_instructions_with_answers_in_json_lines(command: Command, tiny_model: Path, tmp_path: Path) -> None:
    instructions = ["Say it in German.", "Name its colour."]
    rows = [{"id": n, "instruction": instructions[n % 2], "input": f"thing {n}", "output": f"Ding {n}, rot"} for n in range(30)]
    (tmp_path / "help.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command("init", "help.jsonl", "--base", tiny_model, "--json")
    assert code == 0, err
    assert json.loads(out)["columns"] == {"instruction": "instruction", "inputs": ["input"], "answer": "output"}
    shown = check_all_that_needs_no_ray("help/recipe.yaml", tmp_path)
    assert "each example's end among them; cut or dropped: nothing" in shown


def test_numbered_labels_in_parquet(command: Command, tiny_model: Path, tmp_path: Path) -> None:
    table = {"text": [f"Parcel {n} came" for n in range(30)], "label": [n % 3 for n in range(30)]}
    pq.write_table(pa.table(table), tmp_path / "mail.parquet")
    code, out, err = command("init", "mail.parquet", "--choices", "late,early,right", "--base", tiny_model, "--json")
    assert code == 0, err
    assert json.loads(out)["choices"] == ["late", "early", "right"]
    assert yaml.safe_load((tmp_path / "mail/task.yaml").read_text())["label"] == "label"
    check_all_that_needs_no_ray("mail/recipe.yaml", tmp_path)


def check_all_that_needs_no_ray(file: str, folder: Path) -> str:
    """What `check` says of the first window; fails where `check` would."""
    recipe = load_recipe(file)
    for subject in ("tasks", "model", "storage", "sources"):
        assert check.run_check(subject, recipe)
    corpus = make_corpus(recipe, Run(Folder.at(folder / "run")), parallel=False)
    check.check_index(recipe, corpus)
    return describe_rows(corpus, render_first_rows(corpus))


def test_test_rows_of_ones_own(command: Command, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"Review": "Late", "Stars": "bad"}\n')
    code, out, err = command("init", "My reviews.csv", "--label", "Stars", "--test", "test.jsonl", "--out", "there", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["train_rows"], result["test_rows"], result["recipe"]) == (40, 1, "there/recipe.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vague.csv"], "it is not clear which column of vague.csv is to be learnt; its columns are Review, Verdict."),
        (["none.csv"], "none.csv does not exist; check the path"),
        (["My reviews.csv", "--label", "Star"], "Did you mean 'Stars'?"),
        (["My reviews.csv", "--encoding", "foo"], "--encoding: no encoding is called 'foo'; give one such as utf-8, cp1252"),
        (["My reviews.csv", "--encoding", "hex"], "--encoding: no encoding is called 'hex'"),
        (["few.jsonl"], "few.jsonl holds 1 rows; 10 are the least"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(command: Command, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "a", "label": 0}\n')
    (tmp_path / "vague.csv").write_text(CSV.replace("Stars", "Verdict"))
    code, out, err = command("init", *words)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["My reviews.csv", "few.jsonl", "vague.csv"]


def task_of(folder: Path) -> tuple[Task, list[dict[str, Any]]]:
    """The task that `init` wrote there, and all its rows as the task sees them."""
    task = load_task((folder / "task.yaml").resolve())
    cache = Folder.at(folder / "cache")
    sources = [resolve(task, split, root=None, cache=cache) for split in SPLITS]
    return task, [row for source in sources if source for row in Reader(source).rows(range(source.rows))]


def test_what_was_written_stays_so_in_csv_and_json(command: Command, tmp_path: Path) -> None:
    said = ["0", "0.5", "true", "00001", "1.10", "NA", "2020-01-02"]
    lines = [f"text {n},{said[n % 7]}" for n in range(21)]
    (tmp_path / "own.csv").write_text("\n".join(["question,answer", *lines]))
    assert command("init", "own.csv")[0] == 0
    task, rows = task_of(tmp_path / "own")
    assert {task.render(row, task.templates[0]).target for row in rows} == {*said}
    numbers = [0, 0.5, 3, 12345678901234567890123]
    (tmp_path / "more.jsonl").write_text("".join(f'{{"question": "q {n}", "answer": {numbers[n % 4]}}}\n' for n in range(20)))
    assert command("init", "more.jsonl")[0] == 0
    task, rows = task_of(tmp_path / "more")
    assert {task.render(row, task.templates[0]).target for row in rows} == {*map(str, numbers)}


def test_answers_in_lists_are_learnt_by_the_first(command: Command, tmp_path: Path) -> None:
    rows = [{"question": f"q {n}", "answer": [str(n), f"n{n}"] if n else []} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command("init", "own.jsonl", "--json")
    assert (code, json.loads(out)["left_out"]) == (0, 1), err
    task, findings = task_of(tmp_path / "own")
    examples = [task.render(row, task.templates[0]) for row in findings]
    assert {(example.instruction, example.references) for example in examples} == {
        (f"q {n}", (str(n), f"n{n}")) for n in range(1, 20)
    }
    assert all(example.target == example.references[0] for example in examples)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("reply", "choices"),
    [("late,early", ["late", "early"]), ("", ["0", "1"]), ("choice1, choice2", "[choice1, choice2]")],
)
def test_it_asks_on_a_terminal_what_numbers_mean(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: str, choices: Any
) -> None:
    (tmp_path / "own.csv").write_text("premise,choice1,choice2,label\n" + "".join(f"p {n},a,b,{n % 2}\n" for n in range(20)))
    code, _, err = command("init", "own.csv")
    assert code == 1
    assert "give each a name, in this order, as in --choices name0,name1; if choice1, choice2 hold what a row chooses from" in err
    assert not (tmp_path / "own").exists()
    prompts: list[str] = []

    def replied(question: str, **_: Any) -> str:
        prompts.append(question)
        return reply

    monkeypatch.setattr("typer.prompt", replied)
    monkeypatch.setattr("apprentice.console.Screen.can_ask", True)
    code, _, err = command("init", "own.csv")
    assert code == 0, err
    assert len(prompts) == 1
    assert prompts[0].startswith(
        "The labels in column 'label' are 0, 1. Their names in this order, with commas between, or choice1,choice2"
    )
    assert yaml.safe_load((tmp_path / "own/task.yaml").read_text())["choices"] == choices
    task, rows = task_of(tmp_path / "own")
    right = {"late,early": {"late", "early"}, "": {"0", "1"}}.get(reply, {"a", "b"})
    assert {task.render(row, task.templates[0]).target for row in rows} == right


def test_a_person_is_asked_only_before_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, Terminal())
    assert Screen().can_ask
    assert not Screen(as_json=True).can_ask
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert not Screen().can_ask


def test_a_table_in_another_encoding(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(("question,answer\n" + "".join(f"q {n},café {n}\n" for n in range(20))).encode("cp1252"))
    code, _, err = command("init", "own.csv")
    assert code == 1
    assert "own.csv:2 is not UTF-8: b'q 0,caf\\xe9 0'; with --encoding cp1252 it reads 'q 0,café 0'." in err
    assert command("init", "own.csv", "--encoding", "cp1252")[0] == 0
    task, rows = task_of(tmp_path / "own")
    assert {task.render(row, task.templates[0]).target for row in rows} == {f"café {n}" for n in range(20)}
