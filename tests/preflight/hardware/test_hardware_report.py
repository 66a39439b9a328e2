"""What `apprentice check --hardware` prints, and the advice in it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apprentice.cli import app
from apprentice.preflight.hardware.advice import Setting, apply_settings
from apprentice.preflight.hardware.devices import DEVICES, parse_hardware
from apprentice.preflight.hardware.hardware_estimate import HardwareEstimator, place_recipe
from apprentice.preflight.hardware.hardware_report import report_on_hardware
from apprentice.recipe import Recipe, load_recipe
from tests.models.architectures import made
from tests.support.big_models import big_llama
from tests.support.recipes import gpu_recipe


def recipe_file(folder: Path, model: Path, method: str = "full", **changes: Any) -> Path:
    return gpu_recipe(folder, model, method, **{"training__deepspeed": {"stage": 0}} | changes)


def recipe(folder: Path, model: Path, method: str = "full", **changes: Any) -> Recipe:
    return load_recipe(recipe_file(folder, model, method, **changes))


def test_advice_leads_to_what_fits_and_is_no_longer_than_need_be(tmp_path: Path) -> None:
    chosen, machines = recipe(tmp_path, big_llama(tmp_path, "1b"), data__packing={"length": 8192}), parse_hardware("8xL4-24GB")
    report = report_on_hardware(chosen, "8xL4-24GB")
    assert not report.estimate.fits
    assert report.variants
    placed, estimator = place_recipe(chosen, machines), HardwareEstimator(machines)
    for way in report.variants:
        if way.other_hardware:
            continue
        changed = apply_settings(placed, way.settings)
        assert changed is not None
        assert estimator.estimate(changed).fits
        for left_out in way.settings:
            fewer = apply_settings(placed, tuple(setting for setting in way.settings if setting != left_out))
            assert fewer is None or not estimator.estimate(fewer).fits
    same = [way.estimate.step.total for way in report.variants if not way.changes_learning and not way.other_hardware]
    assert same == sorted(same)
    assert [way.changes_learning for way in report.variants] == sorted(way.changes_learning for way in report.variants)


def test_more_nodes_are_an_advice_too(tmp_path: Path) -> None:
    chosen = recipe(tmp_path, big_llama(tmp_path, "1b"), training__deepspeed={"stage": 3})
    ways = report_on_hardware(chosen, "1xL4-24GB").variants
    (more,) = (way for way in ways if way.other_hardware)
    assert str(more) == "--hardware 4x1xL4-24GB"
    assert more.estimate.fits


def test_adafactor_cannot_be_split_up_and_adamw_can(tmp_path: Path) -> None:
    adafactor: dict[str, Any] = {"training__optimizer": {"name": "adafactor"}, "training__activation_checkpointing": True}
    report = report_on_hardware(recipe(tmp_path, big_llama(tmp_path, "8b"), **adafactor), "8xA100-40GB")
    ways = [str(way) for way in report.variants]
    assert any("training.deepspeed.stage=" in way and "training.optimizer.name=adamw" in way for way in ways), ways
    assert all(way.changes_learning or way.other_hardware for way in report.variants)


def test_settings_are_written_as_overrides(tmp_path: Path, tiny_model: Path) -> None:
    chosen = recipe(tmp_path, tiny_model)
    setting = Setting("training.activation_checkpointing", True)
    assert str(setting) == "training.activation_checkpointing=true"
    changed = apply_settings(chosen, (setting,))
    assert changed is not None
    assert changed.training.activation_checkpointing
    assert apply_settings(chosen, (Setting("training.deepspeed.offload_parameters", "cpu"),)) is None  # needs stage 3


def test_settings_keep_the_rest_of_a_recipe(tmp_path: Path, tiny_model: Path) -> None:
    groups = {"one": {"share": 2.0, "tasks": ["sst2"]}, "other": {"share": 1.0, "tasks": ["agnews"], "cap": 5}}
    chosen = recipe(tmp_path, tiny_model, data__mixture={"groups": groups})
    placed = place_recipe(chosen, parse_hardware("8xL4-24GB"))
    changed = apply_settings(placed, (Setting("training.deepspeed.stage", 3), Setting("tuning.method", "lora", True)))
    assert changed is not None
    assert changed.data == chosen.data
    assert changed.training.max_workers == 8
    assert changed.training.resources.gpus == 1
    assert changed.training.deepspeed.stage == 3


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("llama").save_pretrained(tmp_path / "llama")
    for file in (tmp_path / "llama").glob("*.safetensors"):
        file.unlink()
    file = str(recipe_file(tmp_path, tmp_path / "llama", data__packing={"length": 128}, data__max_length=64))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("ray.init", None)
    run = CliRunner().invoke(app, ["check", file, "--hardware", "8xL4-24GB"])
    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    assert lines[0].startswith("ok  hardware   an estimate, nothing was run: 8xL4-24GB (NVIDIA L4 data sheet; ")
    assert [line[:15].split() for line in lines[1:5]] == [["ok", "memory"], ["ok", "host"], ["ok", "step"], ["ok", "run"]]
    assert lines[-1] == "fits"
    answer = json.loads(CliRunner().invoke(app, ["check", file, "--hardware", "8xL4-24GB", "--json"]).stdout)
    assert answer["is_estimate"] is answer["fits"] is True
    assert (answer["workers"], answer["steps"], answer["variants"]) == (8, 4, [])
    assert answer["gpu_hours"] == pytest.approx(8 * answer["hours"])
    assert answer["step_s"]["total"] == pytest.approx(sum(value for key, value in answer["step_s"].items() if key != "total"))


def test_what_does_not_fit_ends_with_1(tmp_path: Path) -> None:
    file = str(recipe_file(tmp_path, big_llama(tmp_path, "1b"), training__steps=None, training__epochs=1, data__max_length=4096))
    run = CliRunner().invoke(app, ["check", file, "--hardware", "1xRTX4090-24GB", "--json"])
    assert run.exit_code == 1
    answer = json.loads(run.stdout)
    assert not answer["fits"]
    assert answer["steps"] is None
    assert answer["gpu_hours_per_1000_steps"] > 0
    assert answer["variants"][0]["overrides"]


def test_what_nothing_makes_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICES, "L4-24GB", replace(DEVICES["L4-24GB"], memory=1e9))
    tuned = recipe(tmp_path, big_llama(tmp_path, "1b"), "lora", training__global_batch=1, training__workers=1)
    lines = report_on_hardware(tuned, "1xL4-24GB").lines()
    assert lines[1][0] == "NO"
    assert lines[-1][1:] == ("remedy", "nothing known here makes it fit; name more or larger GPUs, or a smaller model")
