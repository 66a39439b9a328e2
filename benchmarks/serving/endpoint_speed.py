"""Serving over real HTTP: our endpoint under Ray Serve.

    python -m benchmarks.serving.endpoint_speed [--model FOLDER] [--tokens 96] [--runs 5] [--only overhead]

Each figure is the median over the runs.

    serving.vs_sequential        tokens/s of 16 prompts of different lengths at once, against one after another
    serving.ttft_ms              time to the first token of a streamed reply, 8 at once
    serving.overhead_ms          time of a request for one token over HTTP, less the engine's own time for it
    serving.adapters_vs_base     tokens/s of the same 16 prompts over four LoRA adapters of rank 16, against the base alone
    serving.seq2seq_vs_generate  a T5 of t5-small's shape with random weights, 32 requests at once with replies of 8 to 96 tokens,
                                 against transformers' `generate` on batches of 8 in order of arrival; only requested tokens count
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.inference.generation_request import GenerationRequest
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Data, Model, Recipe, Serving, Training
from apprentice.run.contract import PromptContract
from apprentice.serve.deployment import Endpoint, start
from apprentice.serve.engines.transformers import TransformersEngine
from benchmarks.figures import claim_stdout, compare, report

REQUESTS = 16
PASSAGE = "The ferry leaves the harbour at seven in the morning and needs two hours to the island, where the market opens at nine. "
# (repeats of the passage, tokens of the reply) of each request to the T5.
MIXED = [(number % 5, (8, 24, 48, 96)[number * 7 % 4]) for number in range(32)]
ADAPTERS = ("one", "two", "three", "four")
CPUS = len(os.sched_getaffinity(0))  # threads of a replica and of its peers
SINGLES = 40  # requests for one token whose median is taken


def main() -> None:
    """Starts the endpoints, measures, and prints one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Model folder; the packaged 135M model by default.")
    parser.add_argument("--tokens", type=int, default=96, help="New tokens of each request.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=["causal", "overhead", "adapters", "seq2seq"], help="One of the measurements.")
    chosen = parser.parse_args()
    folder = Path(chosen.model).absolute() if chosen.model else local_folder("smollm2-135m-instruct")
    parts = {chosen.only} if chosen.only else {"causal", "overhead", "adapters", "seq2seq"}
    with ray_session(), tempfile.TemporaryDirectory() as made:
        if parts != {"seq2seq"}:
            adapters = four_adapters(folder, Path(made) / "adapters")
            with serving(folder, REQUESTS, adapters) as endpoint:
                if "causal" in parts:
                    measure_causal(endpoint, chosen.tokens, chosen.runs)
                if "overhead" in parts:
                    measure_overhead(endpoint, folder, chosen.runs)
                if "adapters" in parts:
                    measure_adapters(endpoint, chosen.tokens, chosen.runs)
        if "seq2seq" in parts:
            t5 = t5_small(folder, Path(made) / "t5")
            with serving(t5, len(MIXED)) as endpoint:
                measure_seq2seq(endpoint, t5, chosen.runs)


@contextmanager
def serving(folder: Path, at_once: int, adapters: Path | None = None) -> Iterator[Endpoint]:
    """An endpoint over the model in `folder`, warmed up; it is stopped on leaving."""
    settings = Serving(port=0, max_running=at_once, adapters=str(adapters) if adapters else None)
    with start(folder, settings, model_name="bench", contract=contract_of(folder)) as endpoint:
        asyncio.run(tokens_per_s(endpoint, 8, at_once=at_once))
        yield endpoint


def four_adapters(base: Path, folder: Path) -> Path:
    """Writes random LoRA adapters of rank 16 for all linear layers of the base, in PEFT's format; returns `folder`."""
    model = load_model(base, torch.float32)
    for seed, name in enumerate(ADAPTERS):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer, module in model.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                for key, shape in (("A", (16, module.in_features)), ("B", (module.out_features, 16))):
                    tensors[f"base_model.model.model.{layer}.lora_{key}.weight"] = torch.randn(shape, generator=generator) * 0.01
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": base.name}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure_adapters(endpoint: Endpoint, tokens: int, runs: int) -> None:
    asyncio.run(tokens_per_s(endpoint, 8, at_once=REQUESTS, models=ADAPTERS))  # loads the adapters
    compare(
        "serving.adapters_vs_base",
        lambda: asyncio.run(tokens_per_s(endpoint, tokens, at_once=REQUESTS, models=ADAPTERS)),
        "the base alone",
        lambda: asyncio.run(tokens_per_s(endpoint, tokens, at_once=REQUESTS)),
        runs=runs,
        goal=0.7,
    )


def contract_of(folder: Path) -> PromptContract:
    recipe = Recipe(
        name="bench", model=Model(base=str(folder)), data=Data(tasks=("quickstart",), layout="plain"), training=Training(steps=1)
    )
    return make_contract(recipe, layout_of(recipe, Tokenizer(folder)), folder)


def measure_causal(endpoint: Endpoint, tokens: int, runs: int) -> None:
    compare(
        "serving.vs_sequential",
        lambda: asyncio.run(tokens_per_s(endpoint, tokens, at_once=REQUESTS)),
        "one request at a time",
        lambda: asyncio.run(tokens_per_s(endpoint, tokens, at_once=1)),
        runs=runs,
        goal=5.0,
    )
    firsts = [asyncio.run(first_tokens_ms(endpoint, at_once=8)) for _ in range(runs)]
    report("serving.ttft_ms", statistics.median(firsts), unit="ms", at_once=8, runs=runs)


def measure_overhead(endpoint: Endpoint, folder: Path, runs: int) -> None:
    engine = TransformersEngine(folder, dtype="auto", max_running=REQUESTS, max_queued=1, context=2048, threads=CPUS)
    ids = tuple(Tokenizer(folder).encode(PASSAGE))
    pairs = [(asyncio.run(over_http_ms(endpoint, ids)), asyncio.run(inside_ms(engine, ids))) for _ in range(runs)]
    engine.close()
    over, inside = (statistics.median(side) for side in zip(*pairs, strict=True))
    added = statistics.median(one - other for one, other in pairs)
    report("serving.overhead_ms", added, unit="ms", over_http=round(over, 2), engine=round(inside, 2), runs=runs, goal=8.0)


async def over_http_ms(endpoint: Endpoint, ids: tuple[int, ...]) -> float:
    """Median time in ms of requests for one token over HTTP, one after another."""
    spent = []
    async with httpx.AsyncClient(timeout=600) as http:
        for number in range(SINGLES):
            body = {"prompt": [number + 100, *ids], "max_tokens": 1}  # a new first token: no cached prefix fits
            began = time.perf_counter()
            (await http.post(f"{endpoint.url}/v1/completions", json=body)).raise_for_status()
            spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent)


