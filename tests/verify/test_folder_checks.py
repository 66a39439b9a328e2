"""Folders that are as their contract says, and folders in which something was changed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from apprentice import cli, pipeline
from apprentice.data.encoding.prompt_contract import make_contract
from apprentice.data.encoding.prompt_format import Layout
from apprentice.recipe import Recipe
from tests.support.chat_templates import sources, stand_in
from tests.verify.test_server_checks import exported, verdicts

__all__ = ["exported"]


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def drifted(result: dict[str, Any]) -> list[str]:
    return [f"{finding['check']}: {finding['subject']}" for finding in result["findings"] if finding["verdict"] == "drifted"]


def test_a_copy_is_the_same(exported: Path, copy: Path) -> None:
    result = pipeline.verify_contract(str(copy), str(exported))
    assert (result["kind"], drifted(result)) == ("folder", [])
    assert verdicts(result, "greedy text") == ["same"] * 6
    assert {finding["verdict"] for finding in result["findings"]} == {"same"}


def test_a_contract_with_thoughts(tmp_path: Path) -> None:
    """Its prompts leave the thought to the reply, and so must those that are compared with it."""
    tokenizer = stand_in("qwen3_5_think", sources()["qwen3_5_think"].read_text(), tmp_path)
    values = {"name": "r", "model": {"base": "m"}, "data": {"tasks": ["t"], "layout": "chat", "reasoning": "train"}}
    recipe = Recipe.model_validate(values | {"training": {"steps": 1}})
    contract = make_contract(recipe, Layout("chat", tokenizer, reasoning="train"), tmp_path)
    bare = make_contract(recipe, Layout("chat", tokenizer), tmp_path)
    assert contract.golden != bare.golden
    contract.write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(contract.stop_ids)}))
    assert drifted(pipeline.verify_contract(str(tmp_path), str(tmp_path))) == []
    (tmp_path / "chat_template.jinja").write_text(" " + sources()["qwen3_5_think"].read_text())
    result = pipeline.verify_contract(str(tmp_path), str(tmp_path))
    assert "chat template: sha256" in drifted(result)


def test_another_template(exported: Path, copy: Path) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text())
    place = copy / "chat_template.jinja"
    template = place.read_text() if place.is_file() else config.pop("chat_template")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    place.write_text("\n\n" + template)
    result = pipeline.verify_contract(str(copy), str(exported))
    assert drifted(result)[0] == "chat template: sha256"
    assert verdicts(result, "token ids") == ["drifted"] * 6


def test_other_weights_and_another_end(exported: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-20_000:] = bytes(20_000)
    (copy / "model.safetensors").write_bytes(weights)
    for name in ("generation_config.json", "config.json"):
        if (copy / name).is_file():
            values = json.loads((copy / name).read_text())
            (copy / name).write_text(json.dumps(values | {"eos_token_id": 5}))
    result = pipeline.verify_contract(str(copy), str(exported))
    assert {"weights: sha256", "stops: eos_token_id"} <= set(drifted(result))


def test_the_command(exported: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for target, code in ((exported, 0), (copy, 1)):
        monkeypatch.setattr(sys, "argv", ["apprentice", "verify", str(target), "--contract", str(exported), "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
        assert bool(json.loads(capsys.readouterr().out)["drifted"]) is bool(code)
