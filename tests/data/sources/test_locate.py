"""Sources: where rows are found, what is said when they are not, and reading them by number."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from apprentice.data.sources import locate as sources
from apprentice.data.sources import parquet_conversion
from apprentice.data.sources.locate import Reader, resolve
from apprentice.errors import DataError
from apprentice.storage import Folder
from apprentice.tasks import builtin
from apprentice.tasks.registry import load_task
from apprentice.tasks.schema import Task

ROWS = [{"text": f"text {number}", "label": number % 2, "idx": number} for number in range(10)]
QUOTED = [{**row, "text": f'{row["text"]},\n"quoted"'} for row in ROWS]


def make_task(*places: dict[str, Any], **changes: Any) -> Task:
    content: dict[str, Any] = {
        "name": "mood",
        "cluster": "sentiment",
        "sources": places or [{"dataset": "mood"}],
        "choices": ["bad", "good"],
        "label": "label",
        "metrics": ["accuracy"],
        "templates": [{"name": "ask", "instruction": "Good or bad?", "input": "{{ text }}"}],
    }
    return Task.model_validate(content | changes)


def write(file: Path, rows: list[dict[str, Any]] = ROWS, group: int = 4) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "cache")


def test_a_dataset_under_the_root(tmp_path: Path, cache: Folder) -> None:
    file = write(tmp_path / "mood" / "train.parquet")
    write(tmp_path / "mood" / "test.parquet", ROWS[:3])
    source = resolve(make_task(), "train", root=str(tmp_path), cache=cache)
    assert source is not None
    assert (source.files, source.file_groups, source.group_rows, source.rows) == ((str(file),), (3,), (4, 4, 2), 10)
    assert source.columns == {"text": "text", "label": "label"}
    reader = Reader(source)
    assert reader.rows([9, 0, 5, 0]) == [{"label": n % 2, "text": f"text {n}"} for n in (9, 0, 5, 0)]
    assert reader.rows(np.array([], dtype=np.int64)) == []
    assert pickle.loads(pickle.dumps(reader)).rows([3]) == [{"label": 1, "text": "text 3"}]
    with pytest.raises(ValueError, match="asked for 10"):
        reader.rows([10])


@pytest.mark.parametrize("names", [("train-00000-of-00002", "train-00001-of-00002"), ("train/a", "train/b")])
def test_a_split_in_several_files(tmp_path: Path, cache: Folder, names: tuple[str, str]) -> None:
    for name, rows in zip(names, (ROWS[:6], ROWS[6:]), strict=True):
        write(tmp_path / "mood" / f"{name}.parquet", rows)
    write(tmp_path / "mood" / "training.parquet")
    source = resolve(make_task(), "train", root=str(tmp_path), cache=cache)
    assert source is not None
    assert source.file_groups == (2, 1)
    assert source.group_rows == (4, 2, 4)
    assert [row["text"] for row in Reader(source, cached_groups=1).rows([7, 5, 9, 0])] == ["text 7", "text 5", "text 9", "text 0"]


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path, cache: Folder) -> None:
    write(tmp_path / "one" / "mood" / "train.parquet")
    write(tmp_path / "two" / "mood" / "train.parquet")
    write(tmp_path / "three" / "mood" / "train.parquet", [*ROWS[:9], {"text": "other", "label": 1, "idx": 9}])
    sources = [resolve(make_task(), "train", root=str(tmp_path / place), cache=cache) for place in ("one", "two", "three")]
    prints = [source.fingerprint for source in sources if source]
    assert prints[0] == prints[1] != prints[2]


def test_columns_may_have_other_names(tmp_path: Path, cache: Folder) -> None:
    write(tmp_path / "mood" / "train.parquet", [{"sentence": "fine", "label": 1}])
    task = make_task({"dataset": "mood", "splits": {"train": "train"}, "columns": {"text": "sentence"}})
    source = resolve(task, "train", root=str(tmp_path), cache=cache)
    assert source is not None
    assert Reader(source).rows([0]) == [{"text": "fine", "label": 1}]
    assert resolve(task, "test", root=str(tmp_path), cache=cache) is None


def as_csv(file: Path) -> None:
    file.write_text("idx,text,label\n" + "".join(f'{r["idx"]},"{r["text"]},\n""quoted""",{r["label"]}\n' for r in ROWS))


def as_jsonl_gz(file: Path) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n\n" for row in QUOTED)


def as_jsonl_zst(file: Path) -> None:
    with pa.CompressedOutputStream(str(file), "zstd") as out:
        out.write("".join(json.dumps(row) + "\n" for row in QUOTED).encode())


def as_arrow_stream(file: Path) -> None:
    table = pa.Table.from_pylist(QUOTED)
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=3)


def as_arrow_file(file: Path) -> None:
    table = pa.Table.from_pylist(QUOTED)
    with pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table, max_chunksize=3)


