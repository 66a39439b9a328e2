"""What a public endpoint meets, over real HTTP: slow readers, half-sent bodies, nonsense, and more clients than it has room for."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from apprentice.serve.deployment import Endpoint

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]
SHORT = {"prompt": "Which topic", "max_tokens": 4, "ignore_eos": True}
JSON = {"content-type": "application/json"}


async def half_open(endpoint: Endpoint, body: str, length: int | None = None) -> asyncio.StreamWriter:
    """A connection that has sent a completion's head and `body`, and reads nothing."""
    host, port = endpoint.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n{body}".encode())
    await writer.drain()
    return writer


async def running(http: httpx.AsyncClient) -> int:
    stats = (await http.get("/stats")).json()
    return int(stats["running"] + stats["queued"])


async def until_running(http: httpx.AsyncClient, number: int) -> None:
    async with asyncio.timeout(30):
        while await running(http) != number:
            await asyncio.sleep(0.02)


async def test_slow_readers_and_half_sent_bodies_disturb_nobody(endpoint: Endpoint) -> None:
    request_body = json.dumps({"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True})
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as http:
        writers = [await half_open(endpoint, request_body) for _ in range(4)]
        await until_running(http, 4)
        writers += [await half_open(endpoint, '{"prompt": ', 1000) for _ in range(20)]
        replies = await asyncio.gather(*(http.post("/v1/completions", json=SHORT) for _ in range(8)))
        assert [reply.status_code for reply in replies] == [200] * 8
        assert {reply.json()["usage"]["completion_tokens"] for reply in replies} == {4}
        for writer in writers:
            writer.close()
        await until_running(http, 0)


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        ("POST", "/v1/instruct", b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        ("POST", "/v1/tasks/ag_news", b'{"fields": {"text": ' + b"[" * 200 + b"]" * 200 + b"}}", 400),
        ("POST", "/v1/instruct", b'{"instruction": "a", "max_tokens": -5}', 400),
        ("POST", "/v1/completions", b'{"prompt": [-1]}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1e400}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "n": 99999999999999999999}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "model": "../../../etc/passwd"}', 404),
        ("POST", "/v1/completions", b'{"prompt": "a", "model": "tiny\\u0000"}', 404),
        ("POST", "/v1/tasks/..%2f..%2fsecrets", b'{"fields": {}}', 404),
        ("GET", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", b"", 404),
        ("GET", "/playground/..%2f..%2fkeys.py", b"", 404),
        ("GET", "/playground/%2e%2e/keys.py", b"", 404),
    ],
)
async def test_nonsense_is_refused_with_a_sentence(endpoint: Endpoint, method: str, path: str, content: bytes, status: int) -> None:
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as http:
        response = await http.request(method, path, content=content, headers=JSON)
        assert (response.status_code, bool(response.json()["error"]["message"])) == (status, True)
        assert (await http.post("/v1/completions", json=SHORT)).status_code == 200


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of one response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, json.loads(body)


async def test_five_hundred_clients_get_an_answer_or_429(endpoint: Endpoint) -> None:
    """As many connections at once, asking again as soon as each is answered, for some seconds and until 100 replies are there."""
    statuses: Counter[int] = Counter()
    ends = time.monotonic() + 5.0
    body = json.dumps(SHORT)
    host, port = endpoint.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while True:
            writer.write(f"{head}{body}".encode())
            status, headers, said = await answer(reader)
            statuses[status] += 1
            if status == 200:
                assert said["usage"]["completion_tokens"] == 4
            else:
                assert (status, said["error"]["code"]) == (429, "overloaded")
                assert 1 <= int(headers["retry-after"]) <= 60
            if time.monotonic() > ends and statuses[200] > 100:
                writer.close()
                return

    await asyncio.gather(*(ask() for _ in range(500)))
    assert sum(statuses.values()) >= 500
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as http:
        assert await running(http) == 0
