"""The library: enough tasks, wordings that differ, and every one of them rendered, on a row of our own and on real rows."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from apprentice.tasks.registry import BUILTIN, library, load_task
from apprentice.tasks.schema import Example, Task, missing_fields

# A row in the fields of the task, and its answer, for the tasks whose real rows are in ../shared/data. Any task has a `sample`.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "ag_news": ({"text": "Striker out Rovers #39; striker is injured", "label": 1}, "sports"),
    "alpaca_demo": ({"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}, "3"),
    "banking77": ({"text": "Where do I choose a new PIN?", "label": 21}, "change PIN"),
    "commonsense_qa": (
        {
            "question": "Where does milk stay fresh?",
            "choices": {"label": list("ABCDE"), "text": ["oven", "fridge", "drawer", "roof", "car"]},
            "answerKey": "B",
        },
        "fridge",
    ),
    "daily_dialog": ({"dialog": ["Hello .", "Shall we go ?", "Yes , at once ."], "act": [1, 2, 4]}, "question"),
    "daily_dialog_reply": ({"dialog": ["Hello .", "Shall we go ?", "Yes , at once . "]}, "Yes, at once."),
    "dialogsum": (
        {"dialogue": "#Person1#: Tea?\n#Person2#: Please.", "summary": "They have tea.", "topic": "tea"},
        "They have tea.",
    ),
    "gsm8k": ({"question": "What is twice 600?", "solution": "2 * 600 = <<2*600=1200>>1200.\n#### 1,200"}, "1200"),
    "hellaswag": (
        {
            "ctx": "She fills the kettle and",
            "endings": ["flies.", "boils water.", "sings.", "digs."],
            "label": "1",
            "activity_label": "Tea",
        },
        "boils water.",
    ),
    "imdb": ({"text": "A slow start.<br /><br />Then it never stops being fun.", "label": 1}, "positive"),
    "mrpc": ({"sentence1": "It rained on Monday.", "sentence2": "On Monday there was rain.", "label": 1}, "equivalent"),
    "multi30k_en_de": ({"translation": {"en": "A dog runs.", "de": "Ein Hund läuft."}}, "Ein Hund läuft."),
    "multi30k_en_fr": ({"translation": {"en": "A dog runs.", "fr": "Un chien court."}}, "Un chien court."),
    "multi_nli": ({"premise": "All shops are open.", "hypothesis": "Some shop is shut.", "label": 2}, "contradiction"),
    "natural_instructions": ({"definition": "Say the opposite.", "inputs": "hot", "targets": ["cold", "cool"]}, "cold"),
    "self_instruct": ({"instruction": "Name a colour.", "instances": [{"input": "", "output": "Blue"}]}, "Blue"),
    "sick": ({"sentence_A": "A man sings", "sentence_B": "A person sings", "label": 0}, "entailment"),
    "snli": ({"premise": "A girl reads.", "hypothesis": "She reads a novel.", "label": 1}, "neutral"),
    "squad": (
        {
            "title": "Big_Ben",
            "context": "The bell is in London.",
            "question": "Where is it?",
            "answers": {"text": ["London", "in London"]},
        },
        "London",
    ),
    "sst2": ({"sentence": "a dull affair", "label": 0}, "negative"),
    "strategy_qa": ({"question": "Could a cat vote?", "answer": False, "rationale": "Only people vote."}, "no"),
    "topical_chat": ({"content": [{"message": f"message {n}", "sentiment": "Happy"} for n in range(20)]}, "message 9"),
    "trec": ({"text": "Who wrote Emma ?", "coarse_label": 3}, "human being"),
    "web_questions": ({"question": "who wrote emma?", "answers": ["Jane Austen", "Austen"]}, "Jane Austen"),
    "winogrande": ({"sentence": "The cup fits the box as the _ is big.", "option1": "cup", "option2": "box", "answer": "2"}, "box"),
    "xsum": (
        {"document": "Last updated at 9\nA bridge was shut.\nIt is old.", "summary": "An old bridge is shut."},
        "An old bridge is shut.",
    ),
}
SEEDED = BUILTIN.parent / "seeded"  # made by functions, as those of the mixture are
FILES = {name: path for name, path in library().items() if path.parent not in (BUILTIN, SEEDED)}
TASKS = {name: load_task(path) for name, path in FILES.items()}
REAL_ROWS = 200
GENERATION_METRICS = {
    "extractive_qa": {"token_f1", "exact_match"},
    "reading_comprehension": {"token_f1", "exact_match"},
    "open_qa": {"token_f1", "exact_match"},
    "summarisation": {"rouge_l"},
    "conversation": {"rouge_l"},
    "translation": {"bleu"},
    "reasoning": {"exact_match"},
    "instructions": {"rouge_l", "exact_match", "ni_rouge_l", "ni_exact_match"},
}


def own_words(text: str) -> list[str]:
    """The words of a wording itself, without what it takes from the row."""
    return re.findall(r"\w+", re.sub(r"\{[{%].*?[}%]\}", " ", text, flags=re.DOTALL).lower())


def likeness(one: list[str], other: list[str]) -> float:
    """Share of words that two wordings have in common, in order: 0 to 1; two without any word of their own are alike."""
    return SequenceMatcher(None, one, other, autojunk=False).ratio() if one or other else 1.0


def check(example: Example, task: Task) -> None:
    """What must hold for an example of any row."""
    assert example.instruction
    assert example.references
    template = task.template_by_name[example.template]
    if task.is_ranked and not template.inverted and not template.cot:
        assert example.target in example.choices
        assert len(example.choices) >= 2
    else:
        assert not example.choices


def test_enough_tasks_clusters_and_wordings() -> None:
    assert len(TASKS) >= 60
    assert len({task.cluster for task in TASKS.values()}) >= 17
    assert {name for name, task in TASKS.items() if len(task.templates) < 10} == set()
    assert {name for name, task in TASKS.items() if len(task.inverted_templates) < 3} == set()
    assert {name for name, task in TASKS.items() if len(task.scored_templates) < 6} == {"ecqa"}  # five chains of thought


@pytest.mark.parametrize("name", TASKS)
def test_files_say_where_they_are_and_what_they_are(name: str) -> None:
    task, path = TASKS[name], FILES[name]
    assert (task.name, task.cluster) == (path.stem, path.parent.name)
    assert task.summary.endswith((".", "?"))
    assert len({template.name for template in task.templates}) == len(task.templates)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", template.name) for template in task.templates)
    expected = {"accuracy"} if task.is_ranked else GENERATION_METRICS[task.cluster]
    assert set(task.metrics) <= expected


def test_most_sources_on_the_hub_say_where_they_were_looked_up() -> None:
    """A size without the place where it was read is a guess."""
    sources = [(name, spec) for name, task in TASKS.items() for spec in task.sources if spec.hub is not None]
    assert len(sources) >= 50
    assert [name for name, spec in sources if spec.rows and not spec.card] == []
    assert sum(spec.card is not None for _, spec in sources) >= 45
    assert {name for name, spec in sources if not spec.rows.keys() <= spec.splits.keys()} == set()


@pytest.mark.parametrize("name", TASKS)
def test_no_text_was_cut_by_a_yaml_comment(name: str) -> None:
    """`instruction: Use the # sign` would be read as `Use the`: every value ends as it does in the file."""
    for line in FILES[name].read_text(encoding="utf-8").splitlines():
        key, separator, text = line.strip().removeprefix("- ").partition(": ")
        if separator and key in {"instruction", "input", "output"} and text[0] not in "\"'|>&*":
            assert yaml.safe_load(f"{key}: {text}")[key] == text


@pytest.mark.parametrize("name", TASKS)
def test_no_two_wordings_of_a_task_are_alike(name: str) -> None:
    """One word changed in a sentence of ten leaves 0.9. A question and its list of labels alone, which some wordings must
    share ("... positive or negative?"), make up to 0.57 of a short wording, so 0.6 separates the two cases."""
    words = {template.name: own_words(f"{template.instruction} {template.input}") for template in TASKS[name].templates}
    pairs = {pair: likeness(words[pair[0]], words[pair[1]]) for pair in combinations(words, 2)}
    assert len(pairs) >= 45
    assert {pair: round(value, 2) for pair, value in pairs.items() if value >= 0.6} == {}


def test_no_two_tasks_share_a_wording() -> None:
    """Over the whole library, the built-in tasks too. What remains below 0.85 are short commands that differ in what matters,
    such as "Translate from German to English" and "Translate from Spanish to English" (0.8)."""
    every = [load_task(path) for path in library().values()]
    words = [(task.name, own_words(f"{one.instruction} {one.input}")) for task in every for one in task.templates]
    words = [(name, phrases) for name, phrases in words if phrases]
    assert len(words) >= 700
    alike, compared = [], 0
    for (name, one), (other_name, other) in combinations(words, 2):
        if name != other_name and len(set(one) & set(other)) >= 0.6 * len(set(one) | set(other)):  # others hardly reach 0.85
            compared += 1
            if likeness(one, other) >= 0.85:
                alike.append((name, other_name, " ".join(one)))
    assert compared >= 5
    assert alike == []


def test_likeness_tells_a_rewording_from_another_wording() -> None:
    one = own_words("Is the sentiment of this sentence positive or negative? {{ sentence }}")
    assert likeness(one, own_words("{{ sentence }} Is the sentiment of this text positive or negative?")) == pytest.approx(8 / 9)
    assert likeness(one, own_words("Did the critic like the film? Reply yes or no. {{ sentence }}")) < 0.3
    assert likeness(own_words("{{ a }}"), own_words("{{ b }}")) == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_every_wording_renders_the_sample(name: str) -> None:
    """The sample is a whole row: every field, no wording left with an empty part of it, no mark of the template language."""
    task = TASKS[name]
    row = task.sample
    assert row is not None
    assert task.fields <= set(row)
    for template in task.templates:
        example = task.render(row, template)
        check(example, task)
        shown = f"{example.instruction}\n{example.input}\n{example.target}"
        assert not re.search(r"\{[{%]|[}%]\}|None|\bnan\b", shown), template.name
        assert template.inverted or template.cot or task.is_ranked or example.target not in example.instruction.splitlines()


FIXED = [name for name, task in TASKS.items() if isinstance(task.choices, tuple) and task.label in task.fields]


@pytest.mark.parametrize("name", FIXED)
def test_every_wording_serves_every_label(name: str) -> None:
    """A wording may say another thing for each label; the sample shows one of them only."""
    task = TASKS[name]
    assert isinstance(task.choices, tuple)
    assert task.label is not None
    texts: dict[str, set[str]] = {template.name: set() for template in task.templates}
    for number, choice in enumerate(task.choices):
        for template in task.templates:
            example = task.render({**(task.sample or {}), task.label: number}, template)
            check(example, task)
            texts[template.name].add(f"{example.instruction}{example.input}{example.target}")
            if template.output == "{{ answer }}":
                assert example.target == (template.choices or task.choices)[number], (template.name, choice)
    assert {name for name, wordings in texts.items() if len(wordings) < len(task.choices)} == set()


def test_rows_that_lack_something_make_sense_too() -> None:
    def shown(name: str, template: str, **changes: Any) -> Example:
        task = TASKS[name]
        return task.render({**(task.sample or {}), **changes}, task.template_by_name[template])

    nothing = {"text": [], "answer_start": []}
    assert shown("squad_v2", "answer_or_abstain", answers=nothing).references == ("unanswerable",)
    assert "without an answer" in shown("squad_v2", "ask_about_it", answers=nothing).instruction
    assert shown("alpaca", "input_first", input="").instruction.startswith("Now for something that needs no text")
    assert (
        shown("dolly", "reference_first", context="").instruction == "When was the lighthouse of Cape Merle lit for the first time?"
    )
    two = TASKS["ultrachat"].sample["messages"][:2]  # type: ignore[index]
    assert shown("ultrachat", "continue_conversation", messages=two).input == f"User: {two[0]['content']}\nAssistant:"
    assert shown("ultrachat", "you_said", messages=two).target == two[1]["content"]
    one = {"questions": ["Who?"], "answers": {"input_text": ["Mara"]}}
    assert shown("coqa", "given_what_we_know", **one).instruction.endswith("established: nothing. And now: Who?")
    assert shown("drop", "blank", answers_spans={"spans": ["Reed", "Osei"]}).references == ("Reed, Osei", "Reed", "Osei")
    assert shown("drop", "blank", answers_spans={"spans": ["18", "18"]}).target == "18"
    assert shown("sciq", "with_textbook", support="").input.endswith("Passage: none")


@pytest.mark.parametrize("name", ROWS)
def test_every_wording_renders_a_row_of_our_own(name: str) -> None:
    task, (row, answer) = TASKS[name], ROWS[name]
    assert task.fields <= set(row)
    for template in task.templates:
        example = task.render(row, template)
        check(example, task)
        assert "{{" not in f"{example.instruction}{example.input}{example.target}"
        if not template.inverted and not template.cot and template.choices is None:
            assert (template.name, example.target) == (template.name, answer)
        if not template.inverted and not template.cot and not task.is_ranked:
            assert answer not in example.instruction.split("\n") + example.input.split("\n")


def test_all_references_count() -> None:
    references = {name: TASKS[name].render(row, TASKS[name].templates[0]).references for name, (row, _) in ROWS.items()}
    assert references["squad"] == ("London", "in London")
    assert references["web_questions"] == ("Jane Austen", "Austen")
    assert references["natural_instructions"] == ("cold", "cool")
    one_text = ROWS["natural_instructions"][0] | {"targets": "cold"}  # as the hub has it
    task = TASKS["natural_instructions"]
    assert task.render(one_text, task.templates[0]).references == ("cold",)


def test_details_of_some_wordings() -> None:
    def shown(name: str, template: str, **changes: Any) -> Example:
        return TASKS[name].render(ROWS[name][0] | changes, TASKS[name].template_by_name[template])

    assert shown("ag_news", "tag").instruction.endswith("out of #world, #sports, #business and #tech.")
    assert shown("ag_news", "which_section").input == "Striker out Rovers' striker is injured"
    assert shown("alpaca_demo", "as_it_is", input="`<noinput>`").input == ""
    assert shown("alpaca_demo", "material_first", input="No input").instruction.endswith("at the end.\n\nAdd the numbers.")
    assert shown("daily_dialog_reply", "next_line").input == "B: Hello.\nA: Shall we go?"
    assert shown("gsm8k", "show_the_steps").target == "2 * 600 = 1200.\n#### 1,200"
    assert shown("hellaswag", "numbered_options").instruction.splitlines()[1:3] == ["1. flies.", "2. boils water."]
    assert shown("imdb", "overall_verdict").input == "A slow start.\n\nThen it never stops being fun."
    assert shown("xsum", "open_the_article").target == "A bridge was shut."


@pytest.mark.parametrize("name", [*ROWS, "ecqa"])
def test_every_wording_renders_real_rows(name: str, shared_data: Path) -> None:
    """No row of these sets may drop out: they were cleaned when they were made."""
    task = TASKS[name]
    source = task.sources[0]
    assert source.dataset is not None
    rendered: Counter[str] = Counter()
    for split in source.splits.values():
        file = parquet.ParquetFile(shared_data / source.dataset / f"{split}.parquet")
        assert missing_fields(task, source, file.schema_arrow.names) == []
        columns = {field: source.columns.get(field, field) for field in task.fields}
        rows = file.read(columns=list(columns.values())).slice(0, REAL_ROWS).to_pylist()
        for row in rows:
            fields = {field: row[column] for field, column in columns.items()}
            for template in task.templates:
                check(task.render(fields, template), task)
                rendered[split] += 1
        assert rendered[split] == len(rows) * len(task.templates)
    assert rendered["train"] >= 150 * len(task.templates)
    assert rendered["test"] >= 90 * len(task.templates)
