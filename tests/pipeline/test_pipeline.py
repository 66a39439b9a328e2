"""The whole road through the command line with the tiny model, and what a person may get wrong on it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from apprentice import cli, pipeline
from apprentice.models import loading
from tests.support.recipes import tiny_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def command(monkeypatch, capsys, ray_cluster):
    """Runs `apprentice …` in this process on the session's Ray; gives (exit code, standard output, standard error)."""

    def _command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["apprentice", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return _command


@pytest.fixture(scope="module")
def trained(ray_cluster, tiny_model, tmp_path_factory) -> Path:
    """A recipe whose run is trained."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("road"), tiny_model)
    from apprentice.recipe import load_recipe

    result = pipeline.train_run(load_recipe(recipe), progress=lambda stage, values: None)
    assert result["steps"] == 4
    return recipe


def test_the_run_folder_holds_what_the_design_names(trained):
    run = trained.parent / "runs" / "tiny"
    for name in [
        "recipe.yaml",
        "identity.json",
        "status.json",
        "ledger.json",
        "export.json",
        "index",
        "checkpoints",
        "model",
        "adapter",
        "events",
    ]:
        assert (run / name).exists(), name
    assert json.loads((run / "model" / "apprentice.json").read_text())["layout"] == "chat"


def test_training_again_says_it_is_done(command, trained):
    code, out, _ = command("train", trained, "--json")
    assert code == 0
    assert json.loads(out)["already"] is True


def test_runs_lists_it(command, trained):
    code, out, _ = command("runs", "--storage", trained.parent / "runs", "--json")
    listed = json.loads(out)["runs"]
    assert (code, [run["name"] for run in listed], listed[0]["state"], listed[0]["step"]) == (0, ["tiny"], "trained", 4)


def test_evaluate_writes_the_three_reports(command, trained):
    code, out, err = command("evaluate", trained, "--json")
    assert code == 0, err
    report = json.loads(out)
    folder = trained.parent / "runs" / "tiny" / "report"
    assert {"report.json", "report.md", "report.html", "predictions.parquet"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "report.json").read_text()) == report


@pytest.fixture
def answered(command, trained, monkeypatch) -> Path:
    """The run of `trained`, evaluated; from now on no model is loaded: all comes from the answers that are there."""
    from apprentice.evaluate.scoring import subject_scorer

    def refused(*_):
        raise AssertionError("a model was loaded")

    assert command("evaluate", trained, "--json")[0] == 0
    monkeypatch.setattr(subject_scorer, "map_tables", refused)
    return trained.parent / "runs" / "tiny"


def test_a_report_again_and_a_gate(command, trained, answered):
    run = answered
    before = json.loads((run / "report" / "report.json").read_text())
    (run / "report" / "report.json").unlink()
    code, out, _ = command("report", run, "--json")
    assert (code, json.loads(out)) == (0, before)

    code, _, err = command("serve", run, "--require-gate")
    assert (code, "has no verdict of a gate" in err) == (1, True)
    code, out, err = command("evaluate", trained, "evaluation.gate={held_out: 1000}", "--json")
    assert (code, json.loads(out)["gate"]["passed"]) == (1, False)
    assert "gate: tuned failed: held_out mean above base is" in err
    assert json.loads((run / "model" / "gate.json").read_text())["passed"] is False
    code, _, err = command("serve", run, "--require-gate")
    assert (code, "did not pass" in err) == (1, True)

    code, _, err = command("report", trained.parent)
    assert (code, "has no predictions yet" in err) == (1, True)


def test_against_another_model(command, answered, tiny_model):
    """The other model is the run's base here, so its answers are known too, and the difference is that of the run's report."""
    code, out, err = command("evaluate", answered, "--against", tiny_model, "--json")
    assert code == 0, err
    report, plain = json.loads(out), json.loads((answered / "report" / "report.json").read_text())
    assert [subject["name"] for subject in report["subjects"]] == [tiny_model.name, "tuned"]
    assert [task["differences"]["tuned@0"]["mean"] for task in report["tasks"]] == [
        task["differences"]["tuned@0"]["mean"] for task in plain["tasks"]
    ]
    assert len(report["tasks"]) == 11
    assert (answered / "report" / f"against-{tiny_model.name}" / "report.html").is_file()
    assert json.loads((answered / "report" / "report.json").read_text()) == plain


def test_runs_are_compared(command, answered, tmp_path):
    other = shutil.copytree(answered, answered.parent / "other")
    try:
        code, out, err = command("compare", answered, other, "--out", tmp_path / "both", "--json")
        assert code == 0, err
        report = json.loads(out)
        assert [column["title"] for column in report["columns"]] == ["majority", "tiny", "other"]
        assert [task["differences"]["other@0"]["mean"] for task in report["tasks"]] == [0.0] * 11
        assert (tmp_path / "both" / "report.html").is_file()
    finally:
        shutil.rmtree(other)
    code, _, err = command("compare", answered, answered)
    assert (code, "at least two runs of different names" in err) == (1, True)
    code, _, err = command("compare", answered, tmp_path)
    assert (code, "has no predictions yet" in err) == (1, True)


def test_an_adapter_over_its_base_scores_as_the_run(command, trained, tmp_path):
    """The same questions to `adapter/` as to `model/`, which training wrote from it."""
    words = ["--tasks", "short_reviews", "--tasks", "written_dates", "--json"]
    run = trained.parent / "runs" / "tiny"
    scores = []
    for target in (run / "adapter", run / "model"):
        code, out, err = command("evaluate", target, "--recipe", trained, "--out", tmp_path / target.name, *words)
        assert code == 0, err
        scores.append([task["columns"]["model@0"]["metrics"] for task in json.loads(out)["tasks"]])
    assert len(scores[0]) == 2
    assert scores[0] == scores[1]


def test_a_bare_model_on_named_tasks(command, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("evaluate", tiny_model)
    assert (code, "a bare model needs the tasks of a recipe: --recipe FILE, or --tasks NAME" in err) == (1, True)
    few = ["evaluation.max_examples=3", "evaluation.max_new_tokens=4", "model.dtype=float32"]
    code, out, err = command("evaluate", tiny_model, "--tasks", "short_reviews", *few, "--json")
    assert code == 0, err
    [task] = json.loads(out)["tasks"]
    assert (task["held_out"], task["columns"]["model@0"]["rows"]) == (True, 3)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert left == [f"reports/{tiny_model.name}", "runs/cache"]  # rows that were converted once
    assert len(list(tmp_path.iterdir())) == 2


def test_tasks_count_as_trained_on_only_for_what_was_trained_on_them(command, trained, tiny_model, tmp_path):
    words = ["--recipe", trained, "--tasks", "short_reviews", "--tasks", "written_dates", "--json", "evaluation.max_examples=2"]
    run = trained.parent / "runs" / "tiny"
    held_out = {}
    for target in (tiny_model, run / "model", run / "adapter"):
        code, out, err = command("evaluate", target, *words, "--out", tmp_path / target.name)
        assert code == 0, err
        held_out[target.name] = {task["task"]: task["held_out"] for task in json.loads(out)["tasks"]}
    tuned = dict.fromkeys(("short_reviews", "written_dates"), False)
    assert held_out == {tiny_model.name: dict.fromkeys(tuned, True), "model": tuned, "adapter": tuned}


def test_an_endpoint_that_is_down_is_one_sentence(command, trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, _, err = command("evaluate", trained, "--endpoint", f"http://127.0.0.1:{port}")
    assert (code, "no model list at" in err) == (1, True)


def test_serve_answers_and_stops(trained, tiny_model, tmp_path):
    """A bare base, and over it the run's adapter, whose words it takes."""
    runs = trained.parent / "runs"
    body = {"instruction": "Name a colour.", "max_tokens": 4, "ignore_eos": True}
    with pipeline.run_endpoint(
        str(tiny_model), adapters=str(runs), storage=str(tmp_path), progress=lambda stage, values: None
    ) as url:
        reply = pipeline.ask_endpoint(url, "Name a colour.", "", max_tokens=4)
        models = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        answers = [httpx.post(f"{url}/v1/instruct", json=body | {"model": name}, timeout=60) for name in models]
        layout = httpx.get(f"{url}/v1/contract", params={"model": "tiny"}).json()["layout"]
    assert isinstance(reply, str)
    assert models == [tiny_model.name, "tiny"]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert layout == "chat"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


def test_preview_shows_examples_and_leaves_nothing(command, tiny_model, tmp_path):
    recipe = tiny_recipe(tmp_path, tiny_model)
    code, out, err = command("preview", recipe, "-n", "3", "--json")
    assert code == 0, err
    assert len(json.loads(out)["examples"]) == 3
    page = tmp_path / "page.html"
    assert command("preview", recipe, "--html", page)[0] == 0
    assert page.read_text().startswith("<!doctype html>")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_check_of_a_good_recipe(command, tiny_model, tmp_path):
    code, out, _ = command("check", tiny_recipe(tmp_path, tiny_model), "--json")
    result = json.loads(out)
    assert (code, result["ready"]) == (0, True), result
    subjects = [finding["subject"] for finding in result["findings"]]
    assert subjects == [
        "tasks",
        "downloads",
        "model",
        "sources",
        "storage",
        "resources",
        "training",
        "rows",
        "packing",
        "duration",
        "evaluation",
    ]
    messages = {finding["subject"]: finding["message"] for finding in result["findings"]}
    assert "each example's end among them" in messages["rows"]
    assert messages["packing"].endswith("in one row and each alone they have the same loss")
    assert "tokens/s a worker" in messages["duration"]
    assert re.match(r"[0-9,]+ questions to base and tuned model, ", messages["evaluation"])
    assert not (tmp_path / "runs").exists()


def own_task(folder: Path, **template: str) -> str:
    """A task file over one Parquet file that has the columns `text` and `label`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["good", "bad"] * 20, "label": [1, 0] * 20}), folder / "rows.parquet")
    content = {
        "name": "mine",
        "cluster": "own",
        "sources": [{"files": {"train": "rows.parquet", "test": "rows.parquet"}}],
        "choices": ["bad", "good"],
        "label": "label",
        "metrics": ["accuracy"],
        "templates": [{"name": "ask", "instruction": "Good or bad?", "input": "{{ text }}"} | template],
    }
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


WRONG = {
    "unknown_key": ({"training__stepps": 3}, "Did you mean 'steps'?"),
    "unknown_task": ({"data__tasks": ["quickstart", "muliti_nli"]}, "Did you mean 'multi_nli'?"),
    "unknown_hold_out": ({"data__hold_out": ["topics"]}, "Did you mean 'topic'?"),
    "missing_task_file": ({"data__tasks": ["quickstart", "./none.yaml"]}, "none.yaml"),
    "missing_data": ({"data__tasks": ["quickstart", "sst2"], "data__root": "/nowhere"}, "/nowhere"),
    "global_batch": ({"training__global_batch": 3}, "global_batch 3 cannot be divided among 2 workers"),
    "warm_up": ({"training__optimizer__warmup_steps": 4}, "warmup_steps 4 is not shorter than the run's 4 steps"),
    "too_many_cpus": ({"training__resources": {"cpus": 100}}, "Lower training.workers or training.resources"),
    "no_gpu": ({"training__resources": {"cpus": 1, "gpus": 1}}, "GPU"),
    "no_model": ({"model__base": "./nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes_end_in_one_sentence_with_nothing_written(command, tiny_model, tmp_path, name):
    changes, words = WRONG[name]
    code, out, err = command("train", tiny_recipe(tmp_path, tiny_model, **changes))
    assert code == 1, err
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs" / "tiny").exists()


def test_not_enough_memory_is_said_before_anything_starts(command, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "count_parameters", lambda folder: 10**13)
    code, _, err = command("train", tiny_recipe(tmp_path, tiny_model))
    assert code == 1
    assert "GiB of memory in each of 2 workers" in err
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_template_that_names_a_missing_column(command, tiny_model, tmp_path):
    task = own_task(tmp_path, input="{{ txt }}")
    code, _, err = command("train", tiny_recipe(tmp_path, tiny_model, data__tasks=["quickstart", task]))
    assert code == 1
    assert "txt" in err
    assert "Did you mean 'text'?" in err
    assert "mine" in err
    assert not (tmp_path / "runs" / "tiny").exists()


def test_the_same_name_with_another_recipe(command, trained):
    before = sorted(path.name for path in (trained.parent / "runs" / "tiny").iterdir())
    code, _, err = command("train", trained, "seed=4")
    assert code == 1
    assert "seed (3 → 4)" in err
    assert "--restart" in err
    assert sorted(path.name for path in (trained.parent / "runs" / "tiny").iterdir()) == before


def test_a_port_in_use(command, trained):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = command("serve", trained.parent / "runs" / "tiny", "--port", str(port))
    assert code == 1
    assert f"port {port}" in err


def test_a_bare_model_without_a_contract(command, tiny_model):
    code, _, err = command("serve", tiny_model)
    assert code == 1
    assert "no prompt contract" in err
    assert "--contract" in err