def as_saved_to_disk(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_list(QUOTED).save_to_disk(folder, num_shards=3)


KINDS = [
    ("mood.csv", as_csv),
    ("mood.jsonl.gz", as_jsonl_gz),
    ("mood.jsonl.zst", as_jsonl_zst),
    ("stream.arrow", as_arrow_stream),
    ("file.arrow", as_arrow_file),
    ("saved", as_saved_to_disk),
]


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_files_are_converted_once(
    tmp_path: Path, cache: Folder, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(parquet_conversion, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(parquet_conversion, "_BLOCK_BYTES", 64)
    make(tmp_path / name)
    task = make_task({"files": {"train": str(tmp_path / name)}})
    source = resolve(task, "train", root=None, cache=cache)
    assert source is not None
    assert source.group_rows == (4, 4, 2)
    assert Reader(source).rows([8]) == [{"text": 'text 8,\n"quoted"', "label": "0" if name.endswith(".csv") else 0}]
    modified = Path(source.files[0]).stat().st_mtime_ns
    assert resolve(task, "train", root=None, cache=cache) == source
    assert Path(source.files[0]).stat().st_mtime_ns == modified
    assert resolve(task, "test", root=None, cache=cache) is None
    assert [path.name for path in cache.local.rglob("*.part")] == []


def test_json_lines_of_mixed_types(tmp_path: Path, cache: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_conversion, "ROWS_PER_GROUP", 1)
    lines = [{"text": "a", "label": 0, "parts": []}, {"text": "b", "label": 1, "parts": [{"x": 1}]}, {"text": "c", "label": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    file = parquet_conversion.parquet_file(str(tmp_path / "a.jsonl"), cache, "mood")
    assert pq.read_table(file).to_pylist() == [
        {"text": "a", "label": 0, "parts": []},
        {"text": "b", "label": 1, "parts": [{"x": 1}]},
        {"text": "c", "label": 2, "parts": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: holds list, not an object"),
        ("a.jsonl", '{"text": 1}\n{"text": "b"}\n', "a key has values of different types"),
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "text,label\na\n", "cannot be read as CSV"),
        ("a.csv", "", "cannot be read as CSV"),
        ("a.xlsx", "", "of no kind that can be read"),
        ("a.parquet", "text", r"a\.parquet is not a readable Parquet file"),
        ("a.arrow", "text", r"a\.arrow cannot be read as Arrow"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, cache: Folder, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        resolve(make_task({"files": {"train": str(tmp_path / name)}}), "train", root=None, cache=cache)
    assert list(cache.local.rglob("*")) in ([], [cache.local / "converted"])


def test_a_saved_dataset_under_the_root(tmp_path: Path, cache: Folder) -> None:
    import datasets

    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])})
    whole.save_to_disk(tmp_path / "mood")
    sources = [resolve(make_task(), split, root=str(tmp_path), cache=cache) for split in ("train", "test")]
    assert [source and source.rows for source in sources] == [10, 3]
    with pytest.raises(DataError, match=r"mood is a folder without state\.json; name the folder of one split: test, train\."):
        parquet_conversion.parquet_file(str(tmp_path / "mood"), cache, "mood")
    [file] = (tmp_path / "mood" / "train").glob("*.arrow")
    file.unlink()
    with pytest.raises(DataError, match=rf"{file} does not exist; put it back"):
        resolve(make_task(), "train", root=str(tmp_path), cache=cache)


def test_a_parquet_file_whose_pages_are_broken(tmp_path: Path, cache: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its footer is whole, so it can be indexed; what is said when a row is read names the file."""
    monkeypatch.setattr(sources, "RETRY_PAUSES_S", (0.0, 0.0))
    file = write(tmp_path / "mood" / "train.parquet")
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    source = resolve(make_task(), "train", root=str(tmp_path), cache=cache)
    assert source is not None
    with pytest.raises(DataError, match=rf"^{file} cannot be read, tried 3 times: .+; check the file and the network\.$"):
        Reader(source).rows([0])
    file.write_bytes(bytes(content)[:-300])
    with pytest.raises(DataError, match=rf"^{file} is not a readable Parquet file: "):
        resolve(make_task(), "train", root=str(tmp_path), cache=cache)


def test_builtin_rows_are_written_once(tmp_path: Path, cache: Folder) -> None:
    name = next(iter(builtin.GENERATORS))
    task = load_task(Path(builtin.__file__).parents[1] / "library" / "quickstart" / f"{name}.yaml")
    source = resolve(task, "test", root=None, cache=cache)
    again = resolve(task, "test", root=None, cache=Folder.at(tmp_path / "another"))
    assert source is not None
    assert again is not None
    assert source.fingerprint == again.fingerprint
    expected = builtin.rows(name, "test")
    assert source.rows == len(expected) >= 60
    assert Reader(source).rows([7]) == [{field: expected[7][field] for field in sorted(task.fields)}]


@pytest.mark.parametrize(
    ("places", "root", "message"),
    [
        ([{"dataset": "mood"}], None, "dataset 'mood' needs data.root, which is not set"),
        ([{"dataset": "mood"}], "{tmp}", r"{tmp}/mood \(dataset 'mood' under data.root\) does not exist; correct data.root"),
        ([{"dataset": "half"}], "{tmp}", r"{tmp}/half/train.parquet does not exist; put it there or correct data.root"),
        ([{"files": {"train": "{tmp}/no.csv"}}], None, r"{tmp}/no.csv does not exist"),
        ([{"dataset": "mood"}, {"hub": "some/mood"}], "{tmp}", r"{tmp}/mood .* does not exist; dataset 'some/mood' .* on the hub"),
    ],
)
def test_missing_places_are_named(
    tmp_path: Path, cache: Folder, places: list[dict[str, Any]], root: str | None, message: str
) -> None:
    write(tmp_path / "half" / "test.parquet")
    filled = json.loads(json.dumps(places).replace("{tmp}", str(tmp_path)))
    with pytest.raises(DataError, match=message.replace("{tmp}", str(tmp_path))):
        resolve(make_task(*filled), "train", root=root and str(tmp_path), cache=cache)


def test_a_column_that_does_not_exist(tmp_path: Path, cache: Folder) -> None:
    write(tmp_path / "mood" / "train.parquet")
    templates = [
        {"name": "ask", "instruction": "Good or bad?", "input": "{{ text }}"},
        {"name": "other", "instruction": "Is this good?", "input": "{{ texts }}"},
    ]
    with pytest.raises(DataError) as error:
        resolve(make_task(templates=templates), "train", root=str(tmp_path), cache=cache)
    assert str(error.value) == (
        f"task 'mood': template 'other' names 'texts', but {tmp_path}/mood/train.parquet has no column 'texts'."
        " Did you mean 'text'? Its columns are text, label, idx."
    )


def test_the_hub_is_read_through_its_parquet_branch(tmp_path: Path, cache: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "datasets/some/mood@~parquet/plain/train/0000.parquet", ROWS[:6])
    write(tmp_path / "datasets/some/mood@~parquet/plain/train/0001.parquet", ROWS[6:])
    local = Folder.filesystem

    def here(self: Folder) -> tuple[pafs.FileSystem, str]:
        return local(Folder.at(self.uri.replace("hf:/", str(tmp_path))))

    monkeypatch.setattr(Folder, "filesystem", here)
    task = make_task({"hub": "some/mood", "config": "plain", "splits": {"train": "train", "test": "validation"}})
    source = resolve(task, "train", root=None, cache=cache)
    assert source is not None
    assert source.files == tuple(f"hf://datasets/some/mood@~parquet/plain/train/000{n}.parquet" for n in (0, 1))
    assert Reader(source).rows([6])[0]["text"] == "text 6"
    with pytest.raises(DataError, match="'some/mood' has no Parquet files on the hub for split 'validation'"):
        resolve(task, "test", root=None, cache=cache)


class Flaky:
    """Stands for `_open`: fails the first `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0
        self.open = sources._open

    def __call__(self, file: str) -> pq.ParquetFile:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("connection lost")
        return self.open(file)


@pytest.mark.parametrize("failures", [3, 4])
def test_reading_is_tried_again(tmp_path: Path, cache: Folder, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    file = write(tmp_path / "mood" / "train.parquet")
    source = resolve(make_task(), "train", root=str(tmp_path), cache=cache)
    assert source is not None
    flaky = Flaky(failures)
    monkeypatch.setattr(sources, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(sources, "_open", flaky)
    if failures < 4:
        assert Reader(source).rows([1])[0]["text"] == "text 1"
    else:
        with pytest.raises(DataError, match=f"{file} cannot be read, tried 4 times: connection lost"):
            Reader(source).rows([1])
    assert flaky.calls == 4


def test_a_file_that_changes_under_the_reader(tmp_path: Path, cache: Folder) -> None:
    file = write(tmp_path / "mood" / "train.parquet")
    source = resolve(make_task(), "train", root=str(tmp_path), cache=cache)
    assert source is not None
    write(file, ROWS[:3])
    with pytest.raises(DataError, match=f"{file} has changed since it was indexed"):
        Reader(source).rows([0])
    file.unlink()
    with pytest.raises(DataError, match=f"{file} does not exist any more"):
        Reader(source).rows([0])


def test_only_a_few_row_groups_stay_in_memory(tmp_path: Path, cache: Folder) -> None:
    write(tmp_path / "mood" / "train.parquet", ROWS * 10, group=1)
    source = resolve(make_task(), "train", root=str(tmp_path), cache=cache)
    assert source is not None
    reader = Reader(source, cached_groups=5)
    assert len(reader.rows(range(100))) == 100
    assert reader._read_group.cache_info().currsize == 5
