"""Labelled answers in packed rows: each beside another row's, and what a recipe may not ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.tokenize import encode_labelled
from apprentice.data.inspect.preview import preview
from apprentice.data.stream import arrow_table
from apprentice.data.window import WindowRenderer
from apprentice.errors import RecipeError, RowError
from apprentice.preflight.check import run_check
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.tasks import snapshot
from apprentice.tasks.importers.unpaired import has_labels, unpaired_tasks
from apprentice.tasks.registry import IMPORTERS
from apprentice.tasks.schema import Example
from apprentice.train.batch import PackedRows
from tests.data.encoding.test_preferences import corpus_of, recipe_of
from tests.support.preferences import labelled, write_pairs

KTO = {"training__objective": "kto"}


def labelled_corpus(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Corpus:
    file = write_pairs(folder / "answers.jsonl", labelled() if rows is None else rows)
    return corpus_of(folder, model, data__tasks=[{"unpaired": str(file)}], **KTO, **changes)


def test_an_answer_lies_beside_another_rows(tiny_model, tmp_path):
    corpus = labelled_corpus(tmp_path, tiny_model)
    renderer, decode, records = WindowRenderer(corpus), corpus.layout.tokenizer.decode, labelled()
    [index] = corpus.indices.values()
    completions = {record["completion"]: row for row, record in enumerate(records)}
    partners: dict[int, set[int]] = {}
    for rows, row_of in (
        (renderer.window(0), lambda position: corpus.plan.draws(position, position + 1)[0].row),
        (renderer.window(3), lambda position: corpus.plan.draws(position, position + 1)[0].row),
        (renderer.validation(3), lambda row: row),
        (renderer.zero_shot(corpus.tasks[0], index.train.tolist()), lambda row: row),
    ):
        for place, examples in enumerate(rows["examples"]):
            assert rows["reference"][place].shape == (2 * len(examples),)
            for number, position in enumerate(examples.tolist()):
                row, texts = row_of(position), []
                for segment in (2 * number + 1, 2 * number + 2):
                    here = rows["segment_ids"][place] == segment
                    ids, mask = rows["input_ids"][place][here], rows["loss_mask"][place][here] > 0
                    texts.append((decode(ids[~mask].tolist()), decode(ids[mask].tolist())))
                assert texts[0] == (texts[1][0], records[row]["completion"])
                assert records[row]["prompt"] in texts[0][0]
                assert rows["desirable"][place][number] == records[row]["label"]
                partners.setdefault(row, set()).add(completions[texts[1][1]])
    # The same partner wherever the row is drawn: another one, of the training rows.
    assert len(partners) >= 35
    assert all(len(others) == 1 and row not in others and others <= set(index.train.tolist()) for row, others in partners.items())
    assert len({other for others in partners.values() for other in others}) > 10


def test_labels_go_through_the_stream(tiny_model, tmp_path):
    rows = WindowRenderer(labelled_corpus(tmp_path, tiny_model)).window(0)
    table = arrow_table(rows)
    assert table.column_names == list(rows)
    packed = PackedRows.from_columns({name: table[name].to_pylist() for name in table.column_names})
    assert packed.desirable is not None
    assert [row.tolist() for row in packed.desirable] == [row.tolist() for row in rows["desirable"]]


def test_a_partner_that_is_too_long_is_cut_and_decides_on_nothing(tiny_model):
    layout = Layout("plain", Tokenizer(tiny_model))
    example = Example("t", "p", "Answer.", "one two three", "Yes.", is_desirable=False)
    [alone] = encode_labelled(layout, [(example, [Exemplar("", "", "No.")])], 60)
    [beside] = encode_labelled(layout, [(example, [Exemplar("", "", "never " * 200)])], 60)
    assert alone is not None
    assert beside is not None
    assert (alone.ids, alone.is_desirable) == (beside.ids, False)
    assert beside.rejected is not None
    assert len(beside.rejected.ids) == 60
    assert beside.rejected.ids[-len(layout.end_ids) :] == list(layout.end_ids)


def test_forms_of_a_record(tmp_path):
    [task] = unpaired_tasks({"unpaired": str(tmp_path / "answers.jsonl")})
    assert has_labels(task)
    [template] = task.templates
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "A herb?"}]
    example = template.example("t", {"prompt": talk, "completion": [{"role": "assistant", "content": "Mint."}], "label": 0})
    assert (example.instruction, example.target, example.history, example.is_desirable) == (
        "A herb?",
        "Mint.",
        (("Hello", "Yes?"),),
        False,
    )
    assert template.example("t", {"prompt": "A herb?", "completion": "Mint.", "label": "True"}).is_desirable is True
    for row, reason in (
        ({"prompt": "A?", "completion": "B", "label": None}, "null"),
        ({"prompt": "A?", "completion": "", "label": True}, "null"),
        ({"prompt": "A?", "completion": [], "label": True}, "null"),
        ({"prompt": "A?", "completion": "B", "label": "good"}, "bad_label"),
        ({"prompt": "A?", "completion": "B", "label": [1, 0]}, "bad_label"),
        ({"prompt": "A?", "completion": "B", "label": {"is": True}}, "bad_label"),
        ({"prompt": 3, "completion": "B", "label": True}, "turns"),
        ({"prompt": "A?", "completion": ["B"], "label": True}, "turns"),
    ):
        with pytest.raises(RowError) as caught:
            template.example("t", row)
        assert caught.value.reason == reason


def test_preview_says_the_label(tiny_model, tmp_path):
    shown = preview(labelled_corpus(tmp_path, tiny_model), 6)
    assert {item.desirable for item in shown} == {True, False}
    assert all(item.rejected == "" and ("undesirable" in item.details) == (not item.desirable) for item in shown)
    assert json.dumps(shown[0].as_dict())


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ("preferences", KTO, "kto learns from labelled answers, and those of task 'preferences_pairs' have no labels"),
        ("unpaired", {"training__objective": "sft"}, "labelled undesirable, and training.objective sft would take them for good"),
        ("unpaired", KTO | {"data__hold_out": ["unpaired_pairs"]}, "is held out, and nothing can be scored with answers"),
    ],
)
def test_labels_that_would_be_lost_are_refused(tiny_model, tmp_path, entry, changes, message):
    recipe = recipe_of(tmp_path, tiny_model, labelled() if entry == "unpaired" else None, **changes)
    tasks = [{entry: str(tmp_path / "pairs.jsonl")}]
    if "data__hold_out" in changes:
        tasks.append({"unpaired": str(write_pairs(tmp_path / "more.jsonl", labelled()))})
    recipe = type(recipe).model_validate(recipe.model_dump() | {"data": recipe.data.model_dump() | {"tasks": tasks}})
    with pytest.raises(RecipeError, match=re.escape(message)):
        run_check("tasks", recipe)


def test_a_row_must_hold_both(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="kto puts an answer and another row's, each with the prompt, into one row"):
        recipe_of(tmp_path, tiny_model, data__packing={"length": 150}, **KTO)


def test_tasks_of_every_importer_are_kept_with_a_run():
    assert set(IMPORTERS) == set(snapshot._TEMPLATES)