async def inside_ms(engine: TransformersEngine, ids: tuple[int, ...]) -> float:
    """The same for the engine in this process, without HTTP."""
    spent = []
    for number in range(SINGLES):
        began = time.perf_counter()
        (stream,) = engine.generate([GenerationRequest((number + 100, *ids), max_new_tokens=1)])
        await anext(stream)
        stream.close()
        spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent)


async def first_tokens_ms(endpoint: Endpoint, *, at_once: int) -> float:
    """Median time in ms to the first event of `at_once` streamed replies."""

    async def ask(http: httpx.AsyncClient, number: int) -> float:
        body = {"prompt": f"{time.time_ns()} {number}. {PASSAGE * 2}", "max_tokens": 16, "stream": True, "ignore_eos": True}
        began = time.perf_counter()
        first = 0.0
        async with http.stream("POST", f"{endpoint.url}/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                first = first or time.perf_counter() - began
        return first * 1000

    async with httpx.AsyncClient(timeout=600) as http:
        return statistics.median(await asyncio.gather(*(ask(http, number) for number in range(at_once))))


def t5_small(tokenizer: Path, folder: Path) -> Path:
    """Writes a T5 of t5-small's shape with random weights, and the tokenizer of the folder `tokenizer`; returns `folder`."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf", "apprentice.json"))
    ends = Tokenizer(folder).end_id
    size = -(-len(Tokenizer(folder)) // 64) * 64
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, eos_token_id=ends, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def measure_seq2seq(endpoint: Endpoint, folder: Path, runs: int) -> None:
    torch.set_num_threads(CPUS)
    model = load_model(folder, resolve_dtype("auto"))
    tokenizer = Tokenizer(folder)
    prompts = [tokenizer.encode(f"{number}. {PASSAGE * repeats}") for number, (repeats, _) in enumerate(MIXED)]
    compare(
        "serving.seq2seq_vs_generate",
        lambda: asyncio.run(mixed_tokens_per_s(endpoint, prompts)),
        "generate, batches of 8",
        lambda: generated_per_s(model, prompts),
        runs=runs,
        goal=3.0,
    )


async def mixed_tokens_per_s(endpoint: Endpoint, prompts: list[list[int]]) -> float:
    async def ask(http: httpx.AsyncClient, prompt: list[int], tokens: int) -> int:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        response = await http.post(f"{endpoint.url}/v1/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    async with httpx.AsyncClient(timeout=600) as http:
        began = time.perf_counter()
        asks = (ask(http, prompt, tokens) for prompt, (_, tokens) in zip(prompts, MIXED, strict=True))
        return sum(await asyncio.gather(*asks)) / (time.perf_counter() - began)


def generated_per_s(model: Any, prompts: list[list[int]]) -> float:
    began = time.perf_counter()
    for first in range(0, len(prompts), 8):
        batch, reply_lengths = prompts[first : first + 8], [tokens for _, tokens in MIXED[first : first + 8]]
        width = max(map(len, batch))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in batch])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in batch])
        longest = max(reply_lengths)
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=longest, max_new_tokens=longest, do_sample=False)
    return sum(tokens for _, tokens in MIXED) / (time.perf_counter() - began)


async def tokens_per_s(endpoint: Endpoint, tokens: int, *, at_once: int, models: Sequence[str] = ("bench",)) -> float:
    """New tokens/s of all requests together, `at_once` of them at any time, distributed over `models`."""
    room = asyncio.Semaphore(at_once)

    async def ask(http: httpx.AsyncClient, number: int) -> int:
        prompt = f"{number}. {PASSAGE * (number % 4)}The captain"
        body = {"model": models[number % len(models)], "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        async with room:
            response = await http.post(f"{endpoint.url}/v1/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    async with httpx.AsyncClient(timeout=600) as http:
        began = time.perf_counter()
        token_count = sum(await asyncio.gather(*(ask(http, number) for number in range(REQUESTS))))
        return token_count / (time.perf_counter() - began)


if __name__ == "__main__":
    claim_stdout()
    main()
