"""The command line: exit codes, one sentence for what the user can mend, one JSON object where it is asked for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from apprentice import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `apprentice …` in this process; gives (exit code, standard output, standard error)."""

    def _command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["apprentice", *words])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return _command


def test_the_version_is_that_of_the_package(command):
    from importlib.metadata import version

    assert command("--version") == (0, f"apprentice {version('apprentice')}\n", "")


def test_help_lists_every_command(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in [
        "quickstart",
        "check",
        "tasks",
        "preview",
        "prepare",
        "train",
        "runs",
        "evaluate",
        "serve",
        "ask",
        "recipe-schema",
    ]:
        assert name in out


def program(*words: str) -> list[str]:
    """The command line of a process of its own that is `apprentice …`."""
    code = f"import sys; sys.argv = ['apprentice', *{words!r}]; from apprentice.cli import main; main()"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("words", "closed", "code"), [(["--help"], "stdout", 0), (["nonsense"], "stderr", 2)])
def test_a_text_that_is_not_read_to_its_end_is_no_failure_of_its_own(words, closed, code):
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: write}
    done = subprocess.run(program(*words), **streams, check=False)
    os.close(write)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (code, b"", b"")


def test_a_connection_that_breaks_is_no_reader_that_has_gone(command, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.training_commands, "read_recipe", broken)
    code, _, err = command("train", "flan_mini")
    assert code == 3
    assert "BrokenPipeError" in err
    assert "please report it" in err


def test_ctrl_c_is_one_sentence():
    """A real SIGINT, while the command waits for an endpoint that takes its question and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        waiting = subprocess.Popen(
            program("ask", "Say yes.", "--url", url, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        server.settimeout(60)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1)
            waiting.send_signal(signal.SIGINT)
            out, err = waiting.communicate(timeout=60)
    sentence = "stopped by Ctrl-C; the same command begins again."
    assert (waiting.returncode, json.loads(out), err) == (1, {"error": sentence}, f"error: {sentence}\n")


@pytest.mark.parametrize("name", cli.AFTER_CTRL_C)
def test_ctrl_c_tells_how_to_go_on(command, monkeypatch, name):
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for group in (cli.training_commands, cli.data_commands, cli.evaluation_commands):
        monkeypatch.setattr(group, "screen_for", stopped)
    code, out, err = command(name, *["some"] * {"quickstart": 0, "export": 2, "predict": 2}.get(name, 1))
    assert (code, out, err) == (1, "", f"error: stopped by Ctrl-C; {cli.AFTER_CTRL_C[name]}\n")


def test_wrong_usage_is_two(command):
    assert command("nonsense")[0] == 2
    assert command("train")[0] == 2


def test_the_users_mistake_is_one_and_one_sentence(command):
    code, out, err = command("train", "flan_mimi")
    assert code == 1
    assert out == ""
    assert err.startswith("error: 'flan_mimi' is not a file and not a recipe")
    assert "Did you mean 'flan_mini'?" in err
    assert len(err.splitlines()) == 1


def test_the_users_mistake_as_json(command):
    code, out, _ = command("train", "flan_mimi", "--json")
    assert code == 1
    assert json.loads(out)["error"].startswith("'flan_mimi'")


def test_our_fault_is_three_with_a_traceback_and_where_to_report(command, monkeypatch):
    def broken(name: str, overrides: list[str] | None, **_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(cli.training_commands, "read_recipe", broken)
    code, _, err = command("train", "flan_mini")
    assert code == 3
    assert "ZeroDivisionError: inside" in err
    assert "please report it" in err


def test_tasks_are_listed_and_described(command):
    code, out, _ = command("tasks", "--json")
    rows = json.loads(out)["tasks"]
    assert code == 0
    assert {"name": "sst2", "cluster": "sentiment"}.items() <= next(row for row in rows if row["name"] == "sst2").items()
    assert {"inverted": 3, "train_rows": 9427}.items() <= next(row for row in rows if row["name"] == "boolq").items()
    code, out, _ = command("tasks")
    listed = [
        line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.split()[0] in {r["name"] for r in rows}
    ]
    assert sorted(listed) == sorted(row["name"] for row in rows)
    assert max(map(len, out.splitlines())) <= 110
    assert f"{len(rows)} tasks in" in out
    code, out, _ = command("tasks", "nli", "--json")
    assert {row["cluster"] for row in json.loads(out)["tasks"]} == {"nli"}
    code, out, _ = command("tasks", "boolq")
    assert code == 0
    assert "Do sea otters have a layer of blubber?" in out
    assert "{{" not in out
    assert "(inverted)" in out


def test_an_unknown_task_has_a_near_name(command):
    code, _, err = command("tasks", "muliti_nli")
    assert code == 1
    assert "Did you mean 'multi_nli'?" in err


def test_runs_of_an_empty_place(command, tmp_path):
    code, out, _ = command("runs", "--storage", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"runs": []})


def test_nobody_answers(command):
    code, _, err = command("ask", "Say yes.", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "no endpoint answers at http://127.0.0.1:9" in err
