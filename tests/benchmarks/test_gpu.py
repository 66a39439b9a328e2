"""`benchmarks/training/gpu.py` with a tiny shape, where there is no GPU too; and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from apprentice.recipe import Recipe
from apprentice.train.batch import PackedRows
from benchmarks.training import gpu
from benchmarks.training.peer_trainers import Measured
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


def test_attention_that_masks_nothing_counts_besides(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "device_name", lambda: "NVIDIA H200")
    measurement = gpu.Measurement(0.0, 50_000.0, 2**31, 2, 1_000_000_000, "sdpa")
    shape = gpu.LARGE._replace(vocab_size=49_152)
    gpu.report_mfu("full_zero3", measurement, shape, 1_000_000_000, [[[1024, 3072], [4096]]])
    line = json.loads(capfd.readouterr().out)
    pairs = 1024 * 1025 / 2 + 3072 * 3073 / 2 + 4096 * 4097 / 2
    of_a_token = 12 * pairs * 2048 * 22 / 8192
    assert line["value"] == pytest.approx(6 * (10**9 - 49_152 * 2048) * 50_000 / 989e12, rel=1e-3)
    assert line["mfu_with_attention"] == pytest.approx(line["value"] + of_a_token * 50_000 / 989e12, rel=1e-3)
    assert line["attention_tflop"]["rows"] == pytest.approx(12 * 2 * 4096**2 * 2048 * 22 / 1e12, rel=1e-3)
    assert (line["goal"], line["examples_a_row"], line["peak_memory_gib"]) == (0.45, 1.5, 2.0)


def test_a_peer_without_room_gets_fewer_rows_at_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    sizes: list[object] = []

    def measured(_: str, recipe: Recipe, steps: list[PackedRows]) -> Measured:
        sizes.append(recipe.training.micro_batch)
        if recipe.training.micro_batch != 2:
            raise torch.multiprocessing.ProcessRaisedException("torch.OutOfMemoryError: CUDA out of memory", 0, 1)
        return Measured(25.0, 4 * 2**30, "flash_attention_2", True)

    monkeypatch.setattr(gpu.peer_trainers, "measured", measured)
    arguments = Namespace(rows=6, length=64, steps=1, micro=0, dtype="bfloat16", checkpointing=False)
    gpu.report_trl(arguments, tmp_path, [], gpu.Measurement(50.0, 60.0, 2**30, 6, 1, "sdpa"))
    speed, memory = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert sizes == [6, 3, 2]
    assert (speed["value"], memory["value"]) == (2.0, 0.25)
    assert speed["peer"] == {
        "name": "trl SFTTrainer",
        "value": 25.0,
        "rows_at_once": 2,
        "attention": "flash_attention_2",
        "liger": True,
        "packing": "bfd",
    }


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
        assert line["attention"] == "segments"
        assert line["attention_tflop"]["rows"] > line["attention_tflop"]["examples"]
    assert [line["value"] > 0 for line in lines[-3:]] == [True] * 3
    assert lines[-2]["peer"]["attention"] == "sdpa"
