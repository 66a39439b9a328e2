"""Folders: local paths and what a reader may see while something is written."""

from __future__ import annotations

import pytest

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
    wanted = r"^hdfs://namenode:8020/rows needs Hadoop's client on this machine, whose lib\w+ is not found: install Java .*\.$"
    with pytest.raises(StorageError, match=wanted) as caught:
        Folder.at("hdfs://namenode:8020/rows").exists()
    assert "\n" not in str(caught.value)
