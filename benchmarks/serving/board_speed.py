"""Seconds in which the board opens 200 runs of 10,000 steps, and one run of a million: python benchmarks/serving/board_speed.py"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from starlette.testclient import TestClient

from apprentice.board.run_list import Board
from apprentice.board.server import board_app

RUNS, STEPS, LONG = 200, 10_000, 1_000_000


def write_steps(file: Path, steps: int) -> None:
    """Records as a training writes them, without its rows."""
    figures = {
        "attempt": 1,
        "steps": steps,
        "grad_norm": 1.5,
        "tokens": 2000,
        "learning_rate": 1e-4,
        "workers": 2,
        "data_wait": 0.01,
    }
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(figures | {"step": step, "loss": 3.0 / step**0.1}) + "\n" for step in range(1, steps + 1))


def write_run(folder: Path, steps: int) -> None:
    """A run folder with what the list reads."""
    folder.mkdir(parents=True)
    seconds = {"steps": 3600.0}
    (folder / "identity.json").write_text('{"format": 1, "hash": "", "keys": {}}')
    (folder / "recipe.yaml").write_text("training:\n  workers: 8\n  resources: {cpus: 1.0, gpus: 1.0}\n")
    status = {"state": "trained", "step": steps, "steps": steps, "loss": 1.0, "time": {"seconds": seconds}}
    (folder / "status.json").write_text(json.dumps(status))


def timed(client: TestClient, path: str) -> None:
    """Prints the seconds of one request."""
    begin = time.perf_counter()
    answer = client.get(path)
    answer.raise_for_status()
    print(f"{time.perf_counter() - begin:7.3f} s  {len(answer.content):9,} bytes  {path}", flush=True)


def main() -> None:
    """Writes the runs into a folder that is removed afterwards, and measures."""
    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(scratch) / "steps.jsonl"
        write_steps(shared, STEPS)
        storage = Path(scratch) / "runs"
        for number in range(RUNS):
            write_run(storage / f"run-{number:03d}", STEPS)
            os.link(shared, storage / f"run-{number:03d}" / "steps.jsonl")
        write_run(storage / "long", LONG)
        write_steps(storage / "long" / "steps.jsonl", LONG)
        client = TestClient(board_app(Board(str(storage))), base_url="http://localhost")
        for path in ("/api/runs", "/api/runs/run-000", "/api/runs/run-000/series?metric=loss&metric=grad_norm"):
            timed(client, path)
        for path in (
            "/api/runs/long",
            "/api/runs/long/series?metric=loss",
            "/api/runs/long/series?metric=loss&first=50&last=9000",
        ):
            timed(client, path)


if __name__ == "__main__":
    main()
