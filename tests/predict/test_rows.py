"""Files in chunks, and what is wrong with single rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apprentice.errors import DataError
from apprentice.predict.rows import read_chunk, split_into_chunks
from apprentice.storage import Folder


def lines(folder: Path, *texts: str, end: str = "\n") -> Folder:
    (folder / "asked.jsonl").write_text("\n".join(texts) + end, encoding="utf-8")
    return Folder.at(folder / "asked.jsonl")


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("count", [1, 4, 5, 8, 9])
def test_chunks_of_lines_hold_every_row_once(tmp_path: Path, count: int, end: str) -> None:
    file = lines(tmp_path, *[json.dumps({"instruction": f"é {number}"}, ensure_ascii=False) for number in range(count)], end=end)
    chunks = split_into_chunks(file, size=4)
    read_rows = [row for chunk in chunks for row in read_chunk(file, chunk)]
    assert [(row.number, row.instruction) for row in read_rows] == [(number, f"é {number}") for number in range(count)]
    assert len(chunks) == -(-count // 4)


def test_bad_lines_have_a_reason(tmp_path: Path) -> None:
    file = lines(
        tmp_path, "{", '{"instruction": 3}', '{"input": "x"}', "[1]", '{"instruction": "a", "input": 4}', '{"instruction": " "}', ""
    )
    [chunk] = split_into_chunks(file)
    problems = [row.problem for row in read_chunk(file, chunk)]
    assert problems[0].startswith("not JSON: ")
    assert problems[1:6] == [
        "`instruction` is not a text with something in it",
        "no `instruction`",
        "not an object but list",
        "`input` is not a text but int",
        "`instruction` is not a text with something in it",
    ]
    assert problems[6].startswith("not JSON")


def test_parquet_in_chunks_within_row_groups(tmp_path: Path) -> None:
    table = pa.table({"other": range(10), "instruction": [f"i{n}" for n in range(10)], "input": [None, *["x"] * 9]})
    pq.write_table(table, tmp_path / "asked.parquet", row_group_size=6)
    file = Folder.at(tmp_path / "asked.parquet")
    chunks = split_into_chunks(file, size=4)
    assert [(chunk.first, chunk.rows) for chunk in chunks] == [(0, 4), (4, 2), (6, 4)]
    read_rows = [row for chunk in chunks for row in read_chunk(file, chunk)]
    assert [(row.number, row.instruction) for row in read_rows] == [(n, f"i{n}") for n in range(10)]
    assert [row.input for row in read_rows] == ["", *["x"] * 9]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither"):
        split_into_chunks(Folder.at(tmp_path / "asked.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        split_into_chunks(Folder.at(tmp_path / "asked.jsonl"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "asked.parquet")
    with pytest.raises(DataError, match="no column `instruction`; its columns are text"):
        split_into_chunks(Folder.at(tmp_path / "asked.parquet"))
