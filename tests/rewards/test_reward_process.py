"""Reward functions in their own process: what they are given, and one sentence for each way in which they fail."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import TrainingError
from apprentice.recipe import RewardTerm
from apprentice.rewards.reward_process import Reply, RewardProcess

REPLIES = [Reply("Add.", "12", ("7 + 5 = 12",), "sums", 3), Reply("Add.", "", ("4",), "sums", 8)]
MODULE = """
import os
import time

def length(prompts, completions, references, tasks):
    return [len(c) + 10 * len(r) for c, r in zip(completions, references, strict=True)]

def divides(completions, **others):
    return [1 / len(c) for c in completions]

def nothing(completions, **others):
    return [1.0, None]

def too_few(completions, **others):
    return [1.0]

def text(completions, **others):
    return "many"

def infinite(completions, **others):
    return [0.0, float("inf")]

def secret(completions, **others):
    return [float("AWS_SECRET_ACCESS_KEY" in os.environ)] * len(completions)

def pids(completions, **others):
    return [os.getpid()] * len(completions)

def leaves(completions, **others):
    os._exit(3)

def large(completions, **others):
    return [len(bytearray(8 << 30))] * len(completions)

def prints(completions, **others):
    print("loud")
    return [True] * len(completions)
"""


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")


@pytest.fixture
def process(request: pytest.FixtureRequest, my_rewards: None) -> Iterator[RewardProcess]:
    keys: dict[str, Any] = {"function": request.param} if isinstance(request.param, str) else request.param
    reward_process = RewardProcess(RewardTerm(**keys))
    yield reward_process
    reward_process.close()


@pytest.mark.parametrize("process", ["python:my_rewards:length"], indirect=True)
def test_a_function_of_the_user_has_all_columns(process: RewardProcess) -> None:
    assert process.score(REPLIES) == [12, 10]
    assert process.score(REPLIES[:1]) == [12]


def test_a_module_lies_where_the_command_was_given(my_rewards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer on the same machine, or one that shares its files, has another current folder."""
    monkeypatch.chdir("/")
    reward_process = RewardProcess(RewardTerm(function="python:my_rewards:length"), str(tmp_path))
    assert reward_process.score(REPLIES) == [12, 10]
    reward_process.close()


@pytest.mark.parametrize("process", ["python:my_rewards:pids"], indirect=True)
def test_it_runs_elsewhere_in_one_process(process: RewardProcess) -> None:
    [first, second], [third] = process.score(REPLIES), process.score(REPLIES[:1])
    assert first == second == third != os.getpid()
    assert "my_rewards" not in sys.modules


@pytest.mark.parametrize("process", ["python:my_rewards:secret"], indirect=True)
def test_our_environment_is_not_passed_on(process: RewardProcess) -> None:
    assert process.score(REPLIES) == [0, 0]


@pytest.mark.parametrize("process", ["python:my_rewards:prints"], indirect=True)
def test_what_it_prints_is_not_an_answer(process: RewardProcess) -> None:
    assert process.score(REPLIES) == [1, 1]


@pytest.mark.parametrize(
    ("process", "words"),
    [
        ("python:my_rewards:divides", "raised ZeroDivisionError: .* zero, on the reply to row 8 of task 'sums'; correct"),
        ("python:my_rewards:nothing", "gave None, which is no number, on the reply to row 8 of task 'sums'; correct"),
        ("python:my_rewards:infinite", "gave inf, which is no number, on the reply to row 8 of task 'sums'"),
        ("python:my_rewards:too_few", "gave 1 numbers for 2 replies, on the 2 replies of one call, the first to row 3 of task"),
        ("python:my_rewards:text", "gave 'many' and not a list of numbers, one for each reply, on the 2 replies"),
        ("python:my_rewards:leaves", r"ended its process \(exit code 3\), on the 2 replies of one call"),
        ({"function": "python:my_rewards:large", "memory_gib": 1}, "raised MemoryError, on the reply to row 3 of task 'sums'"),
    ],
    indirect=["process"],
)
def test_a_failure_is_one_sentence(process: RewardProcess, words: str) -> None:
    with pytest.raises(TrainingError, match=f"^reward function {process.term.function} {words}") as caught:
        process.score(REPLIES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("process", "words"),
    [
        ("python:my_rewards:nobody", "module my_rewards has no function nobody; correct training"),
        ("python:my_rewards:os", "os in module my_rewards is not a function but a module; correct"),
        ("python:no_module_here:f", "module no_module_here cannot be imported: ModuleNotFoundError: .*; correct"),
        ({"function": "json_schema", "json_schema": {"type": 1}}, "the schema is no JSON Schema: .*; correct"),
    ],
    indirect=["process"],
)
def test_a_function_that_cannot_be_made(process: RewardProcess, words: str) -> None:
    with pytest.raises(TrainingError, match=f"^reward function {process.term.function}: {words}"):
        process.start()


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_CPU])
def test_limits_of_the_machine_are_kept(kind: int, tmp_path: Path) -> None:
    """As on clusters that start jobs with `ulimit`: a process may lower such a limit, and not raise it."""
    hard = 1 << 30 if kind == resource.RLIMIT_AS else 5  # below what the term allows
    code = (
        f"import resource; resource.setrlimit({kind}, ({hard}, {hard}))\n"
        "from apprentice.recipe import RewardTerm\n"
        "from apprentice.rewards import reward_worker\n"
        "reward_worker._limit(RewardTerm(function='math'))()\n"
        f"print(*resource.getrlimit({kind}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(hard)] * 2, done.stderr


@pytest.mark.slow  # two seconds of processor time
@pytest.mark.parametrize("process", [{"function": "regex", "pattern": "(1+)+2", "cpu_s": 1}], indirect=True)
def test_a_pattern_that_never_ends_is_ended(process: RewardProcess) -> None:
    endless = REPLIES[1]._replace(completion="1" * 64)
    with pytest.raises(TrainingError, match=r"regex took more than 1 s of processor time \(cpu_s\), on the reply to row 8 of task"):
        process.score([REPLIES[0], endless])
    assert process.score(REPLIES) == [1, 0]  # a new process
