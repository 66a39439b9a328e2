"""The frozen index: what is kept, what is held back, what is refused, and that it is made once."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apprentice.data.index import build as index_module
from apprentice.data.index.build import is_held_out, load_or_build_index
from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sources import parquet_conversion
from apprentice.errors import DataError
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.tasks.registry import library, load_task
from apprentice.tasks.schema import Task


def make_task(name: str = "mood", cluster: str = "sentiment", **changes: Any) -> Task:
    content: dict[str, Any] = {
        "name": name,
        "cluster": cluster,
        "sources": [{"dataset": name}],
        "choices": ["bad", "good"],
        "label": "label",
        "metrics": ["accuracy"],
        "templates": [
            {"name": "ask", "instruction": "Good or bad?", "input": "{{ text }}"},
            {"name": "write", "instruction": "Write something {{ answer }}.", "output": "{{ text }}", "inverted": True},
        ],
    }
    return Task.model_validate(content | changes)


class Site:
    """A data root, a run's index folder and a recipe."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.root, self.folder, self.cache = folder / "data", Folder.at(folder / "index"), Folder.at(folder / "cache")
        self.tokenizer = Tokenizer(model)

    def write(self, rows: list[dict[str, Any]], task: str = "mood", split: str = "train") -> None:
        (self.root / task).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), self.root / task / f"{split}.parquet", row_group_size=100)

    def load_or_build_index(self, *tasks: Task, parallel: bool = False, **data: Any) -> dict[str, TaskIndex]:
        values = {"root": str(self.root), "tasks": [task.name for task in tasks], "layout": "plain"} | data
        content = {"name": "run", "model": {"base": "tiny"}, "data": values, "training": {"steps": 1}}
        recipe = Recipe.model_validate(content)
        return load_or_build_index(tasks, recipe, self.folder, self.cache, self.tokenizer, parallel=parallel)


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Site:
    """1,000 training rows of which 3 are bad, and 50 test rows."""
    made = Site(tmp_path, tiny_model)
    rows = [{"text": f"text {number // 2}", "label": number // 2 % 2} for number in range(1000)]
    rows[4] = {"text": None, "label": 0}
    rows[6] = {"text": "seven", "label": 7}
    rows[8] = {"text": "broken \ufffd", "label": 1}
    made.write(rows)
    made.write([{"text": f"test {number}", "label": number % 2} for number in range(50)], split="test")
    return made


def arrays(index: TaskIndex) -> list[list[int]]:
    return [index.train.tolist(), index.validation.tolist(), index.test.tolist()]


def test_rows_are_kept_held_back_or_rejected(site: Site) -> None:
    index = site.load_or_build_index(make_task(), max_bad_rows=0.01, validation=0.1)["mood"]
    train, validation, test = arrays(index)
    assert test == list(range(50))
    assert sorted(train + validation) == [number for number in range(1000) if number not in (4, 6, 8)]
    assert 60 <= len(validation) <= 140
    assert train == sorted(train)
    # Rows 2n and 2n + 1 are equal, so they are on the same side.
    assert {number // 2 for number in validation}.isdisjoint({number // 2 for number in train})
    assert index.rejects == {"null": 1, "unknown_label": 1, "broken_character": 1}
    lines = [json.loads(line) for line in (site.folder / "mood.rejects.jsonl").read_text().splitlines()]
    assert [(line["task"], line["split"], line["row"], line["reason"]) for line in lines] == [
        ("mood", "train", 4, "null"),
        ("mood", "train", 6, "unknown_label"),
        ("mood", "train", 8, "broken_character"),
    ]


def test_mean_lengths(site: Site) -> None:
    site.write([{"text": "a", "label": 0}, {"text": "a", "label": 1}] * 50)
    index = site.load_or_build_index(make_task(), validation=0.0)["mood"]
    ids = [len(site.tokenizer.encode(text)) for text in ("Good or bad?\n\na\n", "bad", "good")]
    target = (ids[1] + ids[2]) / 2 + 1  # and the end token
    start = len(site.tokenizer.start_ids)
    assert index.mean_target_tokens == pytest.approx(target)
    assert index.mean_tokens == pytest.approx(start + ids[0] + target)


def test_held_out_tasks_keep_their_training_rows_for_exemplars(site: Site) -> None:
    index = site.load_or_build_index(make_task(), max_bad_rows=0.01, hold_out=["sentiment"])["mood"]
    assert len(index.train) == 997
    assert len(index.validation) == 0


def test_a_task_may_have_one_split(site: Site) -> None:
    index = site.load_or_build_index(make_task(sources=[{"dataset": "mood", "splits": {"test": "test"}}]))["mood"]
    assert index.train_source is None
    assert (len(index.train), len(index.validation), len(index.test), index.mean_tokens) == (0, 0, 50, 0.0)
    assert (
        site.load_or_build_index(make_task(sources=[{"dataset": "mood", "splits": {"test": "test"}}]))["mood"].train_source is None
    )


def test_a_row_is_usable_if_one_template_renders_it(site: Site) -> None:
    site.write([{"text": "x", "label": 1}, {"text": "", "label": 1}])
    templates = [
        {"name": "write", "instruction": "Write.", "output": "{{ text }}", "inverted": True},
        {"name": "ask", "instruction": "Good or bad?", "input": "{{ text }}"},
    ]
    assert site.load_or_build_index(make_task(templates=templates), validation=0.0)["mood"].train.tolist() == [0, 1]


@pytest.mark.parametrize("chunk", [7, 333, 5000])
def test_chunks_do_not_matter(site: Site, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"]
    shutil.rmtree(site.folder.local)
    monkeypatch.setattr(index_module, "CHUNK_ROWS", chunk)
    assert arrays(site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"]) == arrays(whole)


def test_what_was_written_is_read_as_it_was(site: Site) -> None:
    frozen, loaded = (site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"] for _ in range(2))
    assert loaded is not frozen
    assert arrays(loaded) == arrays(frozen)
    assert loaded.train.dtype == np.int64
    rest = [{name: value for name, value in vars(index).items() if not isinstance(value, np.ndarray)} for index in (frozen, loaded)]
    assert rest[0] == rest[1]
    with pytest.raises(DataError, match=r"other\.npz does not exist: the run has no index of task 'other'"):
        site.load_or_build_index(make_task("other"))


def test_an_interrupted_index_is_made_again_as_a_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filters of the second attempt see the test rows of the task whose index was written before the first one ended."""
    passage = "the keeper of the lighthouse rowed across the bay before the boats had come in again"
    site.write([{"text": f"{passage} {number}", "label": 0} for number in range(3)] + [{"text": "else", "label": 1}])
    site.write([{"text": passage, "label": 0}], task="other", split="test")
    tasks = make_task("other", "held", sources=[{"dataset": "other", "splits": {"test": "test"}}]), make_task()
    settings: dict[str, Any] = {"filters": {"decontaminate": True}, "hold_out": ["held"], "validation": 0.0}
    write = Folder.write_bytes

    def interrupted(file: Folder, data: bytes) -> None:
        if file.name == "mood.npz":
            raise KeyboardInterrupt
        write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            site.load_or_build_index(*tasks, **settings)
    assert (site.folder / "other.npz").exists()
    index = site.load_or_build_index(*tasks, **settings)["mood"]
    assert (index.train.tolist(), index.filtered) == ([3], {"in_a_test_row": 3})
    report = (site.folder / "contamination.json").read_json()
    assert report["tasks"]["other"] == {"test_rows": 1, "shared": 1, "share": 1.0, "training_rows_dropped": {"mood": 3}}


def test_an_index_of_an_earlier_version_has_no_file_that_says_it_is_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"]
    (site.folder / "index.json").delete()
    monkeypatch.delattr(index_module, "_scan")
    assert arrays(site.load_or_build_index(make_task())["mood"]) == arrays(first)


def test_what_is_frozen_is_used_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"]
    elsewhere = site.root.parent / "moved"
    site.root.rename(elsewhere)
    site.root = elsewhere
    monkeypatch.delattr(index_module, "_scan")
    again = site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"]
    assert arrays(again) == arrays(first)
    assert again.train_source is not None
    assert again.train_source.files == (str(elsewhere / "mood" / "train.parquet"),)


def test_converted_rows_are_known_again_by_their_original(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of pyarrow writes the same rows with another footer."""
    file = site.root / "own.csv"
    file.write_text("text,label\n" + "".join(f"text {number},{number % 2}\n" for number in range(20)))
    task = make_task(sources=[{"files": {"train": str(file)}}])
    index = site.load_or_build_index(task)["mood"]
    site.cache.delete()
    monkeypatch.setattr(pq, "ParquetWriter", partial(pq.ParquetWriter, version="1.0"))
    again = site.load_or_build_index(task)["mood"]
    assert arrays(again) == arrays(index)
    assert (again.train_source and again.train_source.fingerprint) != (index.train_source and index.train_source.fingerprint)
    file.write_text(file.read_text().replace("text 7", "text 8"))
    with pytest.raises(DataError, match=r"the train rows .* have changed"):
        site.load_or_build_index(task)


def test_another_encoding_is_other_rows_though_the_original_is_the_same(site: Site) -> None:
    file = site.root / "own.arrow"
    table = pa.table({"text": pa.array([f"text {number} é".encode("cp1252") for number in range(20)]), "label": [0, 1] * 10})
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    task = make_task(sources=[{"files": {"train": str(file)}, "encoding": "cp1252"}])
    site.load_or_build_index(task)
    site.load_or_build_index(task)
    with pytest.raises(DataError, match=r"the train rows .* have changed"):
        site.load_or_build_index(make_task(sources=[{"files": {"train": str(file)}, "encoding": "cp1251"}]))


def test_rows_of_a_file_that_changes_while_it_is_converted_are_not_known_by_its_new_content(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = site.root / "own.csv"

    def content(word: str) -> str:
        return "text,label\n" + "".join(f"{word} {number},{number % 2}\n" for number in range(20))

    def write_and_replace(*arguments: Any) -> None:
        write(*arguments)
        file.write_text(content("a new text"))

    file.write_text(content("text"))
    task = make_task(sources=[{"files": {"train": str(file)}}])
    write = parquet_conversion._write
    with monkeypatch.context() as patch:
        patch.setattr(parquet_conversion, "_write", write_and_replace)
        index = site.load_or_build_index(task)["mood"]
    assert index.train_source is not None
    assert index.train_source.original is None
    with pytest.raises(DataError, match=r"the train rows .* have changed"):
        site.load_or_build_index(task)


def test_changed_sources_and_tasks_are_refused(site: Site) -> None:
    site.load_or_build_index(make_task(), max_bad_rows=0.01)
    with pytest.raises(DataError, match="'mood': its templates or answers have changed"):
        site.load_or_build_index(make_task(choices=["awful", "good"]))
    site.write([{"text": "new", "label": 0}], split="test")
    with pytest.raises(
        DataError, match=r"'mood': the test rows \(.*/mood/test.parquet\) have changed .* start over with --restart"
    ):
        site.load_or_build_index(make_task())


def test_the_same_rows_under_another_column_are_refused(site: Site) -> None:
    for split in ("train", "test"):
        site.write([{"text": f"text {number}", "other": "else", "label": 0} for number in range(20)], split=split)
    site.load_or_build_index(make_task())
    with pytest.raises(DataError, match=r"'mood': the train columns \(.*\) have changed"):
        site.load_or_build_index(make_task(sources=[{"dataset": "mood", "columns": {"text": "other"}}]))


def test_converted_rows_outlive_the_file_they_came_from(site: Site) -> None:
    file = site.root / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {number}", "label": 0}) + "\n" for number in range(20)))
    task = make_task(sources=[{"files": {"train": str(file)}}])
    first = site.load_or_build_index(task)["mood"]
    file.unlink()
    again = site.load_or_build_index(task)["mood"]
    assert arrays(again) == arrays(first)
    assert again.train_source == first.train_source
    shutil.rmtree(site.cache.local)
    with pytest.raises(DataError, match=r"rows\.jsonl does not exist; correct data\.root or the paths in the task's file"):
        site.load_or_build_index(task)


def test_too_many_bad_rows_stop_the_run_before_anything_is_written(site: Site) -> None:
    site.write([{"text": "x", "label": 0}] * 10, task="fine")
    site.write([{"text": "x", "label": 0}] * 10, task="fine", split="test")
    with pytest.raises(DataError) as error:
        site.load_or_build_index(make_task("fine"), make_task(), max_bad_rows=0.002)
    assert "task 'mood': 3 of 1050 rows are unusable, more than data.max_bad_rows = 0.002 allows" in str(error.value)
    assert "train row 4: task 'mood': field 'text' is null.; train row 6:" in str(error.value)
    assert not site.folder.exists()


def test_held_out_by_task_or_cluster() -> None:
    tasks = [make_task("a", "x"), make_task("b", "x"), make_task("c", "y")]
    for hold_out, expected in (["x"], "ab"), (["c", "a"], "ac"), ([], ""):
        assert [task.name for task in tasks if is_held_out(task, hold_out)] == list(expected)


def test_ray_gives_the_same_index(site: Site, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK_ROWS", 300)
    here = site.load_or_build_index(make_task(), max_bad_rows=0.01)["mood"]
    shutil.rmtree(site.folder.local)
    assert arrays(site.load_or_build_index(make_task(), max_bad_rows=0.01, parallel=True)["mood"]) == arrays(here)


def test_an_error_in_a_ray_worker_is_still_one_sentence(site: Site, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site.root / "mood" / "train.parquet"
    resolve = index_module.resolve

    def resolve_and_lose(task: Task, split: Any, **rest: Any) -> Any:
        source = resolve(task, split, **rest)
        if split == "test":
            file.unlink()
        return source

    monkeypatch.setattr(index_module, "resolve", resolve_and_lose)
    with pytest.raises(DataError, match=f"^{file} does not exist any more; put it back.$"):
        site.load_or_build_index(make_task(), parallel=True)


def test_rows_of_snli_without_a_verdict_are_left_out_and_are_no_bad_rows(site: Site) -> None:
    task = load_task(library()["snli"])
    rows = [{"premise": f"A cat {n} sleeps.", "hypothesis": "It rests.", "label": n % 4 - 1} for n in range(400)]
    site.write(rows, "snli")
    site.write(rows[:40], "snli", "test")
    index = site.load_or_build_index(task, validation=0.0)["snli"]  # a quarter would be far more bad rows than max_bad_rows allows
    assert len(index.train) == 300
    assert {rows[row]["label"] for row in index.train} == {0, 1, 2}
    assert len(index.test) == 30
    assert index.rejects == {"skipped": 110}
    assert (site.folder / "snli.rejects.jsonl").read_text().count("\n") == 110
