"""The process in which `Recipe.train` trains: `python -m apprentice.python_api.training_child`.

Standard input gives one line of JSON, {"recipe": …, "restart": …}, and then stays open: its end stops the training as Ctrl-C
does, so that no training outlives the program that began it. Standard output gives one JSON object a line:

    {"record": {…}}      a record of the training loop (`apprentice.train.distributed.driver.train`)
    {"progress": ["prepare", {…}]}    the progress of a stage
    {"result": {…}}, {"stopped": sentence}, {"error": {"kind": …, "sentence": …}} or {"fault": traceback}     the last line
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TextIO

from apprentice.errors import ApprenticeError, full_disk_sentence
from apprentice.recipe import Recipe


def main() -> None:
    """Trains as standard input says, and tells of it on standard output."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no part of the protocol

    def tell(kind: str, value: Any) -> None:
        with suppress(BrokenPipeError):  # the program that began it has ended, and the stop comes by standard input
            events.write(json.dumps({kind: value}, default=str) + "\n")
            events.flush()

    order = json.loads(sys.stdin.readline())
    tell(*train(Recipe.model_validate(order["recipe"]), restart=order["restart"], tell=tell, input_stream=sys.stdin))


def train(
    recipe: Recipe, *, restart: bool, tell: Callable[[str, Any], None], input_stream: TextIO | None = None
) -> tuple[str, Any]:
    """Trains until it is done or `input_stream` ends, and returns the last event: its kind and its value."""
    from apprentice import pipeline

    def show(stage: str, values: Mapping[str, Any]) -> None:
        tell("progress", [stage, dict(values)])

    try:
        if input_stream is not None:  # not before: a stop that comes while modules are imported would be a fault
            threading.Thread(target=_stop_at_end, args=(input_stream,), daemon=True).start()
        return "result", pipeline.train_run(
            recipe, restart=restart, progress=show, record=lambda values: tell("record", dict(values))
        )
    except KeyboardInterrupt:
        return "stopped", pipeline.stopped_sentence(recipe)
    except ApprenticeError as error:
        return "error", {"kind": type(error).__name__, "sentence": str(error)}
    except Exception as error:
        if sentence := full_disk_sentence(error):
            return "error", {"kind": "StorageError", "sentence": sentence}
        return "fault", "".join(traceback.format_exception(error))


def _stop_at_end(stream: TextIO) -> None:
    """Waits until `stream` ends, and then interrupts this process as Ctrl-C does."""
    while stream.readline():
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
