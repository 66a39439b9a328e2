"""A reward function in a process of its own, from the side of the process that asks it.

    replies ─JSON─▶ child: limits of time and memory, none of our environment variables ─JSON─▶ rewards

The kernel limits the child's processor time and memory, and a clock here ends one that only waits. Nothing that the child sends can
run here. It is no wall against hostile code: it may read files and use the network as the user who trains may.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any, NamedTuple

from apprentice.errors import TrainingError
from apprentice.recipe import RewardTerm

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")  # variables that the child has of ours
WAIT_FACTOR = 10  # seconds that a child may take in all for each second of processor time that it may
START_S = 60  # besides: for starting Python and importing


class Reply(NamedTuple):
    """A reply to be scored, with the prompt and the right answers of its row, which `row` of task `task` is."""

    prompt: str
    completion: str
    references: tuple[str, ...]
    task: str
    row: int


class RewardProcess:
    """The process that runs the function of one term, started when it is first needed, and again after an error ended it.

    A module of the user's is looked for on Python's path, in the current folder, and then in `folder`.
    """

    def __init__(self, term: RewardTerm, folder: str | None = None) -> None:
        self.term = term
        self._folder = folder or os.getcwd()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Any = None

    def start(self) -> None:
        """Starts the process unless it runs. Raises `TrainingError` if the function cannot be made or imported there."""
        if self._process is not None:
            return
        self._pipe, theirs = Pipe()
        path = [*filter(None, sys.path), os.getcwd(), self._folder]  # folders last, so that they hide no module
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "apprentice.rewards.reward_worker", str(theirs.fileno()), self.term.model_dump_json()],
            pass_fds=[theirs.fileno()],
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ}
            | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "HOME": tempfile.gettempdir()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._end = weakref.finalize(self, _end_process, self._process, self._pipe)  # also when nobody has this object any more
        answer = self._answer()
        if "error" in answer:
            self.close()
            raise TrainingError(f"reward function {self.term.name}: {answer['error']}; correct training.grpo.reward.")

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """Reward of every reply. Raises `TrainingError` naming function, row and reason if there is none for one."""
        self.start()
        columns = {
            "prompts": [reply.prompt for reply in replies],
            "completions": [reply.completion for reply in replies],
            "references": [list(reply.references) for reply in replies],
            "tasks": [reply.task for reply in replies],
        }
        with suppress(OSError):  # the child has ended, as the answer will tell
            self._pipe.send_bytes(json.dumps(columns).encode())
        answer = self._answer()
        if "error" in answer:
            self.close()
            raise self._error(answer["error"], replies, answer["place"])
        rewards: list[float] = answer["rewards"]
        return rewards

    def close(self) -> None:
        """Ends the process with all that it started."""
        if self._process is None:
            return
        self._end()
        self._process = None

    def _answer(self) -> dict[str, Any]:
        """The child's answer, an error if it gives none in time."""
        begun: int | None = None
        patience = START_S + WAIT_FACTOR * self.term.cpu_s
        try:
            while self._pipe.poll(patience):
                answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
                if "begun" not in answer:
                    return answer
                begun = answer["begun"]
        except (EOFError, OSError):
            return {"error": self._ending(), "place": begun}
        return {"error": f"gave no answer in {patience} s", "place": begun}

    def _ending(self) -> str:
        """Why the child ended, as words for a message."""
        assert self._process is not None
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return f"took more than {self.term.cpu_s} s of processor time (cpu_s)"
        return f"ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})"

    def _error(self, reason: str, replies: Sequence[Reply], place: int | None) -> TrainingError:
        reply = replies[place or 0]
        where = f"the reply to row {reply.row} of task {reply.task!r}"
        if place is None and len(replies) > 1:
            where = f"the {len(replies)} replies of one call, the first to row {reply.row} of task {reply.task!r}"
        return TrainingError(
            f"reward function {self.term.name} {reason}, on {where}; correct the function or training.grpo.reward."
        )


def _end_process(process: subprocess.Popen[bytes], pipe: Any) -> None:
    pipe.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
