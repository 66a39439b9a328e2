"""Who may ask the board for what: key, session, Host, Origin, read-only."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from apprentice.board.access import host_of, is_loopback
from apprentice.board.run_list import Board
from apprentice.board.server import board_app, serve_board
from apprentice.errors import ServingError

HOME = "http://127.0.0.1:8700"


def client(
    storage: Path, *, base_url: str = HOME, host: str = "127.0.0.1", key: str | None = None, read_only: bool = False
) -> TestClient:
    return TestClient(board_app(Board(str(storage), read_only=read_only), host=host, key=key), base_url=base_url)


@pytest.mark.parametrize(
    ("authority", "host", "loopback"),
    [
        ("127.0.0.1:8700", "127.0.0.1", True),
        ("LOCALHOST", "localhost", True),
        ("[::1]:8700", "[::1]", True),
        ("127.0.0.1.evil.example", "127.0.0.1.evil.example", False),
        ("10.0.0.3:80", "10.0.0.3", False),
        ("", "", False),
    ],
)
def test_hosts(authority: str, host: str, loopback: bool) -> None:
    assert host_of(authority) == host
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("path", ["/", "/api/runs", "/docs"])
def test_a_name_that_was_rebound_to_loopback_is_refused(storage: Path, path: str) -> None:
    answer = client(storage, base_url="http://evil.example:8700").get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host")
    assert client(storage).get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},  # another server of this machine
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_sites_page_changes_nothing(storage: Path, headers: dict[str, str]) -> None:
    answer = client(storage).put("/api/runs/lora/archive", json={"archived": True}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    assert client(storage).put("/api/runs/lora/archive", json={"archived": True}, headers={"Origin": HOME}).status_code == 428


def test_a_key_is_asked_for_and_opens_a_session(storage: Path) -> None:
    board = client(storage, base_url="http://10.0.0.3:8700", host="10.0.0.3", key="right")
    assert board.get("/").status_code == 200  # the page, which asks for the key
    assert board.get("/api/runs").status_code == 401
    assert board.get("/api/runs", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert board.get("/api/runs", headers={"Authorization": "Bearer right"}).status_code == 200
    assert board.post("/api/session", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert board.get("/api/runs").status_code == 401
    opened = board.post("/api/session", headers={"Authorization": "Bearer right"})
    assert "HttpOnly" in opened.headers["set-cookie"]
    assert "SameSite=strict" in opened.headers["set-cookie"]
    assert "right" not in opened.headers["set-cookie"]
    assert board.get("/api/runs").status_code == 200
    assert board.get("/api/runs", headers={"Cookie": "apprentice_board=guess"}).status_code == 401


def test_a_board_for_others_needs_a_key(storage: Path) -> None:
    with pytest.raises(ServingError, match="needs a key: set APPRENTICE_BOARD_KEY"):
        serve_board(Board(str(storage)), host="0.0.0.0", port=0, key=None, tell=print)


def test_read_only_refuses_every_change(storage: Path) -> None:
    board = client(storage, read_only=True)
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = board.request(method, "/api/runs/lora/archive", json={"archived": True}, headers={"X-Confirm": "any"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "read_only")
    assert board.get("/api/runs").json()["read_only"] is True
    assert not (storage / "lora" / "board.json").exists()


def test_pages_load_nothing_from_elsewhere(storage: Path) -> None:
    answer = client(storage).get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
