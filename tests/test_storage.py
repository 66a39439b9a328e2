"""Folders: local paths and what a reader may see while something is written."""

from __future__ import annotations

from typing import Any

import pyarrow.fs as pafs
import pytest

from apprentice import storage
from apprentice.errors import StorageError
from apprentice.storage import Folder, user_cache


def test_paths_join_and_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (Folder.at("runs") / "a" / "b.json").uri == str(tmp_path / "runs/a/b.json")
    assert (Folder.at("s3://bucket/runs/") / "a").uri == "s3://bucket/runs/a"
    assert Folder.at("s3://bucket/runs").name == "runs"
    assert not Folder.at("s3://bucket/runs").is_local


def test_json_round_trip_leaves_no_parts(tmp_path):
    file = Folder.at(tmp_path) / "deep" / "value.json"
    file.write_json({"é": [1, 2]})
    file.write_json({"é": [3]})
    assert file.read_json() == {"é": [3]}
    assert [child.name for child in (Folder.at(tmp_path) / "deep").children()] == ["value.json"]


def test_upload_download_delete(tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a.txt").write_text("hello")
    place = Folder.at(tmp_path / "place")
    place.upload(source)
    assert (place / "inner/a.txt").read_text() == "hello"
    assert (place.download(tmp_path / "back") / "inner" / "a.txt").read_text() == "hello"
    place.delete()
    assert not place.exists()
    place.delete()


def test_what_is_missing_is_one_sentence(tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        (Folder.at(tmp_path) / "none").read_bytes()
    with pytest.raises(StorageError, match="not on a local disk"):
        _ = Folder.at("s3://bucket/x").local
    assert Folder.at(tmp_path / "none").children() == []


def test_cache_place_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "c"))
    assert user_cache() == tmp_path / "c"
    monkeypatch.delenv("APPRENTICE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "apprentice"


def test_hdfs_without_hadoop_is_one_sentence(monkeypatch):
    for name in ("JAVA_HOME", "HADOOP_HOME", "ARROW_LIBHDFS_DIR"):
        monkeypatch.setenv(name, "/nowhere")
    pattern = r"^hdfs://namenode:8020/rows needs Hadoop's client on this machine, whose lib\w+ is not found: install Java .*\.$"
    with pytest.raises(StorageError, match=pattern) as caught:
        Folder.at("hdfs://namenode:8020/rows").exists()
    assert "\n" not in str(caught.value)


class InPlace:
    """Stands in for HDFS on a local folder: files are written where they are opened, and nothing is renamed onto a file."""

    type_name = "hdfs"

    def __init__(self) -> None:
        self._inner = pafs.LocalFileSystem()
        self.opened: list[str] = []
        self.full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_output_stream(self, path: str) -> Any:
        self.opened.append(path)
        stream = self._inner.open_output_stream(path)
        if self.full:
            stream.write(b"a part")
            stream.close()
            raise OSError("no space is left")
        return stream

    def move(self, source: str, target: str) -> None:
        if self._inner.get_file_info(target).is_file:
            raise OSError("rename: the destination is there")
        self._inner.move(source, target)


def test_a_file_appears_whole_where_the_file_system_writes_in_place(tmp_path, monkeypatch):
    fs = InPlace()
    monkeypatch.setattr(Folder, "filesystem", lambda self: (fs, self.uri.replace("hdfs://host", str(tmp_path))))
    file = Folder.at("hdfs://host/runs/a/status.json")
    file.write_bytes(b"first")
    file.write_bytes(b"second")
    assert file.read_bytes() == b"second"
    fs.full = True
    with pytest.raises(OSError, match="no space"):
        file.write_bytes(b"third")
    assert file.read_bytes() == b"second"
    assert [child.name for child in Folder.at("hdfs://host/runs/a").children()] == ["status.json"]
    assert len(fs.opened) == 3
    assert all(path.startswith(f"{tmp_path}/runs/a/.status.json.") for path in fs.opened)


def test_an_uploaded_file_appears_whole(tmp_path, monkeypatch):
    moved: list[tuple[str, str]] = []
    fs = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(Folder, "filesystem", lambda self: (fs, self.uri.removeprefix("hdfs://host/")))
    rename = storage._rename

    def notify(system: pafs.FileSystem, part: str, path: str) -> None:
        moved.append((part, path))
        rename(system, part, path)

    monkeypatch.setattr(storage, "_rename", notify)
    (tmp_path / "rows").write_bytes(b"rows")
    file = Folder.at("hdfs://host/cache/rows.parquet")
    for _ in range(2):
        file.upload(tmp_path / "rows")
    assert file.read_bytes() == b"rows"
    assert [path for _, path in moved] == ["cache/rows.parquet"] * 2
    assert [child.name for child in Folder.at("hdfs://host/cache").children()] == ["rows.parquet"]


def test_versions_change_with_the_content(tmp_path):
    folder = Folder.at(tmp_path)
    (folder / "a" / "one").write_text("1")
    (folder / "two").write_text("2")
    before = folder.versions()
    (folder / "a" / "one").write_text("11")
    after = folder.versions()
    assert before.keys() == after.keys() == {"a/one", "two"}
    assert [name for name in before if before[name] != after[name]] == ["a/one"]
