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
    rows = gpu.rows_of([[4, 1, 3], [2, 6], [8]], 100, seed=1)
    assert rows.tokens == 24
    assert rows.targets == 18
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert rows.segment_ids[1].tolist() == [1] * 2 + [2] * 6
    assert [row.targets for row in rows.facts] == [[3, 0, 2], [1, 5], [7]]
    assert (rows.input_ids >= 3).all()
    assert (rows.input_ids < 100).all()


def test_the_embedding_is_no_arithmetic() -> None:
    whole = gpu.Measurement(targets_per_s=0.0, tokens_per_s=10.0, peak_memory=0, micro=1, trained=1000, attention="sdpa")
    assert gpu.utilisation(whole, 1000, 200, 96_000.0) == pytest.approx(6 * 800 * 10 / 96_000)
    lora = gpu.Measurement(targets_per_s=0.0, tokens_per_s=10.0, peak_memory=0, micro=1, trained=50, attention="sdpa")
    assert gpu.utilisation(lora, 1000, 200, 96_000.0) == pytest.approx((4 * 800 + 2 * 50) * 10 / 96_000)


def test_without_a_gpu_there_is_a_reason(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["figure"] for line in lines] == list(gpu.FIGURES)
    assert all(line["value"] is None and line["why"].startswith("there is no GPU here") for line in lines)


@pytest.mark.slow
def test_the_same_with_a_tiny_shape(tiny_model: Path) -> None:
    size = ("--length", "128", "--rows", "2", "--steps", "2")
    command = [sys.executable, "-m", "benchmarks.training.gpu", "--tiny", "--tokenizer", str(tiny_model), *size]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["figure"] for line in lines] == list(gpu.FIGURES)
    for line in lines[: len(gpu.CASES)]:
        assert line["tokens_per_s"] > 0
        assert line["peak_memory_gib"] > 0.01
        assert line["attention"] == "sdpa"
        assert line["attention_tflop"]["rows"] > line["attention_tflop"]["examples"]
    assert [line["value"] > 0 for line in lines[-3:]] == [True] * 3
    assert lines[-2]["peer"]["attention"] == "sdpa"
