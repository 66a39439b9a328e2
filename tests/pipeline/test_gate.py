"""The verdict beside the weights: who may be served with `--require-gate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import EvaluationError
from apprentice.pipeline import evaluate as evaluation
from apprentice.pipeline.evaluate import check_gate
from apprentice.storage import Folder


class Contract:
    weights_sha256 = "abc"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(evaluation, "read_contract", lambda _: Contract())
    return Folder.at(tmp_path)


def report(**gate: Any) -> dict[str, Any]:
    check = {"name": "held_out mean above base", "found": 1.0, "needed": 2.0, "passed": gate["passed"]}
    return {"created": "2026-11-24T00:00:00Z", "gate": {"subject": "tuned", "checks": [check], **gate}}


def test_a_model_that_passed(folder: Folder) -> None:
    evaluation._store_verdict(folder, report(passed=True))
    assert json.loads((folder / "gate.json").read_text())["weights_sha256"] == "abc"
    check_gate(folder)


def test_a_model_that_failed(folder: Folder) -> None:
    evaluation._store_verdict(folder, report(passed=False))
    with pytest.raises(
        EvaluationError, match=r"did not pass: gate: tuned failed: held_out mean above base is \+1\.0, at least \+2\.0"
    ):
        check_gate(folder)


def test_a_model_without_a_verdict_and_with_other_weights(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="no verdict of a gate"):
        check_gate(folder)
    evaluation._store_verdict(folder, report(passed=True))
    monkeypatch.setattr(Contract, "weights_sha256", "other")
    with pytest.raises(EvaluationError, match="about other weights"):
        check_gate(folder)


def test_scoring_without_a_gate_takes_the_old_verdict_away(folder: Folder) -> None:
    evaluation._store_verdict(folder, report(passed=True))
    evaluation._store_verdict(folder, {"created": "", "gate": None})
    assert not (folder / "gate.json").exists()
