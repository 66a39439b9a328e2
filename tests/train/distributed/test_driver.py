"""Training under Ray Train end to end, with two workers: undisturbed, with a worker killed, stopped and taken up again, failing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.data.stream import make_corpus, render_window
from apprentice.errors import DataError, ResourcesError, TrainingError
from apprentice.evaluate.online import prepare_online_evaluation
from apprentice.models.loading import load_model
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.folder import Run, open_run
from apprentice.run.time_ledger import TimeLedger
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.distributed import driver as launch
from apprentice.train.distributed.mailbox import RunOutcome
from apprentice.train.memory.estimate import PROCESS_BYTES
from tests.support.recipes import tiny_recipe

STEPS = 8
SHARDED = {"stage": 3, "extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}  # else small weights stay whole
EVERY = 3  # checkpoints after steps 3, 6 and 8
DIES_BEFORE = 6  # two steps after the checkpoint at 3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def recipe(folder: Path, model: Path, **values: Any) -> Recipe:
    chosen = {"training__steps": STEPS, "training__checkpoint": {"every_steps": EVERY, "keep": 3}, "training__max_failures": 2}
    return load_recipe(tiny_recipe(folder, model, **(chosen | values)))


def trained(made: Recipe) -> tuple[launch.TrainResult, Run, list[dict[str, Any]]]:
    """The result, the run, and what `progress` saw. The run's ledger of time holds all the time."""
    run = open_run(made)
    seen: list[dict[str, Any]] = []
    corpus, earlier, began = make_corpus(made, run), time_of(run), time.time()
    result = launch.train(made, run, corpus, progress=seen.append)
    wall = time.time() - began if earlier.at == 0 else sum(earlier.seconds.values()) + time.time() - earlier.at
    assert sum(time_of(run).seconds.values()) == pytest.approx(wall, rel=0.01, abs=0.5)
    return result, run, seen


def time_of(run: Run) -> TimeLedger:
    return TimeLedger.from_status(run.status()) or TimeLedger()


def steps_of(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder / "steps.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def dying(marker: Path, before: int, *, by: int = signal.SIGKILL, again: bool = False) -> Callable[[launch.WorkerJob], None]:
    """A worker function whose second worker gets the signal `by` before it takes the rows of step `before`: once, or each time."""

    def work(job: Any) -> None:
        import ray.train

        from apprentice.train import worker as training_worker
        from apprentice.train.distributed import ray_worker

        inner = training_worker.run_worker

        def run_worker(config: Any, restored: Any, rows: Any, *rest: Any, **more: Any) -> Any:
            def watched() -> Any:
                step = restored.state.step if restored else 0
                for batch in rows:
                    step += 1
                    if step == before and ray.train.get_context().get_world_rank() == 1 and (again or not marker.exists()):
                        marker.touch()
                        os.kill(os.getpid(), by)
                    yield batch

            return inner(config, restored, watched(), *rest, **more)

        training_worker.run_worker = run_worker
        ray_worker.work(job)

    return work


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, ray_cluster: None) -> Any:
    return trained(recipe(tmp_path_factory.mktemp("undisturbed"), tiny_model))


