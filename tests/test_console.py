"""The screen: one JSON object or plain lines, and how values are written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from apprentice.console import Screen


def test_json_has_standard_output_for_itself(capsys):
    screen = Screen(as_json=True)
    screen.say("hello")
    screen.progress("train", {"step": 1, "steps": 2})
    screen.result({"a": 1}, "text")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert "hello" in err
    assert "train" in err


def test_values_are_written_with_their_units(capsys):
    Screen().progress("train", {"step": 3, "loss": 1.23456, "tokens_per_s": 151.7, "wait_share": 0.013, "eta_s": 75.2, "lr": None})
    assert capsys.readouterr().out == "train     step 3  loss 1.235  152 tokens/s  wait 1%  eta 1:15\n"


def test_plain_lines_are_few_but_the_last_is_kept(capsys):
    screen = Screen()
    for step in range(1, 6):
        screen.progress("train", {"step": f"{step}/5", "done": step == 5})
    assert capsys.readouterr().out.splitlines() == ["train     step 1/5", "train     step 5/5"]


def test_errors_are_one_sentence_in_both_forms(capsys):
    Screen(as_json=True).error("No.")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "No."}
    assert err == "error: No.\n"


SAYS = """
import sys
from apprentice.console import Screen
screen = Screen()
for number in range(20000):
    screen.say(f"{number} → é")
    screen.progress("train", {"step": number, "done": True})
    screen.error("a warning", beside_result=True)
print("a library prints")
screen.result({}, "the result")
sys.exit(screen.failed(RuntimeError("ours")) - 3)
"""


@pytest.mark.parametrize("where", ["| head -1", "2>&1 | head -1", ">/dev/full", ">/dev/full 2>&1", ">&- 2>&-", "2>&-"])
def test_a_screen_that_is_gone_stops_nothing(where, tmp_path):
    (tmp_path / "says.py").write_text(SAYS)
    command = f"set -o pipefail; {sys.executable} {tmp_path / 'says.py'} {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "BrokenPipe" not in done.stderr
    assert done.stdout.startswith("0 → é\n") == (where != ">&- 2>&-" and "full" not in where)


def test_letters_that_the_screen_lacks_become_question_marks():
    command = [sys.executable, "-c", "from apprentice.console import Screen; Screen().say('a → b'); Screen().result({}, 'c → d')"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"a ? b\nc ? d\n")


def test_a_result_that_finds_no_room_is_an_error():
    code = "import sys; from apprentice.console import Screen\ntry: Screen(as_json=True).result({'a': 1})\n"
    code += "except OSError as error: sys.exit(Screen().failed(error))"
    command = f'{sys.executable} -c "$CODE" >/dev/full'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "CODE": code}, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no room is left on the disk; make room")


@pytest.mark.parametrize(("columns", "shown"), [(300, "restarts 2"), (120, "15170 tokens/s"), (60, "loss 1.235")])
def test_a_live_line_that_is_too_long_keeps_the_time_that_is_left(monkeypatch, columns, shown):
    values = {"step": "3/60", "loss": 1.23456, "smoothed_loss": 1.3, "learning_rate": 0.0003, "grad_norm": 1.7}
    values |= {"tokens_per_s": 15170.2, "tokens_per_s_worker": 758.2, "mfu_share": 0.31, "waiting_for_data_share": 0.013}
    values |= {"mixture_drift_share": 0.02, "eta_s": 75.2, "restarts": 2}
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 40)))
    Screen().progress("train", values)
    line = screen.getvalue().removeprefix("\r\033[K")
    assert len(line) < columns
    assert line.startswith("train     step 3/60  loss 1.235")
    assert "eta 1:15" in line
    assert shown in line


def test_what_is_waited_for_is_replaced_by_the_next_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    with screen.waiting("the model"):
        screen.say("ok data")
    assert capsys.readouterr().out == "ok data\n"
    on_a_terminal = io.StringIO()
    on_a_terminal.isatty = lambda: True
    screen._log = on_a_terminal
    with screen.waiting("the model"):
        screen.say("ok data")
    screen.say("ready")
    assert on_a_terminal.getvalue() == "… the model\r\033[Kok data\n… the model\r\033[Kready\n"
