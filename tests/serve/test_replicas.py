"""Two replicas under load: one is killed, both are replaced by a new version."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from apprentice.recipe import Replicas, Serving
from apprentice.serve.deployment import APP_NAME, Endpoint, application, start
from tests.support.sockets import listening

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]
ASKED: dict[str, Any] = {"prompt": "Once", "max_tokens": 20, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def pair(ray_cluster: None, chat_model: Path) -> Iterator[Endpoint]:
    serving = Serving(port=0, max_running=8, max_queued_requests=8, context=2048, replicas=Replicas(min=2, max=2))
    with start(chat_model, serving, model_name="tiny", dtype="float32", cpus=1) as running:
        yield running


async def outcome(http: httpx.AsyncClient, request_body: dict[str, Any]) -> str:
    """How one streamed reply went: `whole`, or how its client was told that it is not."""
    try:
        async with http.stream("POST", "/v1/completions", json=request_body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return "whole"
                if line and "error" in json.loads(line.removeprefix("data: ")):
                    return "error event"
    except httpx.RemoteProtocolError:
        return "cut off"
    return "ended as if it were whole"


async def answering(http: httpx.AsyncClient) -> set[str]:
    """The replicas that some calls reach."""
    return {str((await http.get("/stats")).json()["replica"]) for _ in range(12)}


async def test_replicas_and_their_limiter_listen_on_loopback(pair: Endpoint) -> None:
    listeners = listening()
    assert {name for name, _ in listeners if "Replica" in name}
    assert [(name, address) for name, address in listeners if not address.startswith("127.")] == []


async def test_a_rolling_update_fails_no_request(pair: Endpoint, chat_model: Path) -> None:
    went: Counter[str] = Counter()
    updated = asyncio.Event()
    arguments = {"model": str(chat_model), "dtype": "float32", "replicas": {"min": 2, "max": 2}, "max_running": 7, "context": 512}

    async def ask(http: httpx.AsyncClient) -> None:
        while not updated.is_set():
            went[await outcome(http, ASKED)] += 1

    async with httpx.AsyncClient(base_url=pair.url, timeout=120) as http:
        before = await answering(http)
        assert before
        clients = [asyncio.create_task(ask(http)) for _ in range(6)]
        await asyncio.to_thread(lambda: serve.run(application(arguments), name=APP_NAME))
        async with asyncio.timeout(120):
            while before & await answering(http):
                await asyncio.sleep(0.2)
        updated.set()
        await asyncio.gather(*clients)
    assert set(went) == {"whole"}
    assert went["whole"] >= 12


async def test_a_killed_replica_takes_only_its_own_requests_along(pair: Endpoint) -> None:
    """Each client loses at most the one reply that was being written there; all that is asked later is answered."""
    went: list[list[str]] = [[] for _ in range(8)]
    back = asyncio.Event()

    async def ask(http: httpx.AsyncClient, mine: list[str]) -> None:
        while not back.is_set() or mine[-1] != "whole":
            mine.append(await outcome(http, ASKED | {"max_tokens": 60}))

    async with httpx.AsyncClient(base_url=pair.url, timeout=120) as http, asyncio.timeout(240):
        before: set[str] = set()
        while len(before) < 2:
            before |= await answering(http)
        clients = [asyncio.create_task(ask(http, mine)) for mine in went]
        while not all(went):
            await asyncio.sleep(0.01)
        victim = min(before)
        ray.kill(ray.get_actor(f"SERVE_REPLICA::{APP_NAME}#apprentice#{victim}", namespace="serve"))
        now: set[str] = set()
        while len(now - before) < 1:  # another one has come in its place
            await asyncio.sleep(0.1)
            now |= await answering(http)
        back.set()
        await asyncio.gather(*clients)
        assert victim not in await answering(http)
    lost = [[how for how in mine if how != "whole"] for mine in went]
    assert max(map(len, lost)) <= 1  # none where it had just answered
    # Ray Serve's proxy writes these ends; nothing of ours is alive to say more.
    assert {how for mine in lost for how in mine} <= {"status 500", "status 503", "cut off", "ended as if it were whole"}
    assert sum(map(len, went)) >= 24
