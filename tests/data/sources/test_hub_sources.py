"""Datasets on a hub: a local server that speaks the hub's API, with a private dataset, refusals, and answers that do not come."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from apprentice.data.sources import locate as sources
from apprentice.data.sources.locate import Reader, resolve
from apprentice.errors import DataError
from apprentice.storage import Folder
from tests.data.sources.test_locate import ROWS, make_task, write

REPO = "some/mood"
TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """The files under `root`, as the dataset `REPO`, for those who bring `TOKEN`."""

    root: Path
    url: str = ""
    refusals: int = 0  # how many of the next answers are 429
    stuck: threading.Event = field(default_factory=threading.Event)  # while it is not set, files are not sent
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str, authorization: str | None, span: str | None) -> tuple[int, bytes, dict[str, str]]:
        self.requests.append(path)
        if authorization != f"Bearer {TOKEN}":
            return 401, b"", {"X-Error-Code": "RepoNotFound"}
        if self.refusals:
            self.refusals -= 1
            return 429, b"", {}
        if path == f"/api/datasets/{REPO}/revision/~parquet":
            return 200, json.dumps({"id": REPO, "sha": "0" * 40, "siblings": []}).encode(), {}
        if path.startswith(tree := f"/api/datasets/{REPO}/tree/~parquet"):
            return self._listed(path.removeprefix(tree).strip("/"))
        file = self.root / path.removeprefix(f"/datasets/{REPO}/resolve/~parquet/")
        if not file.is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        self.stuck.wait(30)
        content = file.read_bytes()
        first, _, last = (span or f"bytes=0-{len(content) - 1}").removeprefix("bytes=").partition("-")
        return 206, content[int(first) : int(last) + 1], {}

    def _listed(self, folder: str) -> tuple[int, bytes, dict[str, str]]:
        place = self.root / folder
        if not place.is_dir():
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        entries: list[dict[str, Any]] = [
            {"path": child.relative_to(self.root).as_posix(), "oid": "0" * 40, "size": child.stat().st_size}
            | {"type": "directory" if child.is_dir() else "file"}
            for child in sorted(place.iterdir())
        ]
        return 200, json.dumps(entries).encode(), {}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    running = Hub(tmp_path / "hub")
    running.stuck.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, content, headers = running.answer(path, self.headers.get("Authorization"), self.headers.get("Range"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sources, "RETRY_PAUSES_S", (0.0,))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    write(running.root / "plain" / "train" / "0000.parquet", ROWS[:6])
    write(running.root / "plain" / "train" / "0001.parquet", ROWS[6:])
    yield running
    running.stuck.set()
    http.shutdown()
    http.server_close()
    thread.join()
    huggingface_hub.HfFileSystem.clear_instance_cache()


TASK = make_task({"hub": REPO, "config": "plain", "splits": {"train": "train", "test": "validation"}})


def test_a_private_dataset_is_read_with_a_token(hub: Hub, tmp_path: Path) -> None:
    source = resolve(TASK, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    assert source.files == tuple(f"hf://datasets/{REPO}@~parquet/plain/train/000{number}.parquet" for number in (0, 1))
    assert source.rows == 10
    assert [row["text"] for row in Reader(source).rows([7, 0])] == ["text 7", "text 0"]


def test_without_a_token_it_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(DataError, match=rf"dataset '{REPO}' is not on the hub, or it is private; .*HF_TOKEN\.$") as caught:
        resolve(TASK, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    source = resolve(TASK, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    hub.refusals = 2
    assert Reader(source).rows([9])[0]["text"] == "text 9"
    assert hub.refusals == 0
    hub.refusals = 10**6
    with pytest.raises(DataError, match=r"0000\.parquet cannot be read, tried 2 times: .*429.*; check the file and the network\.$"):
        Reader(source).rows([0])
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=rf"dataset '{REPO}' cannot be reached on the hub"):
        resolve(TASK, "train", root=None, cache=Folder.at(tmp_path / "cache"))


def test_a_hub_that_does_not_answer_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    source = resolve(TASK, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    hub.stuck.clear()
    with pytest.raises(
        DataError, match=r"0000\.parquet cannot be read, tried 2 times: .*; check the file and the network\.$"
    ) as caught:
        Reader(source).rows([0])
    assert "\n" not in str(caught.value)


def test_a_file_that_vanishes_while_it_is_read_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    source = resolve(TASK, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    reader = Reader(source, cached_groups=1)
    assert reader.rows([9])[0]["text"] == "text 9"
    (hub.root / "plain" / "train" / "0000.parquet").unlink()
    with pytest.raises(
        DataError, match=r"train/0000\.parquet (cannot be read, tried 2 times: .*404|does not exist any more)"
    ) as caught:
        reader.rows([0])
    assert "\n" not in str(caught.value)


def test_a_split_may_be_one_file_of_a_commit(hub: Hub, tmp_path: Path) -> None:
    write(hub.root / "0.5M-good.parquet", ROWS)
    task = make_task({"hub": REPO, "splits": {"train": "0.5M-good"}})
    source = resolve(task, "train", root=None, cache=Folder.at(tmp_path / "cache"))
    assert source is not None
    assert source.files == (f"hf://datasets/{REPO}@~parquet/0.5M-good.parquet",)
    assert source.rows == 10
