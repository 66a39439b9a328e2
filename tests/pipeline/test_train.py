"""What the command line says of training: where Ctrl-C stopped it, and what a run's one score is the mean of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apprentice import pipeline
from apprentice.cli import app
from apprentice.errors import RunError
from apprentice.pipeline.evaluate import list_score_metrics
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run
from apprentice.run.time_ledger import TimeLedger
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoint
from tests.support.recipes import tiny_recipe


def trained_so_far(run: Run, steps: int, saved: int) -> None:
    """What lies in a run after `steps` steps, with a checkpoint of step `saved`."""
    records = [{"step": step, "loss": 1.0} for step in range(1, steps + 1)]
    run.folder.make()
    (run.folder / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9')
    run.update_status(state="training", steps=60, step=steps)
    if saved:
        (run.checkpoints / f"step-{saved}" / checkpoint.CHECKSUMS).write_text("{}")


@pytest.mark.parametrize(
    ("steps", "saved", "said"),
    [
        (0, 0, "stopped by Ctrl-C before the first step; the same command begins the run, or goes on with it."),
        (7, 0, "stopped by Ctrl-C after step 7 of 60; no checkpoint was made, so from the beginning the same command goes on: "),
        (
            7,
            4,
            "stopped by Ctrl-C after step 7 of 60; the newest checkpoint is that of step 4, from which the same command goes on: ",
        ),
    ],
)
def test_ctrl_c_tells_where_it_stopped(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, steps: int, saved: int, said: str
) -> None:
    file = tiny_recipe(tmp_path, tiny_model)
    recipe = load_recipe(file)
    run = Run(Folder.at(recipe.storage) / recipe.name)

    def stopped(*_: Any, **__: Any) -> Any:
        if steps:
            trained_so_far(run, steps, saved)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_run", stopped)
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 1
    assert said in done.stderr
    assert not steps or str(run.folder) in done.stderr


def test_a_score_is_shown_with_the_metrics_that_it_is_the_mean_of(tmp_path: Path) -> None:
    columns = [{"key": "base@0", "subject": "base"}, {"key": "tuned@0", "subject": "tuned"}, {"key": "tuned@2", "subject": "tuned"}]
    scores = [("rouge_l", 30.0), ("accuracy", 80.0), ("exact_match", 40.0), ("accuracy", 90.0), ("bleu", None)]
    tasks = [{"metric": metric, "columns": {"tuned@0": {"score": score}}} for metric, score in scores]
    tasks.append({"metric": "chrf", "columns": {"base@0": {"score": 5.0}}})
    metrics = list_score_metrics({"columns": columns, "tasks": tasks})
    assert metrics == ["accuracy", "rouge_l", "exact_match"]
    for name, more in (("new", {"score_metrics": metrics}), ("old", {})):
        run = Run(Folder.at(tmp_path) / name)
        (run.folder / "identity.json").write_json({"keys": {}})
        run.update_status(state="trained", score=60.0, **more)
    shown = CliRunner().invoke(app, ["runs", "--storage", str(tmp_path)]).stdout
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "60 (accuracy, rouge_l, exact_match)" in lines["new"]
    assert "60 (" not in lines["old"]


def test_a_run_is_shown_with_the_time_it_took(tmp_path: Path) -> None:
    run = Run(Folder.at(tmp_path / "kite").make())
    (run.folder / "identity.json").write_text("{}")
    ledger = TimeLedger(seconds={"steps": 90.0, "starting": 10.0}, faults=1)
    run.update_status(state="training", step=7, steps=60, loss=1.25, time=asdict(ledger))
    arguments = ["runs", "kite", "--storage", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "name kite, state training, step 7, loss 1.25" in result.stdout
    assert "goodput 90.0%, 1 fault; of 100 s: steps 90.0%, starting 10.0%" in result.stdout
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (values["goodput"], values["time"]["faults"]) == (0.9, 1)
    with pytest.raises(RunError, match=r"'gull' is not a run in .*; `apprentice runs` lists them"):
        pipeline.describe_run("gull", str(tmp_path))
