"""The screen: one JSON object or plain lines, and how values are written."""

from __future__ import annotations

import json

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
