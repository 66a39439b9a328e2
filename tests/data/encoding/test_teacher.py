"""What a teacher makes of each target token lies beside it in packed rows, and what a recipe may not ask of one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.reference import TeacherLogProbs
from apprentice.data.stream import arrow_table
from apprentice.data.window import WindowRenderer
from apprentice.errors import DataError, RecipeError
from apprentice.preflight.check import run_check
from apprentice.storage import Folder
from apprentice.train.batch import PackedRows
from tests.data.encoding.test_preferences import corpus_of, recipe_of
from tests.support.preferences import pairs, write_pairs
from tests.support.teachers import count_targets

TOP = 3


def records() -> list[dict[str, Any]]:
    return [{"instruction": pair["prompt"], "input": "", "output": pair["chosen"]} for pair in pairs()]


def changes(folder: Path, model: Path, **more: Any) -> dict[str, Any]:
    file = write_pairs(folder / "records.jsonl", records())
    distill = {"teacher": str(model), "top": TOP}
    return {"data__tasks": [{"alpaca": str(file)}], "training__objective": "distill", "training__distill": distill} | more


def teacher_of(corpus: Corpus) -> TeacherLogProbs:
    """Numbers that say which row and target they belong to: row × 1000 + target."""
    rows, counts = count_targets(corpus)
    marks = np.concatenate([row * 1000 + np.arange(count) for row, count in zip(rows.tolist(), counts, strict=True)])
    ends = np.cumsum(counts)
    values = np.repeat(marks[:, None] + 0.5, TOP + 1, axis=1).astype(np.float32)
    return TeacherLogProbs(rows, ends, np.repeat(marks[:, None], TOP, axis=1).astype(np.int32), values)


def test_numbers_lie_at_their_targets(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model, **changes(tmp_path, tiny_model))
    teacher_of(corpus).write(Folder.at(tmp_path) / "task.npz")
    teacher = TeacherLogProbs.read(Folder.at(tmp_path) / "task.npz")
    taught = replace(corpus, teacher={corpus.tasks[0].name: teacher})
    for rows, row_of in (
        (WindowRenderer(taught).window(1), lambda position: corpus.plan.draws(position, position + 1)[0].row),
        (WindowRenderer(taught).validation(3), lambda row: row),
    ):
        table = arrow_table(rows)
        packed = PackedRows.from_columns({name: table[name].to_pylist() for name in table.column_names})
        assert max(len(fact.examples) for fact in packed.facts) > 1
        [batch] = packed.micro_batches(len(packed))
        expected = [
            row_of(number) * 1000 + target
            for fact in packed.facts
            for number, count in zip(fact.examples, fact.targets, strict=True)
            for target in range(count)
        ]
        assert batch.teacher_ids.tolist() == [[mark] * TOP for mark in expected]
        assert batch.teacher_log_probs.tolist() == [[mark + 0.5] * (TOP + 1) for mark in expected]
        assert len(batch.places) == len(expected) == packed.targets
    assert "teacher_ids" not in WindowRenderer(corpus).window(1)


def test_other_targets_than_the_teachers_are_refused(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model, **changes(tmp_path, tiny_model))
    teacher = teacher_of(corpus)
    other = replace(teacher, ends=teacher.ends + 1)
    with pytest.raises(DataError, match=r"has other targets of row \d+; delete it, and train again"):
        WindowRenderer(replace(corpus, teacher={corpus.tasks[0].name: other})).window(0)
    with pytest.raises(DataError, match="says nothing of row 1000000"):
        teacher.of(1000000)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"training__distill": {}}, "objective distill learns what a teacher thinks; name one"),
        ({"data__formats": {"zero_shot": 0.5, "few_shot": 0.5}}, "objective distill shows no exemplars"),
        ({"data__qualities": {"good": {}}}, "data.qualities weigh the tokens of answers, and objective distill"),
    ],
)
def test_what_cannot_be_taught_is_refused(tiny_model, tmp_path, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_of(tmp_path, tiny_model, **changes(tmp_path, tiny_model, **more))


def test_several_wordings_are_refused(tiny_model, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model, **changes(tmp_path, tiny_model, data__tasks=["message_moods"]))
    with pytest.raises(RecipeError, match="has the teacher read each row once, and task 'message_moods' has several wordings"):
        run_check("tasks", recipe)


def test_a_teacher_with_another_tokenizer_is_refused(tiny_model, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    recipe = recipe_of(tmp_path, tiny_model, **changes(tmp_path, other))
    assert run_check("model", recipe)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|pod|>"))
    with pytest.raises(RecipeError, match=r"training\.distill\.teacher .* has another tokenizer than model\.base .* Name a model"):
        run_check("model", recipe)
