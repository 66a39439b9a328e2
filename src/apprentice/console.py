"""Terminal output of the commands: progress as one live line (plain lines without a terminal), results as text or JSON."""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TextIO

from apprentice import __version__
from apprentice.errors import ApprenticeError, full_disk_sentence

PLAIN_EVERY_S = 10.0  # seconds between two lines of the same stage where there is no terminal


class Screen:
    """Writes results, progress and errors of one command.

    Results go to standard output, errors to standard error. With `as_json`, standard output gets exactly one JSON object (`result`
    or `error`), and progress goes to standard error too.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # the process was started with it closed
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for as long as the process lives
        self.as_json = as_json
        self._log = sys.stderr if as_json else sys.stdout
        self._stage = ""
        self._live = False
        self._waiting_for = ""  # shown on a terminal in a line that any other output replaces
        self._last = 0.0

    @property
    def can_ask(self) -> bool:
        """True if standard input and output are a terminal, so that a person can answer a question."""
        return not self.as_json and sys.stdin.isatty() and sys.stdout.isatty()

    def say(self, text: str = "") -> None:
        """Writes a line of text."""
        self._end_live()
        _write(self._log, f"{text}\n")
        self._show_waiting()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows on a terminal, below the lines that a `with` block writes, that `what` is being looked at; nothing elsewhere."""
        self._waiting_for = what if self._log.isatty() else ""
        self._show_waiting()
        try:
            yield
        finally:
            self._end_live()
            self._waiting_for = ""

    def _show_waiting(self) -> None:
        if self._waiting_for:
            columns = shutil.get_terminal_size().columns - 1
            _write(self._log, f"… {self._waiting_for}"[:columns])

    def show(self, renderable: Any) -> None:
        """Writes a rich table or panel."""
        from rich.console import Console

        self._end_live()
        console = Console(file=self._log, width=None if self._log.isatty() else 110)
        with console.capture() as captured:
            console.print(renderable)
        _write(self._log, captured.get())

    def progress(self, stage: str, values: Mapping[str, Any]) -> None:
        """Writes the progress of a stage: on a terminal a line that replaces itself, and stays if `values` has `done`.

        Elsewhere it writes plain lines: the first and the last of a stage, and between them at most one every `PLAIN_EVERY_S`
        seconds. Keys of `values` are formatted by their units: `eta_s`, `…_share`, `tokens_per_s`, `message` …
        """
        line = _line(stage, values)
        if self._log.isatty():
            stays = bool(values.get("done"))
            if not stays:
                line = _shorten_line(stage, values, shutil.get_terminal_size().columns - 1)  # a line that wraps cannot be replaced
            _write(self._log, f"\r\033[K{line}" + ("\n" if stays else ""))
            self._live = not stays
            self._stage = stage
            return
        now = time.monotonic()
        if stage != self._stage or values.get("done") or now - self._last >= PLAIN_EVERY_S:
            _write(self._log, f"{line}\n")
            self._stage, self._last = stage, now

    def result(self, value: Mapping[str, Any], text: str = "") -> None:
        """Writes the command's result: `value` as JSON with `as_json`, otherwise `text`."""
        self._end_live()
        if self.as_json:
            _write(sys.stdout, json.dumps(value, ensure_ascii=False) + "\n", is_result=True)
        elif text:
            _write(sys.stdout, f"{text}\n", is_result=True)

    def error(self, message: str, *, beside_result: bool = False) -> None:
        """Writes an error line, and with `as_json` the JSON object; `beside_result` says that a result is written already."""
        self._end_live()
        if self.as_json and not beside_result:
            _write(sys.stdout, json.dumps({"error": message}, ensure_ascii=False) + "\n")
        _write(sys.stderr, f"error: {message}\n")

    def failed(self, error: Exception) -> int:
        """Writes why a command failed, and returns its exit code.

        An `ApprenticeError` or a full disk is one sentence (1); any other error is a bug of ours and has its traceback (3).
        """
        sentence = str(error) if isinstance(error, ApprenticeError) else full_disk_sentence(error)
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
        if self._waiting_for:
            _write(self._log, "\r\033[K")
        if self._live:
            _write(self._log, "\n")
            self._live = False


@cache
def _screen_on(stream: TextIO) -> Screen:
    """The screen of programs that use `print_progress` while this is their standard output."""
    return Screen()


def print_progress(stage: str, values: Mapping[str, Any]) -> None:
    """Prints the progress of a stage as the command line does: pass it as `progress`."""
    _screen_on(sys.stdout).progress(stage, values)


def ignore_progress(stage: str, values: Mapping[str, Any]) -> None:
    """Shows nothing of the progress of a stage."""


def _write(stream: TextIO, text: str, *, is_result: bool = False) -> None:
    """Writes and flushes `text` without raising, since output must not stop a run.

    Characters that the stream's encoding lacks become `?`. A stream that cannot be written to (`| head` ended, the terminal was
    closed, the disk is full) is redirected to the null device. Raises `OSError` only for a result on a full disk, because the
    caller needs that.
    """
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        _write(stream, text.encode(encoding, "replace").decode(encoding), is_result=is_result)
    except OSError as error:
        _redirect_to_null(stream)
        if is_result and full_disk_sentence(error):
            raise
    except ValueError:  # the stream is closed
        return


def _redirect_to_null(stream: TextIO) -> None:
    """Redirects `stream` to the null device, so that neither libraries nor the interpreter's exit fail on it."""
    with suppress(OSError, ValueError):  # not every stream has a file descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def is_unread(stream: TextIO | None) -> bool:
    """True if `stream` is a pipe whose reader has ended, as `head` does."""
    if stream is None:  # closed before the process began
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # closed, or not a file of the system's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _line(stage: str, values: Mapping[str, Any]) -> str:
    return f"{stage:<9} " + "  ".join(text for key, value in values.items() if (text := _shown(key, value)))


def _shorten_line(stage: str, values: Mapping[str, Any], room: int) -> str:
    """The progress line in at most `room` characters: the last values are dropped first, `eta_s` never."""
    left = dict(values)
    while len(_line(stage, left)) > room and (spare := [key for key in left if key != "eta_s"]):
        del left[spare[-1]]
    return _line(stage, left)[:room]


def _shown(key: str, value: Any) -> str:
    """One value of a progress line, formatted by its key's unit; a `message` is shown without its key."""
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
