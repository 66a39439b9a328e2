"""The handle of a training: records as they come, its end, its errors, and that it stops with its program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apprentice
from apprentice import pipeline
from apprentice.python_api import training_child, training_process
from apprentice.run.fence import FencedError

Start = Callable[..., "apprentice.TrainingProcess"]
STEP = {"step": 1, "steps": 9, "loss": 2.0}
# A process that speaks as the real one does; it waits for the end of its standard input before it ends.
CHILD = """
import json, sys
order = json.loads(sys.stdin.readline())
assert order["recipe"]["name"] == "quickstart", order
def tell(**event):
    print(json.dumps(event), flush=True)
EVENTS
"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Starts a training whose process runs these lines of Python instead of training."""

    def _start(events: str, **options: Any) -> apprentice.TrainingProcess:
        (tmp_path / "stand_in_child.py").write_text(CHILD.replace("EVENTS", events))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(training_process, "CHILD", "stand_in_child")
        return apprentice.Recipe.load("quickstart", f"storage={tmp_path}").train(**options)

    return _start


def test_records_come_until_the_training_is_done(start: Start) -> None:
    shown: list[tuple[str, dict[str, Any]]] = []
    training = start(
        f"tell(progress=['prepare', {{'message': 'tasks'}}]); tell(record={STEP})\n"
        "tell(record={'step': 1, 'validation_loss': 3.0}); tell(result={'run': 'x'})",
        progress=lambda stage, values: shown.append((stage, values)),
    )
    assert list(training.metrics()) == [STEP, {"step": 1, "validation_loss": 3.0}]
    assert list(training.metrics()) == [STEP, {"step": 1, "validation_loss": 3.0}]
    assert training.wait(60).name == "quickstart"
    assert not training.is_running
    assert training.stop() == training.run
    assert training.metrics_frame().to_dict("records") == [STEP | {"validation_loss": 3.0}]
    assert shown == [("prepare", {"message": "tasks"})]
    assert training.sentence == "run 'quickstart' is trained"


def test_it_is_stopped_by_the_end_of_its_input(start: Start) -> None:
    training = start(f"tell(record={STEP})\nassert sys.stdin.read() == ''\ntell(stopped='stopped after step 1')")
    assert next(training.metrics()) == STEP
    assert training.sentence == "run 'quickstart' is at step 1 of 9, loss 2.000"
    with pytest.raises(TimeoutError, match=r"run 'quickstart' is still training after 0 s; wait again, or stop it\."):
        training.wait(0)
    assert training.is_running
    training.stop()
    assert training.sentence == "stopped after step 1"
    assert "stopped after step 1" in training._repr_html_()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("RecipeError", apprentice.RecipeError), ("FencedError", FencedError), ("RowError", apprentice.TaskError)],
)
def test_an_error_of_the_training_is_raised_where_it_is_waited_for(start: Start, kind: str, error: type[Exception]) -> None:
    training = start(f"tell(error={{'kind': {kind!r}, 'sentence': 'the <fact>.'}})")
    assert list(training.metrics()) == []
    with pytest.raises(error, match=r"^the <fact>\.$"):
        training.wait(60)
    assert "the &lt;fact&gt;." in training._repr_html_()


@pytest.mark.parametrize(("events", "said"), [("tell(fault='Traceback: x')", "Traceback: x"), ("sys.exit(7)", "exit code 7")])
def test_a_fault_is_no_error_of_the_user(start: Start, events: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        start(events).wait(60)


def test_a_line_cut_by_a_kill_leaves_nobody_waiting(start: Start) -> None:
    training = start('sys.stdout.write(\'{"record": {"st\'); sys.stdout.flush(); sys.exit(9)')
    with pytest.raises(RuntimeError, match="exit code 9"):
        training.wait(20)


def test_a_progress_function_that_fails_is_told_of_and_the_training_goes_on(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def show(stage: str, values: Any) -> None:
        calls.append(stage)
        raise ValueError("of the user")

    told_twice = "tell(progress=['prepare', {}]); " * 2
    training = start(f"{told_twice}tell(record={STEP}); tell(result={{'run': 'x'}})", progress=show)
    assert training.wait(20).name == "quickstart"
    assert list(training.metrics()) == [STEP]
    assert calls == ["prepare"]
    assert "ValueError: of the user" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "event"),
    [
        ({"run": "r"}, ("result", {"run": "r"})),
        (KeyboardInterrupt(), ("stopped", "stopped by Ctrl-C before the first step")),
        (apprentice.RunError("no."), ("error", {"kind": "RunError", "sentence": "no."})),
        (OSError(28, "No space left"), ("error", {"kind": "StorageError"})),
        (ValueError("bug"), ("fault", "ValueError: bug")),
    ],
)
def test_the_process_tells_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: Any, event: tuple[str, Any]
) -> None:
    told_of: list[tuple[str, Any]] = []

    def train_run(recipe: Any, *, restart: bool, progress: Any, record: Any) -> Any:
        progress("train", {"step": 1})
        record(STEP)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(pipeline, "train_run", train_run)
    recipe = apprentice.Recipe.load("quickstart", f"storage={tmp_path}")
    kind, value = training_child.train(recipe, restart=False, tell=lambda *event: told_of.append(event))
    assert kind == event[0]
    if isinstance(event[1], dict):
        assert event[1].items() <= value.items()
    else:
        assert event[1] in value
    assert told_of == [("progress", ["train", {"step": 1}]), ("record", STEP)]


def test_the_process_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """A real child, whose input ends before it has connected to anything."""
    program = f"import sys, {training_child.__name__} as child\nchild._stop_at_end(sys.stdin)"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, errors = child.communicate("more\n", timeout=60)
    assert "KeyboardInterrupt" in errors