def test_a_whole_run(undisturbed: Any, tiny_model: Path) -> None:
    result, run, seen = undisturbed
    steps = steps_of(run)
    assert (result.steps, result.restarts, len(steps)) == (STEPS, 0, STEPS)
    assert result.tokens == sum(step["tokens"] for step in steps) > 0
    assert result.tokens_per_s > 0
    assert result.peak_memory is not None
    assert result.expected_memory is not None
    assert 2**28 < result.peak_memory < 2**33
    assert PROCESS_BYTES < result.expected_memory < 2**31
    assert 0.0 <= result.wait_share <= 1.0
    assert [record["step"] for record in seen if "validation_loss" in record] == [3, 6, 8]
    figures = next(record for record in seen if "loss" in record)
    assert {"step", "steps", "loss", "learning_rate", "grad_norm", "tokens_per_s", "data_wait", "eta_s"} <= figures.keys()
    assert [folder.name for folder in run.checkpoints.children() if folder.name.startswith("step-")] == [
        "step-000003.2",
        "step-000006.2",
        "step-000008.2",
    ]
    assert run.status()["state"] == "trained"
    assert len(list(run.events.local.iterdir())) == 1
    seconds, made = time_of(run).seconds, sum(step["seconds"] - step["data_wait_s"] for step in steps)
    assert seconds["steps"] == pytest.approx(made, abs=0.05 * STEPS)  # records take milliseconds to the driver's node
    assert all(seconds[kind] > 0 for kind in ("steps", "data", "checkpoints", "validation", "starting"))
    assert seconds["lost_steps"] == seconds["down"] == seconds["stopped"] == time_of(run).faults == 0
    assert steps[-1]["goodput"] > time_of(run).goodput > 0  # which counts the export too
    tuned = AutoModelForCausalLM.from_pretrained(run.model.local).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert any(not torch.equal(tuned[name], base[name]) for name in base)
    assert layout_beside(run.model.local).name == "chat"
    assert (run.adapter / "adapter_model.safetensors").exists()


def test_workers_that_share_rows_train_as_those_with_rows_of_their_own(undisturbed: Any, tmp_path: Path, tiny_model: Path) -> None:
    """Step by step, from the stream to the exported model: `training.sequence_parallel`."""
    _, alone, seen_alone = undisturbed
    _, shared, seen = trained(recipe(tmp_path, tiny_model, training__sequence_parallel=2))
    for key in ("step", "examples", "tokens", "target_tokens"):
        assert [step[key] for step in steps_of(shared)] == [step[key] for step in steps_of(alone)]
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in steps_of(shared)] == pytest.approx([step[key] for step in steps_of(alone)], rel=1e-4)
    losses, losses_alone = (
        [record["validation_loss"] for record in records if "validation_loss" in record] for records in (seen, seen_alone)
    )
    assert losses == pytest.approx(losses_alone, rel=1e-4)
    assert len(losses) == 3
    weights, weights_alone = (AutoModelForCausalLM.from_pretrained(run.model.local).state_dict() for run in (shared, alone))
    for name, weight in weights_alone.items():
        assert (weights[name] - weight).norm() <= 1e-4 * weight.norm()


