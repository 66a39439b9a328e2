"""Serving over real HTTP: 16 requests at once against the same requests one after another.

    python benchmarks/serving.py [--model FOLDER] [--tokens 96] [--runs 5]

Both sides are the same endpoint under Ray Serve, the same 16 prompts of different lengths and the same number of new tokens;
the figure is the ratio of their tokens/s.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import httpx
from figures import compare

from apprentice.data.contract import layout_of, make_contract
from apprentice.hub import local_folder
from apprentice.recipe import Data, Model, Recipe, Serving, Training
from apprentice.serve.deployment import Endpoint, start
from apprentice.session import ray_session
from apprentice.tokenizer import Tokenizer

REQUESTS = 16
PASSAGE = "The ferry leaves the harbour at seven in the morning and needs two hours to the island, where the market opens at nine. "


def main() -> None:
    """Starts the endpoint, measures, prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Model folder; the packaged 135M model by default.")
    parser.add_argument("--tokens", type=int, default=96, help="New tokens of each request.")
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args()
    folder = Path(chosen.model).absolute() if chosen.model else local_folder("smollm2-135m-instruct")
    recipe = Recipe(
        name="bench", model=Model(base=str(folder)), data=Data(tasks=("quickstart",), layout="plain"), training=Training(steps=1)
    )
    contract = make_contract(recipe, layout_of(recipe, Tokenizer(folder)), folder)
    with (
        ray_session(),
        start(folder, Serving(port=0, max_running=REQUESTS), model_name="bench", contract=contract) as endpoint,
    ):
        asyncio.run(tokens_per_s(endpoint, chosen.tokens, at_once=REQUESTS))  # warms up
        compare(
            "serving.vs_sequential",
            lambda: asyncio.run(tokens_per_s(endpoint, chosen.tokens, at_once=REQUESTS)),
            "one request at a time",
            lambda: asyncio.run(tokens_per_s(endpoint, chosen.tokens, at_once=1)),
            runs=chosen.runs,
            goal=5.0,
        )


async def tokens_per_s(endpoint: Endpoint, tokens: int, *, at_once: int) -> float:
    """New tokens per second of all requests together, `at_once` of them under way at any time."""
    room = asyncio.Semaphore(at_once)

    async def ask(http: httpx.AsyncClient, number: int) -> int:
        asked = {"prompt": f"{number}. {PASSAGE * (number % 4)}The captain", "max_tokens": tokens, "ignore_eos": True}
        async with room:
            response = await http.post(f"{endpoint.url}/v1/completions", json=asked)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    async with httpx.AsyncClient(timeout=600) as http:
        began = time.perf_counter()
        made = sum(await asyncio.gather(*(ask(http, number) for number in range(REQUESTS))))
        return made / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
