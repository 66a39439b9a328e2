"""Tasks by their fields: renders a row with one of the task's templates, asks the model, and ranks the task's choices."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import jinja2
from fastapi.responses import Response

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ChatTemplateError, did_you_mean
from apprentice.inference.choices.choice_ranking import RANKINGS, index_of_best
from apprentice.serve.api.accounts import Account
from apprentice.serve.api.schemas import InstructRequest, RenderRequest, RequestProblem, TaskRequest
from apprentice.serve.generation.service import Answering
from apprentice.tasks.describe import sample_row
from apprentice.tasks.schema import Task, Template
from apprentice.tasks.templates.expressions import Expression


def described(task: Task) -> dict[str, Any]:
    """Description of a task for `/v1/tasks`: its fields, a sample row, its choices and templates."""
    names = frozenset().union(*(_needed(task, template) for template in task.scored_templates))
    sample = sample_row(task) or {}
    return {
        "id": task.name,
        "object": "task",
        "cluster": task.cluster,
        "summary": task.summary,
        "fields": sorted(names),
        "sample": {name: sample[name] for name in sorted(names & sample.keys())} or None,
        "choices": list(task.choices) if isinstance(task.choices, tuple) else None,
        "templates": [template.name for template in task.scored_templates],
    }


def rendered(task: Task, asked: RenderRequest, layout: Layout) -> dict[str, Any]:
    """Prompt (text and token ids), instruction, input and choices for a row of the task. Raises `RequestProblem`."""
    instruction, given, choices = _question(task, _template(task, asked.template), asked.fields or {})
    text = _phrased(layout, instruction, given)
    return {
        "text": layout.shown(text),
        "token_ids": layout.encode_prompt(text),
        "instruction": instruction,
        "input": given,
        "choices": list(choices),
    }


async def answered(task: Task, asked: TaskRequest, layout: Layout, answering: Answering, account: Account) -> dict[str, Any]:
    """The rendered prompt with the choices, ranked as the model's contract says, or with a generated reply where there are none.

    `probability` is the softmax of the ranking's scores; `logprob` is always the choice's summed log-probability. Closes `account`
    unless it raises. Raises `RequestProblem`.
    """
    template = _template(task, asked.template)
    # In a thread, because a row may be large and a template may take a second.
    instruction, given, choices = await asyncio.to_thread(_question, task, template, asked.fields)
    text = await asyncio.to_thread(_phrased, layout, instruction, given)
    body: dict[str, Any] = {
        "object": "task.answer",
        "task": task.name,
        "template": template.name,
        "instruction": instruction,
        "input": given,
        "prompt": layout.shown(text),
    }
    if not choices:
        instructed = InstructRequest(instruction=instruction, input=given, max_tokens=asked.max_tokens)
        replies = await answering.answer(instructed, await asyncio.to_thread(answering.requests, instructed), account)
        return body | {"answer": _text_of(replies)}
    ids = [(*encoded, *layout.end_ids) for encoded in await asyncio.to_thread(layout.encode_answers, list(choices))]
    prompts = [await asyncio.to_thread(layout.encode_prompt, text), *([layout.empty_prompt] if answering.rank_by == "pmi" else [])]
    sums, *priors = await answering.logprobs(prompts, ids, account)
    scores = RANKINGS[answering.rank_by](sums, [len(encoded) for encoded in ids], priors[0] if priors else ())
    wins = index_of_best(scores)
    weights = [math.exp(value - scores[wins]) for value in scores]
    ranked = [
        {"choice": choice, "probability": weight / sum(weights), "logprob": value}
        for choice, weight, value in zip(choices, weights, sums, strict=True)
    ]
    return body | {"answer": choices[wins], "ranked_by": answering.rank_by, "choices": ranked}


def _phrased(layout: Layout, instruction: str, given: str) -> str:
    try:
        return layout.prompt(instruction, given)
    except ChatTemplateError as error:
        raise RequestProblem(f"`fields`: {error}", param="fields") from error


def _text_of(response: Response) -> str:
    return str(json.loads(bytes(response.body))["choices"][0]["text"])


def _template(task: Task, name: str | None) -> Template:
    known = {template.name: template for template in task.scored_templates}
    if name is None:
        return task.scored_templates[0]
    if name not in known:
        message = f"`template`: task {task.name!r} has no wording {name!r} that asks.{did_you_mean(name, known)}"
        raise RequestProblem(message, param="template")
    return known[name]


def _needed(task: Task, template: Template) -> frozenset[str]:
    asking = template.parts[0].names | template.parts[1].names
    own = Expression(task.choices).names if isinstance(task.choices, str) and template.choices is None else frozenset()
    return (asking - {"choices"}) | own


def _question(task: Task, template: Template, fields: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    needed = sorted(_needed(task, template))
    if missing := [name for name in needed if fields.get(name) is None]:
        message = f"`fields`: {missing[0]!r} is missing; this wording of {task.name!r} needs {', '.join(needed)}."
        raise RequestProblem(message, param="fields", code="missing")
    try:
        choices = template.choices or task.choices or ()
        if isinstance(choices, str):
            choices = tuple(str(choice).strip() for choice in Expression(choices)(fields))
        values = fields | ({"choices": choices} if choices else {})
        instruction, given, _ = template.parts
        return instruction(values), given(values), tuple(choices)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise RequestProblem(f"`fields`: they do not fit the task's wording: {error}.", param="fields") from error
