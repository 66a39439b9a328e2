"""`apprentice init`: makes, from a user's own table, a task file and a recipe that pass `check`."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from apprentice.errors import ApprenticeError, DataError, RowError
from apprentice.pipeline.project.ready_tables import hub_rows, is_hub_name, ready_columns, ready_kind
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.tasks.registry import find_tasks
from apprentice.tasks.scaffold import Columns, UnclearColumnError, UnclearLabelsError, draft, guess, is_printable
from apprentice.tasks.schema import Task
from apprentice.tasks.source_spec import known_encoding

TEST_SHARE, MOST_TESTED = 0.1, 500
LEAST_ROWS = 10
SEEN = 100_000  # rows that are searched for labels


@dataclass(frozen=True)
class TableDescription:
    """The user's description of a table: the purpose of its columns and the names of its labels; None and () mean guess.

    `choices` may be columns that hold each row's choices. `encoding` is None for UTF-8.
    """

    instruction: str | None = None
    inputs: tuple[str, ...] = ()
    answer: str | None = None
    label: str | None = None
    choices: tuple[str, ...] = ()
    encoding: str | None = None


def create_project(
    file: Path,
    out: Path | None,
    said: TableDescription,
    *,
    test: Path | None = None,
    base: str,
    ask: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """Writes a folder with `task.yaml`, `recipe.yaml`, `train.parquet` and `test.parquet`; returns a summary of it.

    `file` is a table, or the name of a dataset on the hub, of which at most 100,000 training rows are copied. A table of
    conversations (`messages`) or of preference pairs (`chosen`, `rejected`) needs no task file, unless a column is named.
    A tenth of the rows, at most 500, becomes the test split, chosen by a hash of each row's content, unless `test` names a
    file of test rows. Rows that some wording cannot render are left out and counted. `ask` puts a question to the user and
    returns the reply; without it, unclear labels are an error. Raises `DataError` or `TaskError`, and then writes nothing.
    """
    name = re.sub(r"\W+", "_", file.name.split(".")[0].lower()).strip("_") or "own"
    folder = out or Path(name)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is there already and not empty; say --out FOLDER, or remove it.")
    try:
        said = replace(said, encoding=said.encoding and known_encoding(said.encoding))
    except ValueError as error:
        raise DataError(f"--encoding: {error}.") from error
    with tempfile.TemporaryDirectory(prefix="apprentice-") as scratch:
        rows = list(hub_rows(str(file)) if is_hub_name(file) else _rows(file, scratch, said.encoding))
        tested = list(_rows(test, scratch, said.encoding)) if test is not None else None
    if len(rows) < LEAST_ROWS:
        raise DataError(f"{file} holds {len(rows)} rows; {LEAST_ROWS} are the least that can be learnt from and tested.")
    if (kind := ready_kind(rows[0])) is not None and said.answer is said.label is None:
        return _create_ready(kind, name, folder, rows, tested, base)
    columns, whole, content = _drafted_with(ask, name, rows, file, said)
    task = Task.model_validate(content)
    usable = [row for row in whole if _renders(task, row)]
    if tested is None:
        train, tested = _split(usable)
    else:
        train, tested = usable, [row for row in _whole(tested, columns) if _renders(task, row)]
    if not train or not tested:
        raise DataError(f"no {'training' if not train else 'test'} rows are left of {file if not train else test or file}.")
    _write(folder, content, _recipe(name, columns, base), train, tested)
    return {
        "folder": str(folder),
        "recipe": str(folder / "recipe.yaml"),
        "task": str(folder / "task.yaml"),
        "columns": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(columns).items() if value},
        "choices": content.get("choices"),
        "train_rows": len(train),
        "test_rows": len(tested),
        "left_out": len(rows) - len(usable),
    }


def _create_ready(
    kind: str, name: str, folder: Path, rows: Sequence[Mapping[str, Any]], tested: Sequence[Mapping[str, Any]] | None, base: str
) -> dict[str, Any]:
    """Writes a folder for conversations or preference pairs, which need no task file; returns a summary of it."""
    columns = ready_columns(kind, rows[0])
    entry = {kind: "./train.parquet", "test": "./test.parquet", "cluster": "own"}
    [task] = find_tasks(entry, folder)

    def usable(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        kept = [{column: row.get(column) for column in columns} for row in table]
        return [row for row in kept if _renders(task, row)]

    train, tests = (usable(rows), usable(tested)) if tested is not None else _split(usable(rows))
    if not train or not tests:
        raise DataError(
            f"no {'training' if not train else 'test'} rows of {kind} are left; look at the columns {', '.join(columns)}."
        )
    recipe = _recipe(name, Columns((), answer=columns[0]), base)
    recipe["data"]["tasks"] = [entry]
    if kind == "preferences":
        recipe["training"] |= {"objective": "dpo", "optimizer": {"learning_rate": 5.0e-5, "warmup_steps": 6}}
    _write(folder, None, recipe, train, tests)
    return {
        "folder": str(folder),
        "recipe": str(folder / "recipe.yaml"),
        "task": None,
        "columns": {kind: columns},
        "choices": None,
        "train_rows": len(train),
        "test_rows": len(tests),
        "left_out": len(rows) - len(train) - (0 if tested is not None else len(tests)),
    }


def _split(usable: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows, chosen by a hash of each row's content."""
    tests = {_hash(row) for row in sorted(usable, key=_hash)[: min(MOST_TESTED, max(1, round(TEST_SHARE * len(usable))))]}
    return [row for row in usable if _hash(row) not in tests], [row for row in usable if _hash(row) in tests]


