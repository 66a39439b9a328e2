"""Rows of the page Runs: what `apprentice runs --json` prints of each, and its holder, device hours, price and notes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml

from apprentice.board.run_notes import RunNotes
from apprentice.errors import RunError
from apprentice.pipeline import describe_run, list_runs
from apprentice.plain_yaml import load_yaml
from apprentice.run.fence import FenceLog, Holder
from apprentice.run.folder import Run
from apprentice.storage import Folder

_IDLE = ("down", "stopped", "nodes")  # kinds of the ledger of time in which a run holds no devices
_MOST_THREADS = 8


@dataclass(frozen=True)
class Board:
    """What the routes share: the storage, whether changes are refused, and the price of a GPU for an hour, if one was named."""

    storage: str
    read_only: bool = False
    price_per_hour: float | None = None

    def run(self, name: str) -> Run:
        """The run `name` of the storage. Raises `RunError` if there is none; a name that is a path is none."""
        folder = Folder.at(self.storage) / name
        if name in ("", ".", "..") or "/" in name or "\\" in name or not (folder / "identity.json").exists():
            raise RunError(f"{name!r} is not a run in {self.storage}; `apprentice runs` lists them.")
        return Run(folder)


def list_rows(board: Board) -> list[dict[str, Any]]:
    """A row for every run of the storage, sorted by name."""
    listed = list_runs(board.storage)
    with ThreadPoolExecutor(_MOST_THREADS) as pool:
        extras = pool.map(lambda values: _extras(board, Run(Folder.at(board.storage) / values["name"]), values), listed)
        return [
            {key: value for key, value in values.items() if key != "time"} | extra
            for values, extra in zip(listed, extras, strict=True)
        ]


def describe_row(board: Board, name: str) -> dict[str, Any]:
    """The row of one run, with its ledger of time, goodput and the sentence on where its time went."""
    run = board.run(name)
    described = describe_run(str(run.folder), board.storage)
    return described | _extras(board, run, described)


def holder_of(run: Run) -> Holder | None:
    """The process that holds the run; None where nobody does, or it has ended without a word."""
    entry = FenceLog(run.folder).last()
    return None if entry is None or entry.released or entry.holder.is_gone else entry.holder


def _extras(board: Board, run: Run, values: dict[str, Any]) -> dict[str, Any]:
    holder = holder_of(run)
    notes = RunNotes.of(run)
    gpu_hours = _gpu_hours(run, values)
    price = board.price_per_hour
    return {
        "holder": None if holder is None else str(holder),
        "gpu_hours": gpu_hours,
        "cost": None if price is None or gpu_hours is None else gpu_hours * price,
        "tags": notes.tags,
        "archived": notes.archived,
    }


def _gpu_hours(run: Run, values: dict[str, Any]) -> float | None:
    """Hours that the run held its GPUs, by its ledger of time; None without a ledger. A run on CPUs has used 0.

    An elastic run counts with its greatest number of workers, so that its hours are an upper bound.
    """
    seconds = (values.get("time") or {}).get("seconds")
    if seconds is None or not run.recipe_file.exists():
        return None
    try:
        training = load_yaml(run.recipe_file.read_text()).get("training", {})  # as raw values: validating hundreds takes seconds
    except yaml.YAMLError:  # one damaged run does not hide all others
        return None
    workers = training.get("workers", 1)
    gpus = (workers["max"] if isinstance(workers, dict) else workers) * training.get("resources", {}).get("gpus", 0.0)
    busy = sum(amount for kind, amount in seconds.items() if kind not in _IDLE)
    return float(gpus * busy / 3600)
