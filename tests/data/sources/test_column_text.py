"""What a person wrote into CSV and JSON is what the model reads: text as it stands, numbers as they are, in the file's encoding."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apprentice.data.corpus import make_corpus
from apprentice.data.sources import parquet_conversion
from apprentice.data.sources.locate import Reader, Source, resolve
from apprentice.errors import DataError, RowError
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.tasks.schema import Example, Task
from tests.support.recipes import tiny_recipe

CSV = "text,said,label\nfirst,0,1\nsecond,0.5,0\nthird,true,1\nfourth,00001,0\nfifth,1.10,1\nsixth,NA,0\nseventh,2020-01-02,1\n"
SAID = ["0", "0.5", "true", "00001", "1.10", "NA", "2020-01-02"]


def writing(file: Path, **source: Any) -> Task:
    """A task whose answers are the column `said` of `file`."""
    content: dict[str, Any] = {
        "name": "own",
        "cluster": "own",
        "sources": [{"files": {"train": str(file)}, **source}],
        "answer": "{{ said }}",
        "metrics": ["exact_match"],
        "templates": [{"name": "ask", "instruction": "Say it: {{ said }}", "input": "{{ text }}"}],
    }
    return Task.model_validate(content)


def choosing(file: Path, label: str, **changes: Any) -> Task:
    """A task with two choices, of which `label` says the right one."""
    ask = {"name": "ask", "instruction": "Yes or no?", "input": "{{ text }} {{ said }}"}
    content: dict[str, Any] = {
        "name": "own",
        "cluster": "own",
        "sources": [{"files": {"train": str(file)}}],
        "choices": ["no", "yes"],
        "label": label,
        "metrics": ["accuracy"],
        "templates": [ask],
    }
    return Task.model_validate(content | changes)


def source_of(task: Task, folder: Path, rules: int = 2) -> Source:
    source = resolve(task, "train", root=None, cache=Folder.at(folder / "cache"), rules=rules)
    assert source is not None
    return source


def examples(task: Task, folder: Path, rules: int = 2) -> list[Example]:
    source = source_of(task, folder, rules)
    return [task.render(row, task.templates[0]) for row in Reader(source).rows(range(source.rows))]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_text_in_csv_stays_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(parquet_conversion, "_BLOCK_BYTES", 64)
    file = tmp_path / f"own.{kind}"
    file.write_text(CSV.replace(",", "\t") if kind == "tsv" else CSV)
    shown = examples(writing(file), tmp_path)
    assert [example.target for example in shown] == SAID
    assert [example.instruction for example in shown] == [f"Say it: {said}" for said in SAID]


@pytest.mark.parametrize(
    ("column", "cells", "printed"),
    [
        ("0\n0.5\n", ["0", "0.5"], ["0.0", "0.5"]),
        ("true\nfalse\n", ["true", "false"], ["True", "False"]),
        ("00001\n00002\n", ["00001", "00002"], ["1", "2"]),
        ("2020-01-02 10:00\n2020-01-03 11:30\n", ["2020-01-02 10:00", "2020-01-03 11:30"], None),
    ],
)
def test_runs_of_format_1_go_on_with_guessed_types(
    tmp_path: Path, column: str, cells: list[str], printed: list[str] | None
) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,said\n" + "".join(f"text {number},{line}\n" for number, line in enumerate(column.split("\n")) if line))
    assert [example.target for example in examples(writing(file), tmp_path, rules=2)] == cells
    old = [example.target for example in examples(writing(file), tmp_path, rules=1)]
    assert old == (printed or ["2020-01-02 10:00:00", "2020-01-03 11:30:00"])
    prints = [source_of(writing(file), tmp_path, rules).fingerprint for rules in (1, 2)]
    assert prints[0] != prints[1]
    assert len(list((tmp_path / "cache" / "converted").glob("*.parquet"))) == 2


def test_the_file_of_a_run_of_format_1_is_the_one_it_was_made_with(tmp_path: Path, tiny_model: Path) -> None:
    """Fingerprints that the first version computed for this very file: an index made then is still good."""
    file = tmp_path / "own.csv"
    file.write_text(CSV)
    (tmp_path / "own.yaml").write_text(writing(Path("own.csv")).model_dump_json(exclude_defaults=True))
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["./own.yaml"], data__hold_out=[]))
    runs = {rules: Run(Folder.at(tmp_path / f"run{rules}")) for rules in (1, 2)}
    for rules, run in runs.items():
        (run.folder / "identity.json").write_json({"keys": {}} | ({"format": 2} if rules == 2 else {}))
    sources = {rules: make_corpus(recipe, run, parallel=False).indices["own"].train_source for rules, run in runs.items()}
    assert [source and source.readings for source in sources.values()] == [{}, {}]
    assert sources[1] == source_of(writing(file), tmp_path / "runs", rules=1)
    assert sources[2] == source_of(writing(file), tmp_path / "runs", rules=2)
    assert sources[1] != sources[2]
    assert make_corpus(recipe, runs[1], parallel=False).indices["own"].train_source == sources[1]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("label", ["yes", "no", "yes", "no"]),
        ("1 if stars > 3 else 0", ["yes", "no", "no", "yes"]),
        ("1 if stars == 5 else 0", ["yes", "no", "no", "no"]),
        ("['1', '5.0', '2', '4'].index(stars) % 2", ["yes", "no", "no", "yes"]),
        ("1 if stars == '5.0' else 0", ["yes", "no", "no", "no"]),
        ("1 if fine else 0", ["yes", "no", "no", "yes"]),
        ("['false', 'true'].index(fine)", ["yes", "no", "no", "yes"]),
        ("label | int", ["yes", "no", "yes", "no"]),
    ],
)
def test_a_label_sees_the_numbers_that_cells_spell(tmp_path: Path, label: str, expected: list[str]) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,said,label,stars,fine\na,01,1,5.0,true\nb,1.0,0,1,false\nc,x,1,2,false\nd,x,0,4,true\n")
    shown = examples(choosing(file, label), tmp_path)
    assert [example.target for example in shown] == expected
    assert [example.input for example in shown][:2] == ["a 01", "b 1.0"]


def test_templates_see_text_where_a_label_sees_a_number(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,said,n\na,x,1.00\nb,x,\nc,x,NA\nd,x,-1\n")
    ask = {"name": "ask", "instruction": "{{ n }}", "input": "{{ text }} {{ said }}"}
    task = choosing(file, "1 if n > 0 else 0", keep="n != -1", templates=[ask])
    rows = Reader(source_of(task, tmp_path)).rows(range(4))
    assert pickle.loads(pickle.dumps(rows)) == rows
    assert task.render(rows[0], task.templates[0]).instruction == "1.00"
    assert task.render(pickle.loads(pickle.dumps(rows[0])), task.templates[0]).target == "yes"
    refused = []
    for row in rows[1:]:
        with pytest.raises(RowError) as error:
            task.render(row, task.templates[0])
        refused.append(error.value)
    assert [error.reason for error in refused] == ["null", "null", "skipped"]
    assert "field 'n' is 'NA', which is no value" in str(refused[1])


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_numbers_in_json_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(parquet_conversion, "ROWS_PER_GROUP", 1)
    said = [0, 0.5, None, 12345678901234567890123, 3]
    rows = [{"text": {"n": n, "of": [n, 1.5]} | ({"and": n} if n == 0 else {}), "said": n, "whole": 7, "half": 0.5} for n in said]
    file = tmp_path / f"own.{kind}"
    file.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    template = {
        "name": "ask",
        "instruction": "{{ text.n }} {{ text.of[0] }} {{ text['and'] is none }}",
        "input": "{{ whole }} {{ half }}",
    }
    task = writing(file).model_copy(update={"templates": (writing(file).templates[0].model_validate(template),)})
    source = source_of(task, tmp_path)
    raw_rows = Reader(source).rows(range(5))
    assert [(row["said"], type(row["said"])) for row in raw_rows] == [(n, type(n)) for n in said]
    assert [(row["whole"], row["half"]) for row in raw_rows] == [(7, 0.5)] * 5
    assert raw_rows[1]["text"] == {"n": 0.5, "of": [0.5, 1.5], "and": None}
    shown = [task.render(raw_rows[row], task.templates[0]) for row in (0, 1, 3)]
    assert [example.target for example in shown] == ["0", "0.5", "12345678901234567890123"]
    assert [example.instruction for example in shown] == ["0 0 False", "0.5 0.5 True", f"{said[3]} {said[3]} True"]
    assert {name: pq.read_schema(source.files[0]).field(name).type for name in ("whole", "half")} == {
        "whole": pa.int64(),
        "half": pa.float64(),
    }


def test_json_of_a_run_of_format_1_has_numbers_of_one_type(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a", "said": 0}\n{"text": "b", "said": 0.5}\n')
    assert [example.target for example in examples(writing(file), tmp_path, rules=1)] == ["0.0", "0.5"]
    assert [example.target for example in examples(writing(file), tmp_path, rules=2)] == ["0", "0.5"]


def test_half_a_surrogate_pair_is_a_broken_character_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a \\ud83d", "said": "x"}\n{"text": "b \\ud83d\\ude00", "said": "y", "k\\udc00": 1}\n')
    task = writing(file)
    rows = Reader(source_of(task, tmp_path)).rows([0, 1])
    with pytest.raises(RowError) as error:
        task.render(rows[0], task.templates[0])
    assert error.value.reason == "broken_character"
    assert task.render(rows[1], task.templates[0]).input == "b 😀"
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a \ud83d", "said": "x"}]))
    assert Reader(source_of(writing(tmp_path / "list.json"), tmp_path)).rows([0])[0]["text"] == "a \ufffd"


def test_keys_of_different_types_are_still_refused_beside_long_numbers(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a", "said": 123456789012345678901}\n{"text": "b", "said": "word"}\n')
    with pytest.raises(DataError, match=r"own\.jsonl: a key has values of different types: .*; give each key one type\."):
        source_of(writing(file), tmp_path)


@pytest.mark.parametrize(
    ("encoding", "name", "message"),
    [
        (
            "cp1252",
            "own.csv",
            "own.csv:3 is not UTF-8: b'caf\\xe9 2,no'; with `encoding: cp1252` in the source it reads 'café 2,no'.",
        ),
        ("utf-16", "own.tsv", "with `encoding: utf-16` in the source it reads 'text"),
        ("cp1252", "own.jsonl", "with `encoding: cp1252` in the source it reads '{"),
    ],
)
def test_a_file_in_another_encoding_is_refused_with_the_one_that_reads_it(
    tmp_path: Path, encoding: str, name: str, message: str
) -> None:
    rows = [{"text": "tea 1", "said": "yes"}, {"text": "café 2", "said": "no"}]
    tab = "\t" if name.endswith(".tsv") else ","
    lines = (
        [json.dumps(row, ensure_ascii=False) for row in rows]
        if name.endswith(".jsonl")
        else ["text" + tab + "said", *(tab.join(row.values()) for row in rows)]
    )
    (tmp_path / name).write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(DataError) as error:
        source_of(writing(tmp_path / name), tmp_path)
    assert message in str(error.value)
    shown = examples(writing(tmp_path / name, encoding=encoding), tmp_path)
    assert [(example.input, example.target) for example in shown] == [("tea 1", "yes"), ("café 2", "no")]


def test_encodings_that_cannot_be_guessed_or_do_not_read_the_file(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_bytes("text,said\nテスト。,x\n".encode("shift_jis"))
    with pytest.raises(DataError, match=r"own\.csv:2 is not UTF-8: .*say with `encoding: NAME` in the source how it was written"):
        source_of(writing(file), tmp_path)
    assert examples(writing(file, encoding="shift_jis"), tmp_path)[0].input == "テスト。"
    with pytest.raises(DataError, match=r"own\.csv cannot be read as CSV in ascii: "):
        source_of(writing(file, encoding="ascii"), tmp_path)
    with pytest.raises(ValueError, match="no encoding is called 'latin-wun'; give one such as utf-8, cp1252 or shift_jis"):
        writing(file, encoding="latin-wun")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_columns_of_bytes_are_refused_with_the_encoding_that_reads_them(tmp_path: Path, kind: pa.DataType) -> None:
    file = tmp_path / "own.parquet"
    pq.write_table(
        pa.table({"text": pa.array([b"tea 1", b"caf\xe9 2"], kind), "said": ["yes", "no"], "other": [b"\xff"] * 2}), file
    )
    with pytest.raises(DataError) as error:
        source_of(writing(file), tmp_path)
    assert str(error.value) == (
        f"task 'own': column 'text' of {file} holds bytes, not text: b'caf\\xe9 2'; with `encoding: cp1252` in the source it reads"
        " 'café 2'. If that is not what was written, name the encoding that it was written in."
    )
    assert [example.input for example in examples(writing(file, encoding="cp1252"), tmp_path)] == ["tea 1", "café 2"]
    prints = {source_of(writing(file, encoding=name), tmp_path).fingerprint for name in ("cp1252", "latin-1")}
    assert len(prints) == 2
    assert source_of(writing(file), tmp_path, rules=1).readings == {}
