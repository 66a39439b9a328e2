"""`apprentice export`: a folder that others load, with a card that says where it comes from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from apprentice import cli, pipeline
from apprentice.data.encoding.prompt_contract import layout_beside, layout_of, make_contract
from apprentice.errors import ContractError, RunError, StorageError
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run, open_run
from apprentice.tasks.registry import load_task
from tests.data.small import write_tasks
from tests.support.recipes import tiny_recipe


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    """As training and evaluation leave one."""
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["sst2", "ag_news", "trec"], data__hold_out=["sentiment"]))
    opened = open_run(recipe)
    place = opened.model.local
    shutil.copytree(tiny_model, place)
    make_contract(recipe, layout_of(recipe, Tokenizer(place)), place, ancestors=("org/base",), run=recipe.name).write(place)
    tasks = {"ag_news": {"share_of_examples": 0.75}, "trec": {"share_of_examples": 0.25}}
    opened.ledger_file.write_json({"examples": 1200, "target_tokens": 3456, "tasks": tasks})
    facts = {"rows": "validation", "examples": 8, "of": "log-probabilities", "dtype": "bfloat16", "count": 123}
    opened.export_file.write_json({"version": 1, "step": 4, **facts, "mean": 0.0031, "largest": 0.021})
    return opened


REPORT = {
    "summary": {"sentence": "tuned against base: held-out ranked +12.5"},
    "columns": [{"key": "base@0", "title": "base"}, {"key": "tuned@0", "title": "tuned"}],
    "tasks": [
        {
            "task": "sst2",
            "held_out": True,
            "metric": "accuracy",
            "columns": {"base@0": {"score": 50.0}, "tuned@0": {"score": 62.5}},
        },
        {"task": "trec", "held_out": False, "metric": "accuracy", "columns": {"tuned@0": {"score": None}}},
    ],
}


def test_what_is_exported_loads_and_says_what_it_is(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    run.report.make()
    (run.report / "report.json").write_json(REPORT)
    run.update_status(time={"seconds": {"steps": 80.0, "lost_steps": 20.0}, "faults": 1})
    result = pipeline.export_run("tiny", str(tmp_path / "out" / "model"), storage=str(tmp_path / "runs"))
    place = tmp_path / "out" / "model"
    assert result["folder"] == str(place)
    assert result["bytes"] == sum(file.stat().st_size for file in place.iterdir())
    assert {file.name for file in place.iterdir()} == {file.name for file in run.model.local.iterdir()} | {
        "README.md",
        "equivalence.json",
    }
    assert json.loads((place / "equivalence.json").read_text())["read_by"] == "bytes"
    assert "The weights are, byte for byte, those of the run." in (place / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(place).num_parameters() > 0
    assert layout_beside(place).name == "chat"
    card = (place / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "org/base"
    assert metadata["pipeline_tag"] == "text-generation"
    assert len(metadata["datasets"]) >= 2
    lines = card.splitlines()
    assert "| `ag_news` | topic | 75.0% | " in card
    assert any(line.startswith("| `sst2` | sentiment | held out |") for line in lines)
    assert "| `sst2` (held out) | accuracy | 50.0 | 62.5 |" in lines
    assert "| `trec` | accuracy | – | – |" in lines
    assert "1,200 examples with 3,456 tokens of answers." in card
    assert "Where the training's time went: goodput 80.0%, 1 fault; of 100 s: steps 80.0%, lost steps 20.0%." in card
    assert "on 8 validation rows: the log-probabilities of 123 tokens differ by 3.1e-03 nats in the mean" in card
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown["tuning"] == {"rank": 4}
    assert "storage" not in shown
    assert shown["model"]["base"] == tiny_model.name
    assert not any(str(place) in card for place in (tmp_path, tiny_model))
    assert "The base model's licence is that of org/base" in card


def test_a_card_of_tasks_whose_files_are_gone(tmp_path: Path, tiny_model: Path) -> None:
    write_tasks(tmp_path)
    run = open_run(load_recipe(tiny_recipe(tmp_path, tiny_model, data__tasks=["./sums.yaml", "sst2"], data__hold_out=[])))
    recipe = run.recipe()
    shutil.copytree(tiny_model, run.model.local)
    make_contract(recipe, layout_of(recipe, Tokenizer(run.model.local)), run.model.local).write(run.model.local)
    (tmp_path / "sums.yaml").unlink()
    load_task.cache_clear()
    pipeline.export_run("tiny", str(tmp_path / "out"), storage=str(tmp_path / "runs"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `sums` | numbers | unknown | unknown |" in card
    assert "base_model" not in card.split("---")[1]  # a folder of this machine, which a hub refuses
    assert not any(str(place) in card for place in (tmp_path, tiny_model))


def test_what_was_not_evaluated_says_so(run: Run, tmp_path: Path) -> None:
    pipeline.export_run(str(run.folder), str(tmp_path / "out"))
    assert "## Scores\n\nNot evaluated." in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported(run: Run, tmp_path: Path) -> None:
    storage = str(tmp_path / "runs")
    with pytest.raises(RunError, match="'none' is not a run in"):
        pipeline.export_run("none", str(tmp_path / "out"), storage=storage)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(StorageError, match="is there already and not empty; name a new folder"):
        pipeline.export_run("tiny", str(tmp_path / "full"), storage=storage)
    weights = run.model.local / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ContractError, match="are not those its contract was written for"):
        pipeline.export_run("tiny", str(tmp_path / "out"), storage=storage)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "recipe.yaml", "runs"]  # nothing half-written
    (run.model / "apprentice.json").delete()
    with pytest.raises(RunError, match="has no trained model yet; train it first"):
        pipeline.export_run("tiny", str(tmp_path / "out"), storage=storage)


def test_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["apprentice", "export", "tiny", str(tmp_path / "out"), "--storage", str(tmp_path / "runs"), "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "out")
