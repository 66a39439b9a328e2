"""The same questions to an endpoint one after another and all at once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from apprentice.serve.deployment import Endpoint

QUESTIONS = [" ".join(["Is this the film?"] * (1 + 3 * number)) for number in range(16)]


async def replies(endpoint: Endpoint, questions: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Each question from a client of its own, all at once; whole replies with their token ids."""

    async def ask(question: str) -> dict[str, Any]:
        request_body = {"prompt": question, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}
        async with httpx.AsyncClient(timeout=120) as http:
            response = await http.post(f"{endpoint.url}/v1/completions", json=request_body)
        assert response.status_code == 200, response.text
        return dict(response.json()["choices"][0])

    return list(await asyncio.gather(*(ask(question) for question in questions)))


async def alone_and_together(endpoint: Endpoint, max_tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    together = await replies(endpoint, QUESTIONS, max_tokens)
    alone = [(await replies(endpoint, [question], max_tokens))[0] for question in QUESTIONS]
    assert len(alone) == len(together) == 16
    assert {len(choice["token_ids"]) for choice in alone + together} == {max_tokens}
    return alone, together
