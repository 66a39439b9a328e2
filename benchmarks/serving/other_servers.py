"""Our endpoint against other servers: vLLM's own and `transformers serve`, over real HTTP, with 32 streamed replies at once.

    make vllm
    python -m benchmarks.serving.other_servers [--model FOLDER] [--runs 5] [--vllm .venv-vllm] [--only vllm|transformers|ingress]

    serving.vs_vllm_cpu            tokens/s of our transformers engine against vLLM alone
    serving.ttft_vs_vllm_cpu       vLLM's time to the first token divided by ours, 8 at once
    serving.vs_transformers_serve  tokens/s of our transformers engine against `transformers serve --continuous-batching`
    serving.vllm_ingress_vs_vllm   tokens/s of our endpoint with the vllm engine against vLLM alone

A figure's two servers run beside each other and are asked in turn, each when the other has gone quiet. Replies have 64 to 80
tokens; tokens are counted as the server reports them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.figures import claim_stdout, compare, report

AT_ONCE = 32
CONTEXT = 2048
QUIET_S = 3.0  # wait before a server is asked: vLLM's worker polls for work for a second after its last token
NAME = "bench"
READY_TIMEOUT_S = 400.0
PASSAGE = "The ferry leaves the harbour at seven in the morning and needs two hours to the island, where the market opens at nine. "


def main() -> None:
    """Starts the servers, measures, and prints one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Model folder; the packaged 135M model by default.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vllm", default=".venv-vllm", help="The environment that `make vllm` makes.")
    parser.add_argument("--only", choices=["vllm", "transformers", "ingress"], help="One of the comparisons.")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # used when this script starts itself as a server: engine:port
    chosen = parser.parse_args()
    folder = model_folder(chosen.model)
    if chosen.serve:
        serve(folder, *chosen.serve.split(":"))
        return
    python = Path(chosen.vllm).absolute() / "bin" / "python"
    peer_names = [chosen.only] if chosen.only else ["vllm", "transformers", "ingress"]
    if not python.is_file():
        for figure in ("vs_vllm_cpu", "ttft_vs_vllm_cpu", "vllm_ingress_vs_vllm"):
            report(f"serving.{figure}", None, why=f"there is no {python}; `make vllm` makes it")
        peer_names = [one for one in peer_names if one == "transformers"]
    measures = {"vllm": measure_vllm, "transformers": measure_transformers, "ingress": measure_ingress}
    for one in peer_names:
        measures[one](folder, str(python), chosen.runs)


def model_folder(model: str | None) -> Path:
    if model:
        return Path(model).absolute()
    from apprentice.pretrained.hub import local_folder

    return local_folder("smollm2-135m-instruct")


def measure_vllm(folder: Path, python: str, runs: int) -> None:
    with servers(ours(folder, sys.executable, "transformers"), vllm(folder, python)) as (mine, theirs):
        rate = "vLLM's own server"
        compare("serving.vs_vllm_cpu", lambda: tokens_per_s(mine), rate, lambda: tokens_per_s(theirs), runs=runs, goal=0.8)
        pairs = [(first_ms(mine), first_ms(theirs)) for _ in range(runs)]
        own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / mine for mine, theirs in pairs)
        report("serving.ttft_vs_vllm_cpu", ratio, unit="ratio", ours_ms=round(own), peer_ms=round(other), runs=runs, goal=1.0)


def measure_transformers(folder: Path, _: str, runs: int) -> None:
    with servers(ours(folder, sys.executable, "transformers"), transformers(folder)) as (mine, theirs):
        name = "transformers serve --continuous-batching"
        compare(
            "serving.vs_transformers_serve", lambda: tokens_per_s(mine), name, lambda: tokens_per_s(theirs), runs=runs, goal=2.0
        )


def measure_ingress(folder: Path, python: str, runs: int) -> None:
    with servers(ours(folder, python, "vllm"), vllm(folder, python)) as (mine, theirs):
        name = "vLLM's own server"
        compare("serving.vllm_ingress_vs_vllm", lambda: tokens_per_s(mine), name, lambda: tokens_per_s(theirs), runs=runs, goal=0.9)


class Server(NamedTuple):
    """A server: the command that starts it on a port, and the request fields that keep a reply from ending early."""

    command: Callable[[int], list[str]]
    fields: dict[str, Any]


def ours(folder: Path, python: str, engine: str) -> Server:
    return Server(
        lambda port: [python, "-m", "benchmarks.serving.other_servers", "--model", str(folder), "--serve", f"{engine}:{port}"],
        {"ignore_eos": True},
    )


def vllm(folder: Path, python: str) -> Server:
    server = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", NAME]
    limits = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(AT_ONCE)]
    memory = ["--kv-cache-memory-bytes", str(2 * 2**30)]
    place = ["--uvicorn-log-level", "warning", "--host", "127.0.0.1", "--port"]
    return Server(lambda port: [*server, *limits, *memory, *place, str(port)], {"ignore_eos": True})


def transformers(folder: Path) -> Server:
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--continuous-batching"]
    place = ["--dtype", "bfloat16", "--log-level", "error", "--host", "127.0.0.1", "--port"]
    return Server(lambda port: [*command, *place, str(port)], {"generation_config": '{"do_sample": false}'})


def serve(folder: Path, engine: str, port: str) -> None:
    """Runs our endpoint until SIGTERM, in the environment that has the engine."""
    from apprentice.pipeline.serve import wait_for_stop
    from apprentice.ray_cluster.session import ray_session
    from apprentice.recipe import Serving
    from apprentice.serve.deployment import start
    from benchmarks.serving.endpoint_speed import contract_of

    settings = Serving.model_validate({"engine": engine, "port": int(port), "max_running": AT_ONCE, "context": CONTEXT})
    with ray_session(), start(folder, settings, model_name=NAME, contract=contract_of(folder), dtype="bfloat16"):
        wait_for_stop()


class Running(NamedTuple):
    """A running server: its URL, and the request fields of `Server`."""

    url: str
    fields: dict[str, Any]


@contextmanager
def servers(*commands: Server) -> Iterator[list[Running]]:
    """Starts all servers beside each other, warms them up, and stops them on leaving."""
    with ExitStack() as stack:
        yield [stack.enter_context(running(server)) for server in commands]


@contextmanager
def running(server: Server) -> Iterator[Running]:
    port = free_port()
    words = server.command(port)
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    beside = os.pathsep.join([str(Path(words[0]).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(words, stdout=sys.stderr, env=os.environ | quiet | {"PATH": beside})
    try:
        endpoint = Running(f"http://127.0.0.1:{port}", server.fields)
        wait_until_ready(endpoint.url, process)
        for _ in range(2):
            tokens_per_s(endpoint)
        yield endpoint
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def free_port() -> int:
    """A free port below the ephemeral range, from which Ray's processes could take it before the server does."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SystemExit("no port is free")


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1.0)
    raise SystemExit(f"{process.args} is not ready; see above")


def tokens_per_s(server: Running) -> float:
    """New tokens/s of `AT_ONCE` streamed replies together."""

    async def all_of_them() -> float:
        await asyncio.sleep(QUIET_S)
        async with client() as http:
            began = time.perf_counter()
            token_counts = await asyncio.gather(*(stream(http, server, number, 64 + number % 17) for number in range(AT_ONCE)))
            return sum(tokens for tokens, _ in token_counts) / (time.perf_counter() - began)

    return asyncio.run(all_of_them())


def first_ms(server: Running) -> float:
    """Median time in ms to the first event of 8 streamed replies, whose prompts no cache has seen."""

    async def all_of_them() -> float:
        await asyncio.sleep(QUIET_S)
        async with client() as http:
            made = await asyncio.gather(*(stream(http, server, time.time_ns() + number, 16) for number in range(8)))
            return statistics.median(first for _, first in made) * 1000

    return asyncio.run(all_of_them())


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))


async def stream(http: httpx.AsyncClient, server: Running, number: int, tokens: int) -> tuple[int, float]:
    """One streamed reply: its number of tokens, as the server counts them, and the seconds to its first event."""
    prompt = f"{number}. {PASSAGE * (1 + number % 3)}The captain"
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    began, first, last = time.perf_counter(), 0.0, b""
    async with http.stream("POST", f"{server.url}/v1/completions", json=body | server.fields) as response:
        async for piece in response.aiter_raw():
            first = first or time.perf_counter() - began
            last = (last + piece)[-2000:]
        if response.status_code != 200:
            raise SystemExit(f"{server.url} answered {response.status_code}: {last.decode()}")
    usages = [json.loads(line[6:]).get("usage") for line in last.split(b"\n")[1:] if line.startswith(b"data: {")]
    return int(next(usage for usage in reversed(usages) if usage)["completion_tokens"]), first


if __name__ == "__main__":
    claim_stdout()
    main()
