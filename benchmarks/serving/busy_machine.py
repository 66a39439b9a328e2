"""Endpoint beside other work: one streamed reply at a time over HTTP, while other processes keep the CPUs busy.

    python -m benchmarks.serving.busy_machine [--model FOLDER] [--busy 2] [--tokens 16] [--runs 3] [--threads N]

`serving.neighbours_ttft_ms` is the time to the first token, `serving.neighbours_token_ms` that of each token after it. Both
are measured at niceness 0, as `apprentice serve` runs, against Ray's default of 15. The machine's load before the measurement
is printed beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.process_priority import NICENESS
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Serving
from apprentice.serve.deployment import start
from benchmarks.figures import report
from benchmarks.serving.endpoint_speed import PASSAGE, contract_of

LONGEST_S = 120.0  # a reply that takes longer counts as this long


def main() -> None:
    """Measures at both nicenesses and prints one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Model folder; the packaged 135M model by default.")
    parser.add_argument("--busy", type=int, default=2, help="Processes that compute without pause.")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="As serving.threads.")
    chosen = parser.parse_args()
    folder = Path(chosen.model).absolute() if chosen.model else local_folder("smollm2-135m-instruct")
    load = round(os.getloadavg()[0], 1)
    measured = {niceness: measure(folder, niceness, chosen) for niceness in (0, 15)}
    for place, figure in enumerate(("serving.neighbours_ttft_ms", "serving.neighbours_token_ms")):
        ours, theirs = (statistics.median(one[place] for one in measured[niceness]) for niceness in (0, 15))
        peer = {"name": "Ray's own niceness of 15", "value": round(theirs, 1)}
        report(figure, ours, unit="ms", peer=peer, runs=chosen.runs, busy=chosen.busy, load_before=load)


def measure(folder: Path, niceness: int, chosen: argparse.Namespace) -> list[tuple[float, float]]:
    """(ms to the first token, ms for each token after it) of each run."""
    os.environ[NICENESS] = str(niceness)
    settings = Serving(port=0, max_running=4, context=512, threads=chosen.threads)
    with ray_session(), start(folder, settings, model_name="bench", contract=contract_of(folder)) as endpoint:
        reply(endpoint.url, 2)  # warm
        with neighbours(chosen.busy):
            return [reply(endpoint.url, chosen.tokens) for _ in range(chosen.runs)]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Runs `count` processes at niceness 0, each of which keeps one CPU busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def reply(url: str, tokens: int) -> tuple[float, float]:
    body = {"prompt": PASSAGE, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    began = time.perf_counter()
    first = last = began + LONGEST_S
    came = 0
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LONGEST_S) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = time.perf_counter()
                    first = first if came else last
                    came += 1
    except httpx.TimeoutException:
        print(f"no token for {LONGEST_S:g} s", file=sys.stderr)
    return (first - began) * 1000, (last - first) * 1000 / max(tokens - 1, 1)


if __name__ == "__main__":
    main()
