"""Encoding of requests as questions: rendered with exemplars in one prompt format, as token ids, cut to a limit.

Exemplars come from the task's training index, for held-out tasks too, and are the same for every subject.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.dialogue_segments import without_thoughts
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.render import Renderer
from apprentice.data.encoding.tokenize import drop_reason, fit_prompt
from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sampling.plan import exemplar_rows
from apprentice.errors import RowError
from apprentice.evaluate.questions.perturbation import perturb
from apprentice.evaluate.questions.row_selection import QuestionRequest
from apprentice.evaluate.report.predictions import ENCODED_QUESTION, make_table
from apprentice.model_pool.answer_settings import TokenLimits

NOT_A_CHOICE = "target_not_a_choice"
EMPTY_CHOICE = "choice_without_tokens"
NOTHING_TO_CHANGE = "nothing_to_change"  # the perturbation does not apply to this question


def encode_questions(corpus: Corpus, requests: Iterable[QuestionRequest], layout: Layout, limits: TokenLimits) -> pa.Table:
    """Encodes requests as a table of the schema `predictions.ENCODED_QUESTION`, in order; `dropped` is why one cannot be asked."""
    renderer = Renderer(corpus.tasks, corpus.indices)
    seed, indices = corpus.recipe.seed, corpus.indices
    return make_table(
        [_question(request, renderer, indices[request.task], layout, seed, limits) for request in requests], ENCODED_QUESTION
    )


def _question(
    request: QuestionRequest, renderer: Renderer, index: TaskIndex, layout: Layout, seed: int, limits: TokenLimits
) -> dict[str, Any]:
    record: dict[str, Any] = request._asdict() | {"truncated": "", "dropped": ""}
    try:
        example = renderer.example(request.task, "test", request.row, request.template)
    except RowError as error:
        return record | {"dropped": error.reason}
    if example.choices and example.target not in example.choices:
        return record | {"dropped": NOT_A_CHOICE}
    if request.perturbation:
        changed = perturb(example, request.perturbation, seed, request.row)
        if changed is None:
            return record | {"dropped": NOTHING_TO_CHANGE}
        example = changed
    if layout.reasoning is not None:
        example = without_thoughts(example)  # the answer behind the thought is scored
    rows, exemplars = _exemplars(request, renderer, index, seed)
    answers = layout.encode_answers(example.choices) if example.choices else []
    if not all(answers):
        return record | {"dropped": EMPTY_CHOICE}
    choice_ids = [[*ids, *layout.end_ids] for ids in answers]
    room = limits.prompt_before(max(map(len, choice_ids), default=limits.reply))
    fitted = fit_prompt(layout, example, exemplars, room)
    if fitted is None:
        return record | {"dropped": drop_reason(layout, example, exemplars)}
    return record | {
        "prompt": layout.tokenizer.decode(fitted.ids, skip_special=False),
        "target": example.target,
        "references": list(example.references),
        "choices": list(example.choices),
        "exemplars": rows[: fitted.exemplars_used],
        "prompt_tokens": len(fitted.ids),
        "truncated": fitted.truncated or "",
        "prompt_ids": fitted.ids,
        "choice_ids": choice_ids,
        "tools": f"[{', '.join(example.dialogue.tools)}]" if example.dialogue is not None and example.dialogue.tools else None,
    }


def _exemplars(request: QuestionRequest, renderer: Renderer, index: TaskIndex, seed: int) -> tuple[list[int], list[Exemplar]]:
    """Training rows and their exemplars for one request; rows that the template cannot render are left out."""
    rows: list[int] = []
    exemplars: list[Exemplar] = []
    if request.shots:
        for row in exemplar_rows(seed, request.task, request.row, request.shots, index.train):
            try:
                solved = renderer.example(request.task, "train", row, request.template)
            except RowError:
                continue
            rows.append(int(row))
            exemplars.append(Exemplar(solved.instruction, solved.input, solved.target))
    return rows, exemplars


def has_enough_exemplars(index: TaskIndex, shots: int) -> bool:
    """True if the task has enough training rows for `shots` exemplars."""
    return shots == 0 or (index.train_source is not None and len(index.train) > shots)