def _drafted_with(
    ask: Callable[[str], str] | None, name: str, rows: Sequence[Mapping[str, Any]], file: Path, said: TableDescription
) -> tuple[Columns, list[dict[str, Any]], dict[str, Any]]:
    """As `_drafted`, with a question for what is not clear: the column to learn, what it holds, and the names of its labels."""
    try:
        return _drafted(name, rows, file, said)
    except UnclearColumnError as unclear:
        if ask is None:
            raise
        column = ask(f"Which column is to be learnt ({', '.join(unclear.columns)})").strip()
        if not column:
            raise
        values = len({str(row.get(column)) for row in rows[:SEEN]})
        question = (
            f"{column!r} holds {values} different values. Is it a label to choose from, or an answer to write (label, answer)"
        )
        is_label = ask(question).strip().lower().startswith("l")
        said = replace(said, label=column) if is_label else replace(said, answer=column)
        return _drafted_with(ask, name, rows, file, said)
    except UnclearLabelsError as unclear:
        if ask is None:
            raise
        names = tuple(part.strip() for part in ask(unclear.question).split(",") if part.strip())
        return _drafted(name, rows, file, replace(said, choices=names or unclear.values))


def _drafted(
    name: str, rows: Sequence[Mapping[str, Any]], file: Path, said: TableDescription
) -> tuple[Columns, list[dict[str, Any]], dict[str, Any]]:
    """Guesses the columns; returns them, the rows that have all needed values, and the content of the task file."""
    unprintable = {column for column in rows[0] if not all(is_printable(row.get(column) or "") for row in rows[:SEEN])}
    columns = guess(
        list(rows[0]),
        str(file),
        instruction=said.instruction,
        inputs=said.inputs,
        answer=said.answer,
        label=said.label,
        choices=said.choices,
        unprintable=unprintable,
    )
    whole = _whole(rows, columns)
    if not whole:
        raise DataError(f"no row of {file} has a value in {columns.label or columns.answer!r}; name another column.")
    names = () if columns.choices else said.choices
    return columns, whole, draft(name, columns, whole[:SEEN], {"train": "train.parquet", "test": "test.parquet"}, names)


def _rows(file: Path, scratch: str, encoding: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a file in any format that a task can read; text cells keep their spelling."""
    import pyarrow.parquet as pq

    from apprentice.data.sources.column_text import read, readings_of
    from apprentice.data.sources.parquet_conversion import parquet_file

    try:
        table = pq.ParquetFile(parquet_file(str(file), Folder.at(scratch), "own", encoding=encoding))
        readings = {column: way for column, way in readings_of(table.schema_arrow).items() if way != "cell"}
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield row | {column: read(row[column], way, encoding) for column, way in readings.items()}
    except ApprenticeError as error:
        said = str(error).removeprefix("task 'own': ").replace("correct `files` in the task's file", "check the path")
        raise DataError(re.sub(r"`encoding: (\S+)` in the source", r"--encoding \1", said)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _whole(rows: Sequence[Mapping[str, Any]], columns: Columns) -> list[dict[str, Any]]:
    """The rows that have a value in every needed column, reduced to needed and input columns; a missing input is `''`."""
    needed = [column for column in (columns.instruction, *columns.choices, columns.answer, columns.label) if column is not None]
    return [
        {column: row[column] for column in needed}
        | {column: "" if row.get(column) is None else row[column] for column in columns.inputs}
        for row in rows
        if all(str(row.get(column) if row.get(column) is not None else "").strip() for column in needed)
    ]


def _renders(task: Task, row: Mapping[str, Any]) -> bool:
    spec = task.sources[0]
    values = {field: row.get(spec.columns.get(field, field)) for field in task.fields}
    try:
        for template in task.templates:
            task.render(values, template)
    except RowError:
        return False
    return True


def _hash(row: Mapping[str, Any]) -> str:
    """Hash of a row's content, by which equal rows get into the same split."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()


def _recipe(name: str, columns: Columns, base: str) -> dict[str, Any]:
    evaluation: dict[str, Any] = {"max_examples": 100}
    return {
        "name": name.replace("_", "-"),
        "storage": "./runs",
        "model": {"base": base},
        "data": {"tasks": ["./task.yaml"], "layout": "chat", "max_length": 512, "packing": {"length": 1024}},
        "tuning": {"method": "lora", "rank": 16},
        "training": {
            "workers": 1,
            "steps": 60,
            "global_batch": 2,
            "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 6},
            "checkpoint": {"every_steps": 30},
        },
        "evaluation": evaluation if columns.label else evaluation | {"max_new_tokens": 64},
    }


def _write(
    folder: Path, content: Mapping[str, Any] | None, recipe: Mapping[str, Any], train: Sequence[Any], tested: Sequence[Any]
) -> None:
    from apprentice.data.sources.parquet_conversion import write_rows

    Recipe.model_validate(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", tested)):
        write_rows(rows, Folder.at(folder / f"{split}.parquet"))
    if content is not None:
        (folder / "task.yaml").write_text(
            "# Reword these, and add more: about ten wordings, and as different as people would say them, make a model that\n"
            "# follows the instruction and not one fixed string. `apprentice tasks ./task.yaml` shows them on the sample row.\n"
            + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120),
            encoding="utf-8",
        )
    (folder / "recipe.yaml").write_text(
        "# A first recipe for one machine without a GPU; `apprentice check recipe.yaml` says whether it is ready.\n"
        + yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )
