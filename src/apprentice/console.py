"""What the person sees: progress on a terminal as one live line, elsewhere as plain lines; results as text or one JSON object.

Knows nothing of what the stages do.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from apprentice import __version__
from apprentice.errors import ApprenticeError, full_disk

PLAIN_EVERY_S = 10.0  # between two lines of the same stage where there is no terminal


class Screen:
    """Standard output for results, and progress beside it.

    With `as_json`, standard output gets exactly one JSON object (`result` or `error`) and everything else goes to standard error.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # it was closed before we began
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for as long as the process lives
        self.as_json = as_json
        self._log = sys.stderr if as_json else sys.stdout
        self._stage = ""
        self._live = False
        self._last = 0.0

    @property
    def can_ask(self) -> bool:
        """True if a person sits before it who can reply."""
        return not self.as_json and sys.stdin.isatty() and sys.stdout.isatty()

    def say(self, text: str = "") -> None:
        """A line for the person."""
        self._end_live()
        _write(self._log, f"{text}\n")

    def show(self, renderable: Any) -> None:
        """A rich table or panel for the person."""
        from rich.console import Console

        self._end_live()
        console = Console(file=self._log, width=None if self._log.isatty() else 110)
        with console.capture() as captured:
            console.print(renderable)
        _write(self._log, captured.get())

    def progress(self, stage: str, values: Mapping[str, Any]) -> None:
        """How far a stage is: a line that renews itself on a terminal, and stays if it is `done`; plain lines elsewhere."""
        line = _line(stage, values)
        if self._log.isatty():
            stays = bool(values.get("done"))
            if not stays:
                line = _fitted(stage, values, shutil.get_terminal_size().columns - 1)  # a line that wraps does not renew itself
            _write(self._log, f"\r\033[K{line}" + ("\n" if stays else ""))
            self._live = not stays
            self._stage = stage
            return
        now = time.monotonic()
        if stage != self._stage or values.get("done") or now - self._last >= PLAIN_EVERY_S:
            _write(self._log, f"{line}\n")
            self._stage, self._last = stage, now

    def result(self, value: Mapping[str, Any], text: str = "") -> None:
        """The command's result: the object itself with `as_json`, otherwise `text`."""
        self._end_live()
        if self.as_json:
            _write(sys.stdout, json.dumps(value, ensure_ascii=False) + "\n", is_result=True)
        elif text:
            _write(sys.stdout, f"{text}\n", is_result=True)

    def warn(self, message: str) -> None:
        """A line beside a result that stands."""
        self._end_live()
        _write(sys.stderr, f"error: {message}\n")

    def error(self, message: str) -> None:
        self._end_live()
        if self.as_json:
            _write(sys.stdout, json.dumps({"error": message}, ensure_ascii=False) + "\n")
        _write(sys.stderr, f"error: {message}\n")

    def failed(self, error: Exception) -> int:
        """Says why a command ended: one sentence, and before it the traceback of what is a fault of ours. Gives the exit code."""
        sentence = str(error) if isinstance(error, ApprenticeError) else full_disk(error)
        if sentence is not None:
            self.error(sentence)
            return 1
        _write(sys.stderr, "".join(traceback.format_exception(error)))
        self.error(
            f"this is a fault of apprentice {__version__} (Python {platform.python_version()}, {type(error).__name__});"
            " please report it with the lines above at the project's issue tracker."
        )
        return 3

    def _end_live(self) -> None:
        if self._live:
            _write(self._log, "\n")
            self._live = False


def _write(stream: TextIO, text: str, *, is_result: bool = False) -> None:
    """Writes `text` at once, and never raises: what the screen does must not touch the run.

    What the encoding lacks becomes `?`. A stream that cannot be written to (`| head` ended, the terminal was closed, the disk is
    full) goes nowhere from then on. Raises `OSError` only for a result that finds no room, since somebody waits for that.
    """
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        _write(stream, text.encode(encoding, "replace").decode(encoding), is_result=is_result)
    except OSError as error:
        _let_go(stream)
        if is_result and full_disk(error):
            raise
    except ValueError:  # it was closed
        return


def _let_go(stream: TextIO) -> None:
    """Points `stream` at nothing, so that neither a library nor the interpreter's end stumbles over it."""
    with suppress(OSError, ValueError):  # not every stream is a file
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def _line(stage: str, values: Mapping[str, Any]) -> str:
    return f"{stage:<9} " + "  ".join(text for key, value in values.items() if (text := _shown(key, value)))


def _fitted(stage: str, values: Mapping[str, Any], room: int) -> str:
    """The line without as many of its last values as do not fit, but with the time that is left."""
    left = dict(values)
    while len(_line(stage, left)) > room and (spare := [key for key in left if key != "eta_s"]):
        del left[spare[-1]]
    return _line(stage, left)[:room]


def _shown(key: str, value: Any) -> str:
    """One value of a progress line; keys name their units, a `message` stands by itself."""
    if value is None or key == "done":
        return ""
    if key == "message":
        return str(value)
    if key.endswith("_share"):
        return f"{_words(key.removesuffix('_share'))} {value:.0%}"
    if key == "eta_s":
        return f"eta {int(value) // 60}:{int(value) % 60:02d}"
    if key == "tokens_per_s":
        return f"{value:.0f} tokens/s"
    if key == "tokens_per_s_worker":
        return f"{value:.0f} a worker"
    if isinstance(value, float):
        return f"{_words(key)} {value:.4g}"
    return f"{_words(key)} {value}"


def _words(key: str) -> str:
    return key.replace("_", " ")
