"""Client of a running endpoint, and the endpoint of a run or a model for a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apprentice.console import ignore_progress
from apprentice.pipeline import Progress


@dataclass(frozen=True)
class EndpointClient:
    """Client of the endpoint at `url`; `key` is its API key, if it wants one. `{url}/v1` speaks OpenAI's API too."""

    url: str
    key: str | None = None

    def ask(self, instruction: str, input: str = "", *, max_tokens: int = 128) -> str:
        """The reply to one instruction, which the endpoint phrases as in training; at most `max_tokens` tokens long.

        Raises `ServingError` if no endpoint answers, or it answers with an error.
        """
        from apprentice.pipeline import ask_endpoint

        return ask_endpoint(self.url, instruction, input, max_tokens=max_tokens, key=self.key)


@contextmanager
def open_endpoint(target: str, *, port: int, progress: Progress | None, **options: Any) -> Iterator[EndpointClient]:
    """Serves a run or a model for a `with` block; `options` are those of `apprentice.pipeline.run_endpoint`."""
    from apprentice.pipeline import run_endpoint

    with run_endpoint(target, port=port, progress=progress or ignore_progress, **options) as url:
        yield EndpointClient(url)
