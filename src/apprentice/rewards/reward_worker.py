"""Process that runs one reward function under limits: receives replies through a pipe, sends back numbers, and limits itself.

python -P -m apprentice.rewards.reward_worker FILE_DESCRIPTOR TERM, where TERM is a `RewardTerm` as JSON
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from typing import Any

from apprentice.recipe import PYTHON, RewardTerm
from apprentice.rewards.text_functions import text_function

Columns = Mapping[str, list[Any]]  # prompts, completions, references, tasks: a list each, with an entry for each reply


class _ReplyError(Exception):
    """An error of the function over one reply, whose number in the call is `place`; None where it cannot be told."""

    def __init__(self, place: int | None, message: str) -> None:
        super().__init__(message)
        self.place = place


def _create_scorer(term: RewardTerm, report: Callable[[int], None]) -> Callable[[Columns], list[float]]:
    """The function of `term` over whole calls; `report` is told the place of the reply that a built-in function begins with."""
    if str(term.function).startswith(PYTHON):
        function = _import_function(str(term.function))
        return lambda columns: _call(function, columns)
    score_reply = text_function(term)

    def score(columns: Columns) -> list[float]:
        rewards = []
        for place, (reply, references) in enumerate(zip(columns["completions"], columns["references"], strict=True)):
            report(place)
            rewards.append(score_reply(reply, references))
        return rewards

    return score


def _import_function(name: str) -> Callable[..., Any]:
    module, _, function = name.removeprefix(PYTHON).rpartition(":")
    try:
        imported = getattr(importlib.import_module(module), function)
    except AttributeError:
        raise ValueError(f"module {module} has no function {function}") from None
    except BaseException as error:
        raise ValueError(f"module {module} cannot be imported: {_sentence(error)}") from error
    if not callable(imported):
        raise ValueError(f"{function} in module {module} is not a function but a {type(imported).__name__}")
    function_object: Callable[..., Any] = imported
    return function_object


def _call(function: Callable[..., Any], columns: Columns) -> list[float]:
    """Rewards of one call. Raises `_ReplyError`; the reply is found by calling the function over each alone."""
    try:
        rewards = _numbers(function(**columns), len(columns["completions"]))
    except _ReplyError:
        raise
    except BaseException as error:
        count = len(columns["completions"])
        for place in range(count) if count > 1 else ():
            try:
                function(**{name: values[place : place + 1] for name, values in columns.items()})
            except BaseException as alone:
                raise _ReplyError(place, f"raised {_sentence(alone)}") from alone
        raise _ReplyError(0 if count == 1 else None, f"raised {_sentence(error)}") from error
    return rewards


def _numbers(rewards: Any, count: int) -> list[float]:
    if isinstance(rewards, str | bytes | Mapping) or not hasattr(rewards, "__iter__"):
        raise _ReplyError(None, f"gave {_shown(rewards)} and not a list of numbers, one for each reply")
    values = list(rewards)
    if len(values) != count:
        raise _ReplyError(None, f"gave {len(values)} numbers for {count} replies")
    for place, value in enumerate(values):
        number = value.item() if hasattr(value, "item") and not isinstance(value, Real) else value  # NumPy's and PyTorch's
        if not isinstance(number, Real) or not math.isfinite(number):
            raise _ReplyError(place, f"gave {_shown(value)}, which is no number")
        values[place] = float(number)
    return values


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def _limit(term: RewardTerm) -> Callable[[], None]:
    """Sets the limits of this process; gives a function that lets it have `term.cpu_s` more seconds from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = _allowed(resource.RLIMIT_AS, pages * resource.getpagesize() + int(term.memory_gib * (1 << 30)))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def allow_more() -> None:
        # The soft limit counts the process's time since its start.
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        seconds = _allowed(resource.RLIMIT_CPU, math.ceil(time.process_time()) + term.cpu_s)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))

    return allow_more


def _allowed(kind: int, most: int) -> int:
    """`most`, or the hard limit that this process was started with, which it may not raise, where that is lower."""
    _, hard = resource.getrlimit(kind)
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


def serve(pipe: Connection, term: RewardTerm) -> None:
    """Answers each call with `{"rewards": […]}` or `{"error": …, "place": …}` as JSON, until the other side closes the pipe.

    The first answer is `{"rewards": []}` once the function is there. Before each reply of a built-in function it says
    `{"begun": place}`.
    """
    allow_more = _limit(term)

    def answer(message: dict[str, Any]) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    def report(place: int) -> None:
        answer({"begun": place})
        allow_more()

    allow_more()
    try:
        score = _create_scorer(term, report)
    except Exception as error:
        answer({"error": str(error), "place": None})
        return
    answer({"rewards": []})
    while True:
        try:
            columns = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        allow_more()
        try:
            answer({"rewards": score(columns)})
        except _ReplyError as error:
            answer({"error": str(error), "place": error.place})
        except Exception as error:
            answer({"error": f"raised {_sentence(error)}", "place": None})


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), RewardTerm.model_validate_json(sys.argv[2]))
