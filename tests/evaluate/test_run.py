"""A whole evaluation through Ray Data, with tiny models; its answers are those that the models give in this process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_contract import make_contract
from apprentice.errors import DataError, EvaluationError
from apprentice.evaluate import run as evaluate_run
from apprentice.evaluate.report import predictions
from apprentice.evaluate.run import Subject, _make_scorers, _requests, evaluate
from apprentice.evaluate.scoring.endpoint import EndpointAddress
from apprentice.evaluate.stats.summary import summarise
from apprentice.inference.choices.choice_scoring import choice_logprobs
from apprentice.model_pool import actors
from apprentice.model_pool.pool import FreeResources
from apprentice.models.loading import load_model
from apprentice.models.reward import choice_rewards
from apprentice.recipe import Model, Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, recipe: Recipe, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights and a prompt contract of its own."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model: Any = load_model(tiny_model, torch.float32)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    make_contract(recipe, corpus.layout, folder).write(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(
    ray_cluster: None, recipe: Recipe, corpus: Corpus, tiny_model: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, Records]:
    """Report, folder and the records of predictions."""
    out = tmp_path_factory.mktemp("report")
    run = Run(Folder.at(recipe.storage) / recipe.name)
    (run.folder / "steps.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    progress: list[dict[str, Any]] = []
    subjects = [Subject("base", tiny_model, (0, 2)), Subject("tuned", tuned, (0,))]
    report = evaluate(recipe, corpus, subjects, Folder.at(out), run=run, progress=progress.append).as_json()
    assert progress[-1] == {"message": report["summary"]["sentence"], "done": True}
    assert [(subject["dtype"], len(subject["weights_sha256"])) for subject in report["subjects"]] == [("float32", 64)] * 2
    assert any(
        line["message"] == "base: 80 of 80 questions" for line in progress
    )  # 4 tasks, 5 rows, 2 wordings, 2 numbers of exemplars
    return report, out, predictions.read(Folder.at(out)).to_pylist()


@pytest.mark.parametrize(
    ("number_format", "gpus", "nodes", "computed"),
    [
        ("auto", 1, {}, "bfloat16"),  # whatever the driver's own hardware is
        ("auto", 0, {"a": True, "b": True}, "bfloat16"),
        ("auto", 0, {"a": True, "b": False}, "float32"),  # all workers alike
        ("float32", 1, {}, "float32"),
        ("float16", 0, {"a": False, "b": False}, "float16"),
    ],
)
def test_the_number_format_is_that_of_the_workers(
    number_format: str, gpus: int, nodes: dict[str, bool], computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "call_on_every_node", lambda question: nodes)
    model = Model.model_validate({"base": "m", "dtype": number_format})
    assert actors.resolve_model_dtype(model, FreeResources(4, 4, gpus, 1 << 34)).dtype == computed


def of(records: Records, subject: str, shots: int) -> Records:
    return [record for record in records if (record["subject"], record["shots"]) == (subject, shots)]


@pytest.mark.slow
def test_every_subject_meets_the_same_questions(evaluated: tuple[dict[str, Any], Path, Records]) -> None:
    records = evaluated[2]
    questions = {
        (name, shots): sorted((record["task"], record["row"], record["template"]) for record in of(records, name, shots))
        for name, shots in (("base", 0), ("base", 2), ("tuned", 0))
    }
    assert len(questions["base", 0]) == 40
    assert questions["base", 0] == questions["tuned", 0] == questions["base", 2]
    prompts = [[record["prompt"] for record in of(records, name, 0)] for name in ("base", "tuned")]
    assert prompts[0] == prompts[1]


@pytest.mark.slow
def test_answers_are_those_of_the_model_alone(evaluated: tuple[dict[str, Any], Path, Records], corpus: Corpus, tuned: Path) -> None:
    model: Any = load_model(tuned, torch.float32)
    layout = corpus.layout
    ranked = generated = 0
    for record in of(evaluated[2], "tuned", 0):
        prompt = layout.tokenizer.encode(record["prompt"])
        if record["choices"]:
            ids = [[*layout.tokenizer.encode(choice), *layout.end_ids] for choice in record["choices"]]
            [sums] = choice_logprobs(model, [prompt], [ids])
            np.testing.assert_allclose(record["choice_logprobs"], sums, atol=1e-3)
            assert record["prediction"] == record["choices"][int(np.argmax(sums))]
            ranked += 1
        else:
            with torch.inference_mode():
                whole = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt)),
                    max_new_tokens=6,
                    do_sample=False,
                    eos_token_id=list(layout.stop_ids),
                )
            assert record["prediction"] == layout.tokenizer.decode(whole[0, len(prompt) :].tolist()).strip()
            generated += 1
    assert (ranked, generated) == (20, 20)


@pytest.mark.slow
def test_the_report_is_that_of_its_predictions(evaluated: tuple[dict[str, Any], Path, Records]) -> None:
    report, out, records = evaluated
    assert summarise(predictions.read(Folder.at(out))).as_json() == report
    assert json.loads((out / "report.json").read_text()) == report
    assert {path.name for path in out.iterdir()} - {"parts"} == {"report.json", "report.md", "report.html", "predictions.parquet"}
    assert [column["key"] for column in report["columns"]] == ["majority@0", "base@0", "base@2", "tuned@0"]
    assert (report["tasks"][0]["task"], report["tasks"][0]["held_out"]) == ("short_reviews", True)
    assert report["subjects"][0]["contract"] == "the recipe's"
    assert report["subjects"][1]["contract"] == "its own"
    assert {record["task"] for record in records if record["subject"] == "majority"} >= {"short_reviews", "same_meaning"}
    assert (out / "report.html").read_text().count("<svg") == 3  # wordings, exemplars, the run's training curve
    few = report["tasks"][0]["columns"]["base@2"]
    assert few["exemplars"] == 2.0


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_sentence(
    ray_cluster: None, recipe: Recipe, corpus: Corpus, tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").unlink()
    one = replace(corpus, tasks=tuple(task for task in corpus.tasks if task.name == "same_meaning"))
    with pytest.raises(EvaluationError, match=r"^broken: .* cannot be loaded as a causal language model: .*") as caught:
        evaluate(recipe, one, [Subject("broken", broken)], Folder.at(tmp_path / "out"), progress=lambda values: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_that_cannot_be_read_are_one_sentence(
    ray_cluster: None, recipe: Recipe, corpus: Corpus, tiny_model: Path, tmp_path: Path
) -> None:
    index = corpus.indices["same_meaning"]
    assert index.test_source is not None
    lost = replace(index, test_source=replace(index.test_source, files=(str(tmp_path / "lost.parquet"),)))
    one = replace(corpus, tasks=tuple(task for task in corpus.tasks if task.name == "same_meaning"), indices={"same_meaning": lost})
    with pytest.raises(DataError, match=r"lost\.parquet") as caught:
        evaluate(recipe, one, [Subject("base", tiny_model)], Folder.at(tmp_path / "out"), progress=lambda values: None)
    assert "\n" not in str(caught.value)


def test_nothing_to_score_is_said(recipe: Recipe, corpus: Corpus, tiny_model: Path, tmp_path: Path) -> None:
    indices = {name: replace(index, test_source=None) for name, index in corpus.indices.items()}
    with pytest.raises(EvaluationError, match="none of the recipe's tasks has test rows"):
        evaluate(
            recipe,
            replace(corpus, indices=indices),
            [Subject("base", tiny_model)],
            Folder.at(tmp_path),
            progress=lambda values: None,
        )


def test_a_task_without_test_rows_is_listed_and_the_rest_is_scored(recipe: Recipe, corpus: Corpus, tiny_model: Path) -> None:
    index = corpus.indices["same_meaning"]
    few = replace(corpus.indices["written_dates"], train=np.array([1, 2]))
    empty = replace(corpus.indices["passage_questions"], test=np.array([], dtype=np.int64))
    changed = {"same_meaning": replace(index, test_source=None), "written_dates": few, "passage_questions": empty}
    subjects = [Subject("base", tiny_model, (0, 2))]
    requests, not_scored = _requests(recipe, replace(corpus, indices={**corpus.indices, **changed}), subjects)
    assert not_scored == [
        {"task": "same_meaning", "reason": "no test split"},
        {"task": "passage_questions", "reason": "no test rows"},
        {"task": "written_dates", "reason": "too few training rows for 2 exemplars"},
    ]
    assert {(request.task, request.shots) for request in requests} == {
        ("short_reviews", 0),
        ("short_reviews", 2),
        ("written_dates", 0),
    }


@pytest.mark.parametrize("names", [[], ["a", "a"], ["majority"]])
def test_subjects_need_names_of_their_own(
    recipe: Recipe, corpus: Corpus, tiny_model: Path, tmp_path: Path, names: list[str]
) -> None:
    with pytest.raises(EvaluationError, match="a name of its own"):
        evaluate(recipe, corpus, [Subject(name, tiny_model) for name in names], Folder.at(tmp_path), progress=lambda values: None)


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(
    ray_cluster: None,
    recipe: Recipe,
    corpus: Corpus,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stops after the first block; the second attempt asks for the rest only, and the report is that of one go."""
    one = replace(corpus, tasks=tuple(task for task in corpus.tasks if task.name in ("same_meaning", "written_dates")))
    subjects = [Subject("base", tiny_model)]
    out = Folder.at(tmp_path / "out")
    whole = evaluate(recipe, one, subjects, Folder.at(tmp_path / "whole"), progress=lambda values: None)

    def stop(values: dict[str, Any]) -> None:
        if "eta_s" in values:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, one, subjects, out, progress=stop)
    assert [part.name for part in (out / "parts").children()] == ["000001.parquet"]
    messages: list[str] = []
    report = evaluate(recipe, one, subjects, out, progress=lambda values: messages.append(values["message"]))
    assert messages[1] == "base: 10 of 20 answers were there already"
    assert [task.columns for task in report.tasks] == [task.columns for task in whole.tasks]
    assert not (out / "parts").exists()

    def refused(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("apprentice.evaluate.scoring.subject_scorer.map_tables", refused)
    other = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"rank_by": "mean"})})
    again = evaluate(other, one, subjects, out, progress=lambda values: None)
    assert again.ranking.by == "mean"


