"""Load test: many clients at once on one replica of a tiny model, its memory, and recovery from a killed replica.

    python -m benchmarks.serving.load [--clients 500] [--seconds 60]

Each client has a connection of its own and sends its next request when the last is answered, or after the wait that a 429
states.

    load.failed        requests that were neither answered whole nor refused with 429
    load.unanswered    requests that the engine accepted and no client got an answer to
    load.tokens_vs_32  tokens/s of answers, against those of 32 clients
    load.memory_mib    growth of replica and proxy since the first quarter
    load.back_s        seconds from a replica's death under 32 clients until the next answer

Clients and server share the CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Serving
from apprentice.serve.deployment import APP_NAME, start
from benchmarks.figures import claim_stdout, report
from benchmarks.serving.endpoint_speed import contract_of

TOKENS = 32  # of each reply
FEW = 32  # clients of the run to compare with
WHOLE, REFUSED = "whole", "refused"


@dataclass
class Outcome:
    """Results of a run: how its requests ended (`WHOLE`, `REFUSED`, or what went wrong), and samples of memory in MiB."""

    ended: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.ended[WHOLE] * TOKENS / self.seconds

    @property
    def failed(self) -> dict[str, int]:
        return {how: count for how, count in self.ended.items() if how not in (WHOLE, REFUSED)}

    @property
    def growth(self) -> float:
        """MiB by which memory grew from the end of the first quarter to the end."""
        return max(self.memory[-3:]) - max(self.memory[: max(1, len(self.memory) // 4)])


def main() -> None:
    """Starts an endpoint, loads it, and prints one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0)
    chosen = parser.parse_args()
    with ray_session(), tempfile.TemporaryDirectory() as made:
        folder = tiny_llama(Path(made) / "model")
        with start(folder, Serving(port=0), model_name="tiny", contract=contract_of(folder)) as endpoint:
            few = asyncio.run(load(endpoint.url, clients=FEW, seconds=chosen.seconds))
            many = asyncio.run(load(endpoint.url, clients=chosen.clients, seconds=chosen.seconds))
            back, lost = asyncio.run(killed(endpoint.url))
    about = {"clients": chosen.clients, "seconds": chosen.seconds}
    report("load.failed", sum(many.failed.values()), unit="requests", how=many.failed, **about, goal=0)
    report("load.unanswered", many.accepted - many.ended[WHOLE], unit="requests", answered=many.ended[WHOLE], **about, goal=0)
    report(
        "load.tokens_vs_32",
        many.tokens_per_s / few.tokens_per_s,
        unit="ratio",
        ours=round(many.tokens_per_s, 1),
        few=round(few.tokens_per_s, 1),
        refused=many.ended[REFUSED],
        **about,
        goal=0.8,
    )
    report("load.memory_mib", many.growth, unit="MiB", at_the_end=round(many.memory[-1]), **about)
    report("load.back_s", back, unit="s", lost=lost, goal=20.0)


def tiny_llama(folder: Path) -> Path:
    """A random Llama of two layers with the packaged model's tokenizer."""
    source = local_folder("smollm2-135m-instruct")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf", "apprentice.json"))
    tokenizer = Tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.end_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


async def load(url: str, *, clients: int, seconds: float) -> Outcome:
    """Runs `clients` clients for `seconds` seconds, and waits for the answers to their last requests."""
    outcome = Outcome(accepted=-accepted_by(url))
    began = time.monotonic()
    asking = [asyncio.create_task(ask(url, number, began + seconds, outcome.ended)) for number in range(clients)]
    while not all(task.done() for task in asking):
        outcome.memory.append(memory_mib())
        await asyncio.wait(asking, timeout=1.0)
    outcome.seconds = time.monotonic() - began
    await asyncio.gather(*asking)
    outcome.accepted += accepted_by(url)
    return outcome


async def ask(url: str, number: int, until: float, ended: Counter[str], answered: list[float] | None = None) -> None:
    """One client on a connection of its own, until the time `until`; the times of its answers are appended to `answered`."""
    place = urlsplit(url)
    body = json.dumps({"prompt": f"Client {number} asks.", "max_tokens": TOKENS, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    while time.monotonic() < until:
        writer = None
        try:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            while time.monotonic() < until:
                writer.write(f"{head}\r\n\r\n".encode() + body)
                status, headers, answer = await read_answer(reader)
                if status == 200:
                    whole = json.loads(answer)["usage"]["completion_tokens"] == TOKENS
                    ended[WHOLE if whole else "cut short"] += 1
                    if answered is not None:
                        answered.append(time.monotonic())
                elif status == 429:
                    ended[REFUSED] += 1
                    await asyncio.sleep(max(0.0, min(float(headers["retry-after"]), until - time.monotonic())))
                else:
                    ended[f"status {status}"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            ended[type(error).__name__] += 1
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one HTTP response."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def killed(url: str) -> tuple[float, dict[str, int]]:
    """Kills a replica under load; returns the seconds until the next answer, and how the requests ended that were not answered."""
    ended: Counter[str] = Counter()
    answered: list[float] = []
    until = time.monotonic() + 60
    asking = [asyncio.create_task(ask(url, number, until, ended, answered)) for number in range(FEW)]
    await asyncio.sleep(3.0)
    replica = json.loads(await asyncio.to_thread(text_of, f"{url}/stats"))["replica"]
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{APP_NAME}#apprentice#{replica}", namespace="serve"))
    died = time.monotonic()
    while not any(when > died + 0.5 for when in answered) and time.monotonic() < until:  # earlier ones were on their way
        await asyncio.sleep(0.05)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    after = [when for when in answered if when > died + 0.5]
    return (min(after) - died if after else float("inf")), {how: count for how, count in ended.items() if how != WHOLE}


def accepted_by(url: str) -> int:
    """Requests that the engine has accepted since its start."""
    return int(json.loads(text_of(f"{url}/stats"))["requests"])


def text_of(url: str) -> str:
    with urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def memory_mib() -> float:
    """Resident memory, in MiB, of the replicas and proxies that this process has started."""
    ours = [pid for pid in descendants(os.getpid()) if title(pid).startswith(("ray::ServeReplica", "ray::ProxyActor"))]
    return sum(map(resident_mib, ours))


def descendants(pid: int) -> Sequence[int]:
    """Ids of all child processes of `pid`, and their children."""
    parents: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                parents[int(entry.name)] = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
    processes, last = [pid], 0
    while last < len(processes):
        processes += [child for child, parent in parents.items() if parent == processes[last]]
        last += 1
    return processes[1:]


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def resident_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


if __name__ == "__main__":
    claim_stdout()
    main()
