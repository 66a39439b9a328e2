"""Uploads to a hub that answers in the Hugging Face hub's forms: repositories, LFS objects, one commit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from apprentice.errors import StorageError
from apprentice.pipeline.export.hub_upload import push_folder

# huggingface_hub sends an LFS object to its client, httpx2, in a way that this calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning")


class Hub:
    """A hub in memory: repositories (name → whether it is private), LFS objects, and the files of each commit."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, str]] = []
        self.refuses_commits = False
        self.url = ""

    def answer(self, method: str, path: str, data: bytes) -> tuple[int, Any]:
        """Status and JSON for a request."""
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = data
            return 200, {}
        if path == "/api/repos/create":
            body = json.loads(data)
            name = f"{body.get('organization') or 'me'}/{body['name']}"
            if name in self.private:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.private[name] = body["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(data)["files"]]
            modes = [{"path": name, "uploadMode": "lfs" if name.endswith("safetensors") else "regular"} for name in files]
            return 200, {"files": [mode | {"shouldIgnore": False} for mode in modes]}
        if path.endswith("/objects/batch"):
            asked_for = [one["oid"] for one in json.loads(data)["objects"]]
            actions = {
                oid: {"actions": {"upload": {"href": f"{self.url}/lfs/{oid}"}}} for oid in asked_for if oid not in self.objects
            }
            return 200, {"transfer": "basic", "objects": [{"oid": oid, "size": 1} | actions.get(oid, {}) for oid in asked_for]}
        if path.endswith("/commit/main"):
            if self.refuses_commits:
                return 403, {"error": "no"}
            values = [json.loads(line)["value"] for line in data.splitlines()]
            self.commits.append({value["path"]: value.get("oid", "regular") for value in values if "path" in value})
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/me/model/commit/0", "hookOutput": ""}
        if method == "GET" and (name := path.removeprefix("/api/models/").partition("?")[0]) in self.private:
            return 200, {"id": name, "modelId": name, "private": self.private[name], "tags": [], "siblings": []}
        return 200, {"errors": [], "warnings": []}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PUT(self) -> None:
            self._answer("PUT")

        def _answer(self, method: str) -> None:
            status, content = made.answer(method, self.path, self._body())
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *values: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which nothing here speaks
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "README.md", "equivalence.json"):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def test_an_upload_is_private_and_one_commit(hub: Hub, folder: Path) -> None:
    assert push_folder(folder, "me/model", private=True) == f"{hub.url}/me/model"
    assert hub.private == {"me/model": True}
    assert list(hub.objects.values()) == [b"content of model.safetensors"]
    [commit] = hub.commits
    assert commit == {"model.safetensors": next(iter(hub.objects)), "README.md": "regular", "equivalence.json": "regular"}


def test_an_upload_that_failed_goes_on_where_it_was(hub: Hub, folder: Path) -> None:
    hub.refuses_commits = True
    with pytest.raises(StorageError, match="is whole, but is not on the hub as me/model"):
        push_folder(folder, "me/model", private=True)
    assert (len(hub.objects), hub.commits) == (1, [])
    hub.refuses_commits = False
    stored = hub.objects.copy()
    hub.objects = dict.fromkeys(stored, b"")  # it would be seen if one were sent again
    push_folder(folder, "me/model", private=True)
    assert list(hub.objects.values()) == [b""]
    assert len(hub.commits) == 1


def test_a_public_repository_is_asked_for(hub: Hub, folder: Path) -> None:
    hub.private["me/model"] = False
    with pytest.raises(StorageError, match="me/model is public on the hub; say --public"):
        push_folder(folder, "me/model", private=True)
    assert hub.commits == []
    push_folder(folder, "me/model", private=False)
    push_folder(folder, "me/other", private=False)
    assert hub.private["me/other"] is False
    assert len(hub.commits) == 2


def test_a_hub_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which nothing here speaks
    with pytest.raises(StorageError, match="is not on the hub as me/model"):
        push_folder(folder, "me/model", private=True)
