"""Handle of a training that runs in a process of its own: wait, stop, and metrics as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from apprentice.errors import ApprenticeError, TaskError
from apprentice.pipeline import Progress
from apprentice.python_api.html_display import html_heading, html_paragraph
from apprentice.python_api.interactive_run import InteractiveRun, records_to_frame
from apprentice.recipe import Recipe
from apprentice.storage import Folder

if TYPE_CHECKING:
    import pandas as pd

CHILD = "apprentice.python_api.training_child"
_LAST_EVENTS = ("result", "stopped", "error", "fault")


class TrainingProcess:
    """A training that was started by `Recipe.train`; it ends with the program that started it, as by Ctrl-C.

    It joins the Ray that this process is connected to, or else connects to one as a command does. `wait` gives the run,
    `stop` ends the training early, `metrics` follows it. `run` is its run folder, which is there once the checks before training
    have passed.
    """

    def __init__(self, recipe: Recipe, *, restart: bool = False, progress: Progress | None = None) -> None:
        self.run = InteractiveRun(Folder.at(recipe.storage) / recipe.name)
        self._progress = progress
        self._news = threading.Condition()
        self._records: list[dict[str, Any]] = []
        self._outcome: tuple[str, Any] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | _ray_environment(),
            start_new_session=True,  # a notebook's interrupt is for the cell that waits
        )
        self._send({"recipe": recipe.model_dump(mode="json"), "restart": restart})
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _send(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; its last event tells why
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        """Takes the events of the process until it ends."""
        assert self._process.stdout is not None
        outcome = None
        for line in self._process.stdout:
            if not line.endswith("\n"):  # the process was killed within it
                break
            [(kind, value)] = json.loads(line).items()
            if kind in _LAST_EVENTS:
                outcome = kind, value
            elif kind == "progress":
                self._show_progress(*value)
            elif kind == "record":
                with self._news:
                    self._records.append(value)
                    self._news.notify_all()
        self._process.stdout.close()
        self._close_input()
        code = self._process.wait()
        with self._news:
            self._outcome = outcome or ("fault", f"the process of the training ended with exit code {code}")
            self._news.notify_all()

    def _show_progress(self, stage: str, values: Mapping[str, Any]) -> None:
        """Calls `progress`; one that fails is told of on standard error, and not called again."""
        if self._progress is None:
            return
        try:
            self._progress(stage, values)
        except Exception:
            self._progress = None
            traceback.print_exc()

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    @property
    def is_running(self) -> bool:
        """True until the training is finished, stopped or failed."""
        return self._outcome is None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The records of the training loop as they come, from the first of this call on, until the training ends.

        A step has `step`, `steps`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_s`, `eta_s` (seconds) and more, a validation
        `step` and `validation_loss`, other news a `message` or `samples`. An error of the training is raised by `wait`.
        """
        seen = 0
        while new := self._records_after(seen):
            seen += len(new)
            yield from new

    def _records_after(self, seen: int) -> list[dict[str, Any]]:
        """The records after the first `seen`; waits for one, and is empty once the training has ended."""
        with self._news:
            self._news.wait_for(lambda: len(self._records) > seen or not self.is_running)
            return self._records[seen:]

    def metrics_frame(self) -> pd.DataFrame:
        """The steps so far as a DataFrame, a row a step."""
        with self._news:
            return records_to_frame(self._records)

    def wait(self, timeout: float | None = None) -> InteractiveRun:
        """Waits until the training has ended and returns its run; `timeout` is in seconds.

        Raises the `ApprenticeError` that the training ended with, `TimeoutError` if it has not ended by then, and `RuntimeError`
        with the traceback for a fault of apprentice. Ctrl-C ends the waiting, not the training. A stopped training returns its run,
        which `Recipe.train` goes on with.
        """
        with self._news:
            if not self._news.wait_for(lambda: not self.is_running, timeout):
                raise TimeoutError(f"run {self.run.name!r} is still training after {timeout:g} s; wait again, or stop it.")
        assert self._outcome is not None
        kind, value = self._outcome
        if kind == "error":
            raise _error_of(value["kind"], value["sentence"])
        if kind == "fault":
            raise RuntimeError(value)
        return self.run

    def stop(self) -> InteractiveRun:
        """Stops the training as Ctrl-C does, waits for its end and returns its run; does nothing to one that has ended.

        Raises the same as `wait`.
        """
        self._close_input()
        return self.wait()

    @property
    def sentence(self) -> str:
        """How the training stands, in one sentence."""
        if self._outcome is not None:
            kind, value = self._outcome
            texts = {"error": lambda: value["sentence"], "fault": lambda: value, "stopped": lambda: value}
            return str(texts[kind]()) if kind in texts else f"run {self.run.name!r} is trained"
        steps = [record for record in self._records if "loss" in record]
        if not steps:
            return f"run {self.run.name!r} has not made a step yet"
        return f"run {self.run.name!r} is at step {steps[-1]['step']} of {steps[-1]['steps']}, loss {steps[-1]['loss']:.3f}"

    def _repr_html_(self) -> str:
        return html_heading(f"training of {self.run.name}") + html_paragraph(self.sentence)


def _ray_environment() -> dict[str, str]:
    """The environment with which the process joins this one's Ray; Ray is not imported for it."""
    if "ray" not in sys.modules:
        return {}
    from apprentice.ray_cluster.session import joining_environment

    return joining_environment()


def _error_of(kind: str, sentence: str) -> ApprenticeError:
    """The error of this kind; that of a row is the error of a task, since its row is not known here."""
    kinds: dict[str, type[ApprenticeError]] = {"ApprenticeError": ApprenticeError}
    waiting = [ApprenticeError]
    while waiting:
        below = waiting.pop().__subclasses__()
        kinds |= {one.__name__: one for one in below}
        waiting += below
    error = kinds.get(kind, ApprenticeError)
    return TaskError(sentence) if kind == "RowError" else error(sentence)
