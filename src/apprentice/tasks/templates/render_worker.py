"""Worker process of `isolation.py`: receives templates and rows through a pipe, sends back texts, and limits itself.

python -m apprentice.tasks.templates.render_worker FILE_DESCRIPTOR
"""

from __future__ import annotations

import json
import resource
import sys
import time
from functools import lru_cache
from math import ceil
from multiprocessing.connection import Connection
from pathlib import Path

from apprentice.tasks.templates.expressions import Wording
from apprentice.tasks.templates.isolation import CPU_S, MEMORY_BYTES
from apprentice.tasks.templates.sandbox import LENIENT


@lru_cache(maxsize=10_000)
def _compiled(source: str) -> Wording:
    return Wording(source, LENIENT)


def serve(pipe: Connection) -> None:
    """Answers each `(source, values)` with `{"text": …}` or `{"error": …}` as JSON, until the other side closes the pipe."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while True:
        try:
            source, values = pipe.recv()
        except EOFError:
            return
        # The soft limit counts the process's time since its start, so it is raised before each rendering.
        resource.setrlimit(resource.RLIMIT_CPU, (ceil(time.process_time()) + CPU_S, resource.RLIM_INFINITY))
        try:
            answer = {"text": _compiled(source)(values, python_forms=True)}
        except Exception as error:  # any failure of a template is reported to the caller as an error of the template
            answer = {"error": str(error) or type(error).__name__}
        pipe.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
