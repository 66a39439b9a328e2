"""`benchmarks/training/gpu.py` with a tiny shape, where there is no GPU too; and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training import gpu
from tests.conftest import ROOT


def test_rows_are_full_and_all_but_first_tokens_are_predicted() -> None:
    rows = gpu.rows_of(3, 16, 100, seed=1)
    assert rows.tokens == 48
    assert rows.targets == 36
    assert rows.positions[0].tolist() == [0, 1, 2, 3] * 4
    assert rows.segment_ids[2].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert (rows.input_ids >= 3).all()
    assert (rows.input_ids < 100).all()


def test_the_embedding_is_no_arithmetic() -> None:
    whole = gpu.Measurement(targets_per_s=0.0, tokens_per_s=10.0, peak_memory=0, micro=1, trained=1000)
    assert gpu.utilisation(whole, 1000, 200, 96_000.0) == pytest.approx(6 * 800 * 10 / 96_000)
    lora = gpu.Measurement(targets_per_s=0.0, tokens_per_s=10.0, peak_memory=0, micro=1, trained=50)
    assert gpu.utilisation(lora, 1000, 200, 96_000.0) == pytest.approx((4 * 800 + 2 * 50) * 10 / 96_000)


def test_without_a_gpu_there_is_a_reason(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["figure"] for line in lines] == list(gpu.FIGURES)
    assert all(line["value"] is None and line["why"].startswith("there is no GPU here") for line in lines)


@pytest.mark.slow
def test_the_same_with_a_tiny_shape(tiny_model: Path) -> None:
    size = ("--length", "32", "--rows", "2", "--steps", "2")
    command = [sys.executable, "-m", "benchmarks.training.gpu", "--tiny", "--tokenizer", str(tiny_model), *size]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["figure"] for line in lines] == list(gpu.FIGURES)
    assert [line["tokens_per_s"] > 0 for line in lines[:2]] == [True, True]
    assert [line["peak_memory_gib"] > 0.01 for line in lines[:2]] == [True, True]
    assert lines[3]["value"] > 0