def test_checkpoints_are_validated_aside_while_training_goes_on(undisturbed: Any, tmp_path: Path, tiny_model: Path) -> None:
    """The same losses as the workers', the held-out tasks' scores, and what a stop left undone is made up for."""
    _, _, within = undisturbed
    aside = {"every_steps": EVERY, "keep": 1, "validation": "aside"}
    made = recipe(tmp_path, tiny_model, training__workers=1, training__checkpoint=aside, evaluation__while_training=2)
    run = open_run(made)
    corpus = make_corpus(made, run)
    seen: list[dict[str, Any]] = []
    score = prepare_online_evaluation(corpus)
    result = launch.train(made, run, corpus, progress=seen.append, score=score)
    expected, validation_losses = (
        {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
        for records in (within, seen)
    )
    assert validation_losses == {step: pytest.approx(loss, rel=1e-4) for step, loss in expected.items()}
    assert set(validation_losses) == {3, 6, 8}
    scored = {record["step"]: record["held_out_tasks"] for record in seen if "held_out" in record}
    assert set(scored) == {3, 6, 8}
    assert set(scored[8]) == {question["task"] for question in score.questions}
    assert result.validation_loss == min(validation_losses.values())
    assert run.status()["validation_loss"] == result.validation_loss  # of the model that was exported

    newest = checkpoints.find_named(run.checkpoints, "step-000008.2")
    assert newest is not None
    (newest.folder / checkpoints.VALIDATION).delete()
    shutil.rmtree(run.model.local)
    again: list[dict[str, Any]] = []
    second = launch.train(made, run, corpus, progress=again.append)
    assert [record["validation_loss"] for record in again if "validation_loss" in record] == [validation_losses[8]]
    assert (second.validation_loss, run.is_trained) == (result.validation_loss, True)


@pytest.mark.parametrize(("name", "method"), [("t5", "lora")])
def test_other_families_and_methods(name: str, method: str, tmp_path: Path, tiny_model: Path) -> None:
    """Packed T5 from rows to the exported model."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*config.json", "*.safetensors"))
    shutil.copy(tiny_model / "tokenizer_config.json", folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        long = {"vocab_size": 512, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2}
        made = architectures(name, **long)
    made.save_pretrained(folder)
    chosen: dict[str, Any] = {"training__workers": 1, "training__steps": 3, "data__layout": "plain"}
    chosen |= {"tuning": {"method": method, "rank": 4, "virtual_tokens": 4, "width": 8}}
    result, run, seen = trained(recipe(tmp_path, folder, **chosen))
    assert result.steps == 3
    losses = [step["loss"] for step in steps_of(run)]
    assert len(losses) == 3
    assert all(0 < loss < 50 for loss in losses)
    message = next(record["message"] for record in seen if "message" in record)
    facts = r"[\d,]+ numbers trained, \d+\.\d\d% of all; float32, attention t5_segments, \d+ rows? at once"
    assert re.match(f"{method}: {facts}", message)
    exported = load_model(run.model.local, torch.float32)
    assert (run.model / "adapter").exists() == (method != "lora")
    assert exported.config.is_encoder_decoder == (name != "llama")


def architectures(name: str, **sizes: Any) -> Any:
    config = {"t5": T5Config, "bart": BartConfig, "llama": LlamaConfig}[name]
    model = {"t5": T5ForConditionalGeneration, "bart": BartForConditionalGeneration, "llama": LlamaForCausalLM}[name]
    small: dict[str, Any] = {
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        "bart": {
            "d_model": 32,
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
            "decoder_start_token_id": 2,
        },
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    }[name]
    return model(config(**(small | sizes)))


def test_steps_are_stretches_of_the_plan(undisturbed: Any) -> None:
    """The workers' rows, put together, are the windows' rows in order."""
    _, run, _ = undisturbed
    made = run.recipe()
    corpus = make_corpus(made, run)
    rows = [ids for window in range(3) for ids in render_window(corpus, window)["examples"]]
    expected = [
        [int(position) for row in rows[start : start + made.training.global_batch] for position in row]
        for start in range(0, STEPS * made.training.global_batch, made.training.global_batch)
    ]
    assert [step["examples"] for step in steps_of(run)] == expected
    assert all(expected)


def test_ledger(undisturbed: Any) -> None:
    _, run, _ = undisturbed
    ledger = run.ledger_file.read_json()
    assert ledger["examples"] == sum(len(step["examples"]) for step in steps_of(run))
    assert ledger["target_tokens"] == sum(step["target_tokens"] for step in steps_of(run))
    assert "headline_topics" not in ledger["tasks"]  # held out
    assert len(ledger["tasks"]) >= 8
    assert sum(task["share_of_examples"] for task in ledger["tasks"].values()) == pytest.approx(1.0, abs=1e-4)


def test_a_finished_run_is_not_trained_again(undisturbed: Any) -> None:
    result, run, _ = undisturbed
    again = launch.train(run.recipe(), run, make_corpus(run.recipe(), run), progress=lambda _: pytest.fail("no step is left"))
    assert (again.steps, again.loss, again.restarts) == (STEPS, result.loss, 0)


def test_a_killed_worker(undisturbed: Any, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "work", dying(tmp_path / "died", DIES_BEFORE))
    result, run, _ = trained(recipe(tmp_path, tiny_model))
    assert (tmp_path / "died").exists()
    assert result.restarts == 1
    steps = steps_of(run)
    first, second = ([step for step in steps if step["attempt"] == attempt] for attempt in (1, 2))
    assert len(first) + len(second) == len(steps)
    assert [step["step"] for step in first] == [1, 2, 3, 4, 5]
    assert [step["step"] for step in second] == [4, 5, 6, 7, 8]
    expected = {step["step"]: step for step in steps_of(undisturbed[1])}
    for step in steps:
        assert step["examples"] == expected[step["step"]]["examples"] != []
        assert step["loss"] == pytest.approx(expected[step["step"]]["loss"], rel=1e-5)
    assert result.loss == pytest.approx(undisturbed[0].loss, rel=1e-5)
    assert run.ledger_file.read_json() == undisturbed[1].ledger_file.read_json()
    lost = sum(step["seconds"] - step["data_wait_s"] for step in first[3:])  # steps 4 and 5 are made again
    assert time_of(run).seconds["lost_steps"] >= lost - 0.1
    assert (time_of(run).faults, time_of(run).seconds["down"]) == (1, 0)


def test_a_silent_worker_is_named_and_its_run_goes_on_with_other_workers(
    undisturbed: Any, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(launch, "work", dying(tmp_path / "died", DIES_BEFORE, by=signal.SIGSTOP, again=True))
        with pytest.raises(
            TrainingError,
            match=r"^worker 1 \(process \d+ on [\d.]+\) had not answered for 15 seconds and was ended; the run had been"
            r" started once; .* goes on from the newest checkpoint",
        ):
            trained(recipe(tmp_path, tiny_model, training__max_failures=0, training__hang_timeout_s=15))
    result, run, _ = trained(recipe(tmp_path, tiny_model, training__workers=1, training__deepspeed=SHARDED))
    assert time_of(run).faults == 1
    assert time_of(run).seconds["down"] > 0 == time_of(run).seconds["stopped"]
    steps = steps_of(run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    expected = {step["step"]: step for step in steps_of(undisturbed[1])}
    for step in steps:
        assert step["examples"] == expected[step["step"]]["examples"] != []
        assert step["loss"] == pytest.approx(expected[step["step"]]["loss"], rel=1e-5)
    assert result.loss == pytest.approx(undisturbed[0].loss, rel=1e-5)


def test_a_dead_worker_in_a_sentence() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3345")
    assert str(launch._error_to_raise(gone, RunOutcome(3, None, []))).startswith(
        "a worker died, and the run had been started 3 times; look"
    )
    named = launch._error_to_raise(gone, RunOutcome(1, None, ["worker 1 (process 7 on 10.0.0.2) had not answered"]))
    assert str(named).startswith("worker 1 (process 7 on 10.0.0.2) had not answered; the run had been started once; look")


def test_a_loss_that_is_no_number(tmp_path: Path, tiny_model: Path) -> None:
    made = recipe(tmp_path, tiny_model, training__optimizer={"learning_rate": 1e30, "clip": 0.0}, tuning={"method": "full"})
    run = open_run(made)
    with pytest.raises(TrainingError, match=r"^step \d: the loss or its gradient is not a number") as caught:
        launch.train(made, run, make_corpus(made, run), progress=lambda _: None)
    assert type(caught.value) is TrainingError
    assert run.status()["state"] == "failed"
    assert not run.is_trained


def test_too_few_cpus_do_not_hang(tmp_path: Path, tiny_model: Path) -> None:
    made = recipe(tmp_path, tiny_model, training__workers=4)
    run = open_run(made)
    with pytest.raises(ResourcesError, match="4 workers of 1 CPUs each, and 2 more CPUs for the data; the cluster has 4 CPUs"):
        launch.train(made, run, make_corpus(made, run), progress=lambda _: None)


def test_a_source_that_vanishes(tmp_path: Path, tiny_model: Path) -> None:
    """An error of ours inside a data actor arrives as itself, and is not tried again `max_failures` times."""
    made = recipe(tmp_path, tiny_model, data__validation=0.0)
    run = open_run(made)
    corpus = make_corpus(made, run)
    files = list((tmp_path / "runs" / "cache").rglob("*.parquet"))
    assert files
    for file in files:
        file.unlink()
    seen: list[dict[str, Any]] = []
    with pytest.raises(DataError, match=r"parquet") as caught:
        launch.train(made, run, corpus, progress=seen.append)
    assert [record for record in seen if "loss" in record] == []
    assert type(caught.value) is DataError
