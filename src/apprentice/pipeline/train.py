"""Fine-tuning of a run, its progress lines, and the list of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from apprentice.errors import RunError
from apprentice.pipeline.prepare import Progress, open_for_writing
from apprentice.recipe import Recipe
from apprentice.run.folder import Run, find_run
from apprentice.run.json_lines import read_records
from apprentice.run.time_ledger import TimeLedger
from apprentice.storage import Folder


def train_run(
    recipe: Recipe, *, restart: bool = False, progress: Progress, record: Callable[[Mapping[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Fine-tunes, or resumes a run that stopped; returns the run folder and the last metrics.

    `already` is true in the result if the run was trained before this call. `record` is called with each record of the training
    loop (`apprentice.train.distributed.driver.train`).
    """
    from apprentice.evaluate.online import prepare_online_evaluation
    from apprentice.train.distributed import driver as launch

    def show(values: Mapping[str, Any]) -> None:
        if record is not None:
            record(values)
        progress("train", _step_line(values))

    with open_for_writing(recipe, "train", restart=restart, progress=progress) as (run, corpus):
        if run.is_trained:
            return {"run": str(run.folder), "already": True, **_status(run)}
        score = prepare_online_evaluation(corpus) if recipe.evaluation.while_training else None
        result = launch.train(recipe, run, corpus, progress=show, score=score)
        run.update_status(state="trained")
        facts = {"goodput": _time(run).goodput, "warnings": run.ledger_file.read_json()["warnings"]}
        return {"run": str(run.folder), "already": False, **asdict(result), **facts}


def _step_line(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values to show of one record of the training loop."""
    if "message" in values:
        return {"message": values["message"], "done": True}
    if "samples" in values:
        shown = [f"\n            {sample['instruction']}\n            → {sample['reply']}" for sample in values["samples"]]
        return {"step": f"{values['step']}/{values['steps']}", "message": f"replies{''.join(shown)}", "done": True}
    if figures := {name: values[name] for name in ("validation_loss", "held_out") if name in values}:
        return {"step": f"{values['step']}/{values['steps']}", **figures, "done": True}
    return {
        "step": f"{values['step']}/{values['steps']}",
        "loss": values["loss"],
        "smoothed_loss": values["smoothed_loss"],
        **{name: values[name] for name in ("accuracy", "margin", "reward", "kl", "reply_tokens") if name in values},
        "learning_rate": values["learning_rate"],
        "grad_norm": values["grad_norm"],
        "tokens_per_s": values["tokens_per_s"],
        "tokens_per_s_worker": values["tokens_per_s_worker"] if values["workers"] > 1 else None,
        "mfu_share": values.get("mfu"),
        "waiting_for_data_share": values["data_wait"],
        "mixture_drift_share": values["ledger_drift"],
        "eta_s": values["eta_s"],
        "restarts": values["attempt"] - 1 or None,
        "done": values["step"] == values["steps"],
    }


def training_sentence(result: Mapping[str, Any]) -> str:
    """The result of `train` in one sentence, with its warnings below."""
    if result["already"]:
        return "this run is trained already; --restart trains it anew"
    return (
        f"{result['steps']} steps, loss {result['loss']:.3f}, validation loss {format_loss(result['validation_loss'])},"
        f" {result['tokens_per_s']:.0f} tokens/s, waited for data {result['wait_share']:.1%} of the time"
        + _memory(result.get("peak_memory"), result.get("expected_memory"))
        + f", goodput {result['goodput']:.1%}"
        + "".join(f"\nwarning: {line}" for line in result["warnings"])
    )


def stopped_sentence(recipe: Recipe) -> str:
    """One sentence on the step at which Ctrl-C stopped the run of `recipe`, and the checkpoint from which it resumes."""
    from apprentice.train.checkpoint import format as checkpoint

    run = Run(Folder.at(recipe.storage) / recipe.name)
    steps = [record["step"] for record in read_records(run.folder / "steps.jsonl") if "loss" in record]
    if not steps:
        return "stopped by Ctrl-C before the first step; the same command begins the run, or goes on with it."
    saved = checkpoint.find_newest_step(run.checkpoints)
    again = (
        f"the newest checkpoint is that of step {saved}, from which" if saved else "no checkpoint was made, so from the beginning"
    )
    where = f"after step {steps[-1]} of {run.status().get('steps', '?')}"
    return f"stopped by Ctrl-C {where}; {again} the same command goes on: {run.folder}"


def _memory(peak: int | None, expected: int | None) -> str:
    return (
        "" if peak is None or expected is None else f", at most {peak / 2**30:.1f} GiB a worker ({expected / 2**30:.1f} expected)"
    )


def format_loss(value: float | None) -> str:
    """A loss as text; `none` if there were no rows to compute it on."""
    return "none" if value is None else f"{value:.3f}"


def list_runs(storage: str) -> list[dict[str, Any]]:
    """Name, state and latest metrics of every run in `storage`."""
    listed = [Run(folder) for folder in Folder.at(storage).children() if (folder / "identity.json").exists()]
    return [{"name": run.name, "state": "prepared"} | _status(run) for run in listed]


def describe_run(name: str, storage: str) -> dict[str, Any]:
    """What status.json says of a run, and in `sentence` where its time went. Raises `RunError` if there is no such run."""
    run = find_run(name, storage)
    if run is None:
        raise RunError(f"{name!r} is not a run in {storage}; `apprentice runs` lists them.")
    described = {"name": run.name, "run": str(run.folder), "state": "prepared"} | _status(run)
    return described | {"goodput": _time(run).goodput, "sentence": _time(run).describe()}


def _time(run: Run) -> TimeLedger:
    """The run's ledger of time; an empty one for a run that has none."""
    return TimeLedger.from_status(run.status()) or TimeLedger()


def _status(run: Run) -> dict[str, Any]:
    """The run's status; for a trained run with the validation loss of the exported model, not of the last validation."""
    status = run.status()
    return status | {key: status["training"][key] for key in ("validation_loss",) if key in status.get("training", {})}