@pytest.mark.slow
def test_a_reward_model_judges_what_was_written(
    evaluated: tuple[dict[str, Any], Path, Records], recipe: Recipe, corpus: Corpus, tiny_model: Path, tuned: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(tiny_model, judge)
    (judge / "model.safetensors").unlink()
    rewarding: Any = load_model(tiny_model, torch.float32, head=3)
    rewarding.save_pretrained(judge)
    judging = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"judge": str(judge)})})
    subjects = [Subject("base", tiny_model, (0, 2)), Subject("tuned", tuned, (0,))]
    settings: dict[str, Any] = {"known": [Folder.at(evaluated[1])], "progress": lambda values: None}
    report = evaluate(judging, corpus, subjects, Folder.at(tmp_path / "out"), **settings)
    assert report.judged is not None
    lines = {line.held_out: line for line in report.judged.lines}
    assert lines[False].questions == sum(not record["choices"] for record in of(evaluated[2], "tuned", 0))
    records = predictions.read(Folder.at(tmp_path / "out")).to_pylist()
    assert all((record["reward"] is None) is bool(record["choices"]) for record in records if record["subject"] != "majority")
    layout, compared = corpus.layout, 0
    models: list[Any] = [load_model(folder, torch.float32) for folder in (tuned, tiny_model)]
    for record in of(records, "tuned", 0):
        if record["choices"]:
            continue
        prompt, ids = layout.tokenizer.encode(record["prompt"]), layout.tokenizer.encode(record["prediction"])
        [[reward]] = choice_rewards(rewarding, [prompt], [[[*ids, *layout.end_ids]]])
        assert record["reward"] == pytest.approx(reward, abs=1e-4)
        if ids:
            ours, theirs = (choice_logprobs(model, [prompt], [[ids]])[0][0] for model in models)
            assert record["log_ratio"] == pytest.approx(ours - theirs, abs=1e-3)
            assert record["reply_tokens"] == len(ids)
            compared += 1
    assert compared > 3
    with pytest.raises(EvaluationError, match=r"is no reward model; name a run with `training\.objective: reward`"):
        evaluate(
            judging.model_copy(update={"evaluation": judging.evaluation.model_copy(update={"judge": str(tiny_model)})}),
            corpus,
            subjects,
            Folder.at(tmp_path / "out"),
            **settings,
        )


def test_an_endpoint_alone_waits_for_no_gpus(
    recipe: Recipe, corpus: Corpus, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be served from the very GPUs that the recipe asks for."""
    requests: list[dict[str, Any]] = []

    def find(_: Any, **amounts: Any) -> FreeResources:
        requests.append(amounts)
        return FreeResources(1, 1, 0, 0)

    monkeypatch.setattr(evaluate_run, "find_free_resources", find)
    monkeypatch.setattr(evaluate_run, "resolve_model_dtype", lambda model, _: model)
    monkeypatch.setattr(evaluate_run, "make_subject_settings", lambda *_, **__: None)
    training = recipe.training.model_copy(update={"resources": recipe.training.resources.model_copy(update={"gpus": 1.0})})
    on_gpus = recipe.model_copy(update={"training": training})
    endpoint = Subject("endpoint", tiny_model, endpoint=EndpointAddress("http://127.0.0.1:1", "m", None))
    for subjects in ([endpoint], [Subject("base", tiny_model), endpoint]):
        _make_scorers(on_gpus, corpus, subjects, lambda _: None)
    assert requests == [{"gpus": 0.0, "tensor_parallel": 1}, {"gpus": 1.0, "tensor_parallel": 1}]
