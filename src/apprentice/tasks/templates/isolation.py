"""Process isolation for third-party templates: the kernel limits the memory and processor time of a worker process.

The sandbox's budget counts the kinds of work that were foreseen; these limits hold for all others too. The process starts with
the first such template, renders one after another, and ends with the process that started it.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

import jinja2

CPU_S = 5  # seconds of processor time for one rendering
MEMORY_BYTES = 1 << 30  # of address space, beyond what the process has at its start


class _Renderer:
    """The worker process and the pipe to it. Its answers are JSON, so nothing that it sends can run here."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "apprentice.tasks.templates.render_worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()

    def render(self, source: str, values: Mapping[str, Any]) -> str:
        self._pipe.send((source, dict(values)))
        answer = json.loads(self._pipe.recv_bytes())
        if "error" in answer:
            raise jinja2.TemplateRuntimeError(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        self._pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._process.kill()
        self._process.wait()


_renderers: dict[int, _Renderer] = {}  # by process id: a fork must not use its parent's pipe
_lock = threading.Lock()


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text of the PromptSource template `source` for these values, stripped.

    Raises `jinja2.TemplateRuntimeError` for an error in the template, and if a limit ends the process.
    """
    with _lock:
        pid = os.getpid()
        if pid not in _renderers:
            _renderers[pid] = _Renderer()
        try:
            return _renderers[pid].render(source, values)
        except (EOFError, OSError) as error:
            _renderers.pop(pid).close()
            raise jinja2.TemplateRuntimeError(
                f"the template took more than {CPU_S} s of processor time, or {MEMORY_BYTES >> 30} GiB of memory"
            ) from error


@atexit.register
def _close() -> None:
    if renderer := _renderers.pop(os.getpid(), None):
        renderer.close()
