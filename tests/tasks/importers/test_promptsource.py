"""PromptSource: every published file is read, and its templates give what PromptSource itself gave for the same rows."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from apprentice.errors import RowError, TaskError
from apprentice.recipe import load_recipe
from apprentice.tasks.importers.promptsource import load_templates, promptsource_tasks, template_files
from apprentice.tasks.registry import select_tasks
from apprentice.tasks.schema import Task

FILE = """
dataset: glue
subset: toy
templates:
  a1: !Template
    answer_choices: no ||| yes
    id: a1
    jinja: '{{ sentence1 }} Same as "{{ sentence2 }}"?

      |||

      {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: same
    reference: ''
  a2: !Template
    answer_choices: '{{ sentence1 }} ||| {{ sentence2 }}'
    id: a2
    jinja: 'Which? {{ answer_choices | join(" or ") }} ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      original_task: true
    name: which
  a3: !Template
    answer_choices: null
    id: a3
    jinja: '{% if label == 1 %}Paraphrase: {{ sentence1 }} ||| {{ sentence2 }}{% endif %}'
    metadata: !TemplateMetadata
      original_task: false
    name: paraphrase
"""
# Folder of datasets → folder of templates, as the README of the datasets says.
FITTING = {
    "squad": ["squad"],
    "web_questions": ["web_questions"],
    "xsum": ["xsum"],
    "dialogsum": ["samsum"],
    "sst2": ["glue/sst2"],
    "imdb": ["imdb"],
    "snli": ["snli"],
    "multi_nli": ["multi_nli", "glue/mnli"],
    "sick": ["sick"],
    "mrpc": ["glue/mrpc"],
    "hellaswag": ["hellaswag"],
    "winogrande": ["winogrande/winogrande_l"],
    "commonsense_qa": ["commonsense_qa"],
    "trec": ["trec"],
    "banking77": ["banking77"],
    "ag_news": ["ag_news"],
}
LACKS_A_COLUMN = {("sick", "entailment_AB")}


@pytest.fixture(scope="session")
def templates(shared_data: Path) -> Path:
    folder = shared_data.parent / "promptsource-templates"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data and the templates beside it")
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Task:
    (tmp_path / "templates.yaml").write_text(FILE)
    return load_templates(tmp_path / "templates.yaml")


def rendered(task: Task, template: str, **row: Any) -> tuple[str, str, tuple[str, ...]]:
    example = task.render(row, task.template_by_name[template])
    return example.instruction, example.target, example.choices


def test_choices_fixed_and_of_each_row(toy: Task) -> None:
    row = {"sentence1": "A b.", "sentence2": "B ||| a.", "label": 1}
    assert rendered(toy, "same", **row) == ('A b. Same as "B ||| a."?', "yes", ("no", "yes"))
    assert rendered(toy, "which", **row) == ("Which? A b. or B ||| a.", "B ||| a.", ("A b.", "B ||| a."))
    assert rendered(toy, "paraphrase", **row) == ("Paraphrase: A b.", "B ||| a.", ())
    assert pickle.loads(pickle.dumps(toy)).render(row, toy.templates[0]) == toy.render(row, toy.templates[0])


def test_metadata(toy: Task) -> None:
    assert (toy.name, toy.metrics, toy.is_ranked, toy.fields) == (
        "promptsource_glue_toy",
        ("accuracy",),
        True,
        {"sentence1", "sentence2", "label"},
    )
    assert [(template.name, template.inverted) for template in toy.templates] == [
        ("same", False),
        ("which", False),
        ("paraphrase", True),
    ]
    assert [source.dataset or (source.hub, source.config) for source in toy.sources] == ["glue/toy", "toy", ("glue", "toy")]


def test_an_empty_result_skips_the_row(toy: Task) -> None:
    with pytest.raises(RowError) as error:
        rendered(toy, "paraphrase", sentence1="A.", sentence2="B.", label=0)
    assert error.value.reason == "skipped"


def test_a_failing_template_is_named_with_file_and_line(tmp_path: Path, toy: Task) -> None:
    broken = toy.template_by_name["which"].model_copy(update={"instruction": "{{ 1 / label }} ||| a"})
    with pytest.raises(RowError) as error:
        toy.render({"sentence1": "A.", "sentence2": "B.", "label": 0}, broken)
    line = FILE.splitlines().index("    name: which") + 1
    where = f"{tmp_path}/templates.yaml:{line}: task 'promptsource_glue_toy', template 'which'"
    assert str(error.value) == f"{where}: division by zero"


def test_python_objects_are_not_built(tmp_path: Path) -> None:
    file = tmp_path / "templates.yaml"
    file.write_text("dataset: x\ntemplates: !!python/object/apply:os.system ['false']\n")
    with pytest.raises(TaskError, match=r"templates\.yaml cannot be read as PromptSource templates"):
        load_templates(file)


def test_a_draw_depends_on_the_row_alone(tmp_path: Path) -> None:
    file = tmp_path / "templates.yaml"
    file.write_text(FILE.replace("{{ sentence1 }} Same as", '{{ ["a", "b", "c"] | choice }} {{ sentence1 }}'))
    task = load_templates(file)
    rows = [{"sentence1": str(number), "sentence2": "b", "label": 0} for number in range(60)]
    first = [rendered(task, "same", **row)[0][0] for row in rows]
    assert [rendered(task, "same", **row)[0][0] for row in rows] == first
    assert set(first) == {"a", "b", "c"}


def test_entries_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "ps" / "glue" / "toy").mkdir(parents=True)
    (tmp_path / "ps" / "glue" / "toy" / "templates.yaml").write_text(FILE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: r\nmodel: {base: x}\ntraining: {steps: 1}\n"
        "data: {promptsource: ps, tasks: [{promptsource: glue/toy, dataset: toys, templates: [which], cluster: paraphrase}]}\n"
    )
    data = load_recipe(recipe).data
    (task,), held_out = select_tasks(data.entries, (), tmp_path)
    assert ([template.name for template in task.templates], task.cluster, held_out) == (["which"], "paraphrase", frozenset())
    assert [source.dataset for source in task.sources] == ["toys"]
    assert template_files(str(tmp_path / "ps"), None) == template_files("glue/toy", str(tmp_path / "ps"))
    with pytest.raises(TaskError, match="Did you mean 'glue/toy'"):
        promptsource_tasks({"promptsource": "glue/toys", "root": str(tmp_path / "ps")})
    with pytest.raises(TaskError, match=r"data\.promptsource does not say"):
        promptsource_tasks({"promptsource": "glue/toy"})
    with pytest.raises(TaskError, match=r"no template is called 'wich'\. Did you mean 'which'"):
        promptsource_tasks({"promptsource": "glue/toy", "root": str(tmp_path / "ps"), "templates": ["wich"]})


def test_all_published_files_are_read(templates: Path) -> None:
    files = template_files(str(templates), None)
    tasks = [load_templates(file) for file in files]
    assert len(tasks) == 279
    assert sum(len(template.names) >= 0 for task in tasks for template in task.templates) > 2000  # each one compiles


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "names"), FITTING.items())
def test_every_fitting_template_renders_every_row(templates: Path, shared_data: Path, dataset: str, names: list[str]) -> None:
    """All test rows, and every tenth training row."""
    for name, (part, every) in product(names, (("test", 1), ("train", 10))):
        task = load_templates(templates / name / "templates.yaml")
        table = pq.read_table(shared_data / dataset / f"{part}.parquet")
        table = table.take(list(range(0, table.num_rows, every)))
        lacking = {t.name for t in task.templates if t.names - set(table.column_names) - task.given_names}
        assert all(
            (dataset, field) in LACKS_A_COLUMN
            for t in task.templates
            if t.name in lacking
            for field in t.names - set(table.column_names)
        )
        counts = Counter[str]()
        for row in table.to_pylist():
            for template in task.templates:
                if template.name not in lacking:
                    try:
                        task.render(row, template)
                        counts["rendered"] += 1
                    except RowError as error:
                        counts[error.reason] += 1
        assert set(counts) <= {"rendered", "skipped"}, counts
        assert counts["rendered"] > table.num_rows


def letters(text: str) -> str:
    """Without white space and punctuation, which the two copies of the datasets write differently, and cut where P3's sample is."""
    return re.sub(r"\W+", "", text)[:1400]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "dataset", "least"), [("glue_mrpc", "glue/mrpc", "mrpc", 520), ("imdb", "imdb", "imdb", 90)]
)
def test_p3_gave_the_same_for_the_same_rows(
    templates: Path, shared_data: Path, name: str, folder: str, dataset: str, least: int
) -> None:
    task = load_templates(templates / folder / "templates.yaml")
    by_name = {re.sub(r"\W+", "_", template.name): template for template in task.templates}
    expected: dict[str, dict[str, str]] = {}
    for part in ("train", "test"):
        for row in pq.read_table(shared_data / "t0_p3_sample" / f"{part}.parquet").to_pylist():
            if row["dataset"] == name:
                expected.setdefault(row["template"], {})[letters(row["inputs_pretokenized"])] = row["targets_pretokenized"]
    compared = 0
    for part in ("train", "test"):
        for row in pq.read_table(shared_data / dataset / f"{part}.parquet").to_pylist():
            for template, answers in expected.items():
                try:
                    example = task.render(row, by_name[template])
                except RowError:
                    continue
                if (target := answers.get(letters(example.instruction))) is not None:
                    assert letters(example.target) == letters(target)
                    compared += 1
    assert compared >= least
