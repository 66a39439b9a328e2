"""What is served is what was scored: our own endpoint, asked through HTTP, gives the answers of the model in memory."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_contract import make_contract
from apprentice.evaluate.report import predictions
from apprentice.evaluate.run import Subject, evaluate
from apprentice.evaluate.scoring.endpoint import EndpointAddress, model_at
from apprentice.inference.choices.choice_scoring import choice_logprobs
from apprentice.models.loading import load_model
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe, Serving
from apprentice.serve.deployment import start
from apprentice.storage import Folder
from tests.support.documents import ADDRESS, blocks_of, commands_in

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUESTIONS = 4 * 5 * 2 * 2  # tasks, rows, wordings, numbers of exemplars


@pytest.fixture(scope="module")
def model(tiny_model: Path, recipe: Recipe, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("served") / "model")
    make_contract(recipe, corpus.layout, folder).write(folder)
    return folder


@pytest.fixture(scope="module")
def url(ray_cluster: None, model: Path) -> Iterator[str]:
    serving = Serving(port=0, max_running=8, max_queued_requests=64, context=1024)
    with start(model, serving, model_name="tiny", dtype="float32", cpus=1) as running:
        yield running.url


def test_the_endpoint_answers_as_the_model_in_memory(recipe: Recipe, corpus: Corpus, model: Path, url: str, tmp_path: Path) -> None:
    assert model_at(url) == "tiny"
    subjects = [Subject("local", model, (0, 2)), Subject("served", model, (0, 2), EndpointAddress(url, "tiny"))]
    report = evaluate(recipe, corpus, subjects, Folder.at(tmp_path), progress=lambda values: None).as_json()
    assert report["unscored"] == []

    answers: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {"local": {}, "served": {}}
    for record in predictions.read(Folder.at(tmp_path)).to_pylist():
        if record["subject"] in answers:
            question = record["task"], record["row"], record["template"], record["shots"]
            answers[record["subject"]][question] = record
    assert len(answers["local"]) == QUESTIONS
    assert answers["local"].keys() == answers["served"].keys()
    ranked = generated = 0
    for question, local in answers["local"].items():
        served = answers["served"][question]
        assert served["prompt"] == local["prompt"]
        if local["choices"]:
            assert served["choice_logprobs"] == pytest.approx(local["choice_logprobs"], abs=1e-3)
            ranked += 1
        else:
            generated += 1
        assert served["prediction"] == local["prediction"], question
    assert (ranked, generated) == (40, 40)
    for task in report["tasks"]:
        assert task["columns"]["served@0"]["score"] == task["columns"]["local@0"]["score"]
        assert task["differences"]["served@0"]["mean"] == 0.0


def test_a_refusal_is_listed_and_the_rest_is_kept(recipe: Recipe, corpus: Corpus, model: Path, url: str, tmp_path: Path) -> None:
    """Every question that the endpoint refuses is listed with the reason that it gave."""
    subjects = [Subject("local", model), Subject("served", model, (0,), EndpointAddress(url, "another"))]
    report = evaluate(recipe, corpus, subjects, Folder.at(tmp_path), progress=lambda values: None).as_json()
    assert len(report["unscored"]) == QUESTIONS / 2
    assert {lost["subject"] for lost in report["unscored"]} == {"served"}
    assert "404" in report["unscored"][0]["reason"]
    assert all(task["columns"]["local@0"]["score"] is not None for task in report["tasks"])


PAGE = Path(__file__).parents[3] / "docs" / "guides" / "report.md"
TOPICS = ["the sea", "a bridge", "the garden"]
ROWS = [{"text": f"Row {number}. What is this about?", "label": number % 3, "word": TOPICS[number % 3]} for number in range(6)]
HARNESS = {
    "hellaswag": {"output_type": "multiple_choice", "doc_to_choice": TOPICS, "doc_to_target": "label", "target_delimiter": " "},
    "gsm8k": {
        "output_type": "generate_until",
        "doc_to_target": "word",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def harness(command: str, url: str, model: Path, folder: Path) -> list[dict[str, Any]]:
    """What lm-evaluation-harness asked and got with a command of our page, over tasks of ours in place of the page's."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = shlex.split(
        command.replace(f"http://{ADDRESS}", url).replace("runs/flan-mini/model", str(model)).replace("flan-mini", "tiny")
    )
    name = words[words.index("--tasks") + 1]
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test"}
    task = {"task": f"own_{name}", "doc_to_text": "{{text}}", **source, **HARNESS[name]}
    (folder / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    words = [f"own_{name}" if word == name else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--include_path", folder, "--output_path", folder / "out", "--log_samples"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "cache"), "OPENAI_API_KEY": "none"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def test_the_harness_ranks_through_the_endpoint(model: Path, url: str, tmp_path: Path) -> None:
    command, _ = (command for block in blocks_of(PAGE) for command in commands_in(block.text) if "lm_eval" in command)
    samples = harness(command, url, model, tmp_path)
    assert len(samples) == len(ROWS)
    tokenizer = Tokenizer(model)
    loaded: Any = load_model(model, torch.float32)
    for sample in samples:
        prompt = tokenizer.encode(sample["doc"]["text"])
        [expected] = choice_logprobs(loaded, [prompt], [[tokenizer.encode(f" {topic}") for topic in TOPICS]])
        logprobs = [float(answer[0][0]) for answer in sample["resps"]]
        assert logprobs == pytest.approx(expected, abs=1e-3)


def test_the_harness_generates_through_the_chat_route(model: Path, url: str, tmp_path: Path, corpus: Corpus) -> None:
    _, command = (command for block in blocks_of(PAGE) for command in commands_in(block.text) if "lm_eval" in command)
    samples = harness(command, url, model, tmp_path)
    assert len(samples) == len(ROWS)
    layout = corpus.layout
    loaded: Any = load_model(model, torch.float32)
    for sample in samples:
        prompt = layout.encode_prompt(layout.prompt(sample["doc"]["text"], ""))
        with torch.inference_mode():
            whole = loaded.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=list(layout.stop_ids),
            )
        expected = layout.tokenizer.decode(whole[0, len(prompt) :].tolist())
        assert sample["resps"][0][0].strip() == expected.split("\n\n")[0].strip()
