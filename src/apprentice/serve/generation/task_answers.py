"""Tasks by their fields: renders a row with one of the task's templates, asks the model, and ranks the task's choices."""

from __future__ import annotations

import asyncio
import math
from typing import Any, NamedTuple

import jinja2

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ChatTemplateError, did_you_mean
from apprentice.inference.choices.choice_ranking import RANKINGS, index_of_best
from apprentice.serve.api.limits.accounts import Account
from apprentice.serve.api.schemas.descriptions import RankedChoice, RenderedPrompt, TaskAnswer, TaskDescription
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.requests import InstructRequest, RenderRequest, TaskRequest
from apprentice.serve.generation.choice_logprobs import ChoiceScorer
from apprentice.serve.generation.replies.reply_service import ReplyService
from apprentice.tasks.describe import sample_row
from apprentice.tasks.schema import Task, Template
from apprentice.tasks.templates.expressions import Expression


class Question(NamedTuple):
    """A row rendered with a template; `choices` is empty where the answer is free text."""

    instruction: str
    input: str
    choices: tuple[str, ...]


def describe_task(task: Task) -> TaskDescription:
    """Description of a task for `/v1/tasks`: its fields, a sample row, its choices and templates."""
    names = frozenset().union(*(_needed_fields(task, template) for template in task.scored_templates))
    sample = sample_row(task) or {}
    return TaskDescription(
        id=task.name,
        object="task",
        cluster=task.cluster,
        summary=task.summary,
        fields=sorted(names),
        sample={name: sample[name] for name in sorted(names & sample.keys())} or None,
        choices=list(task.choices) if isinstance(task.choices, tuple) else None,
        templates=[template.name for template in task.scored_templates],
    )


def render_task(task: Task, body: RenderRequest, layout: Layout) -> RenderedPrompt:
    """Prompt (text and token ids), instruction, input and choices for a row of the task. Raises `RequestProblem`."""
    question = _question(task, _template(task, body.template), body.fields or {})
    text = _prompt(layout, question)
    return RenderedPrompt(
        text=layout.shown(text),
        token_ids=layout.encode_prompt(text),
        instruction=question.instruction,
        input=question.input,
        choices=list(question.choices),
    )


async def answer_task(
    task: Task, body: TaskRequest, layout: Layout, replies: ReplyService, scorer: ChoiceScorer, account: Account
) -> TaskAnswer:
    """The rendered prompt with the choices, ranked as the model's contract says, or with a generated reply where there are none.

    `probability` is the softmax of the ranking's scores; `logprob` is always the choice's summed log-probability. Closes `account`
    unless it raises. Raises `RequestProblem`.
    """
    template = _template(task, body.template)
    # In a thread, because a row may be large and a template may take a second.
    question = await asyncio.to_thread(_question, task, template, body.fields)
    text = await asyncio.to_thread(_prompt, layout, question)
    fields: dict[str, Any] = {
        "object": "task.answer",
        "task": task.name,
        "template": template.name,
        "instruction": question.instruction,
        "input": question.input,
        "prompt": layout.shown(text),
    }
    if not question.choices:
        instruction = InstructRequest(instruction=question.instruction, input=question.input, max_tokens=body.max_tokens)
        prompts = await asyncio.to_thread(replies.encoder.encode_instruction, instruction)
        return TaskAnswer(**fields, answer=await replies.text(instruction, prompts, account))
    prompt_ids = await asyncio.to_thread(layout.encode_prompt, text)
    best, ranked = await _rank_choices(question.choices, prompt_ids, layout, scorer, account)
    return TaskAnswer(**fields, answer=question.choices[best], ranked_by=scorer.rank_by, choices=ranked)


async def _rank_choices(
    choices: tuple[str, ...], prompt: list[int], layout: Layout, scorer: ChoiceScorer, account: Account
) -> tuple[int, list[RankedChoice]]:
    """Index of the best choice, and all with their probabilities, in their order."""
    ids = [(*encoded, *layout.end_ids) for encoded in await asyncio.to_thread(layout.encode_answers, list(choices))]
    prompts = [prompt, *([layout.empty_prompt] if scorer.rank_by == "pmi" else [])]
    sums, *priors = await scorer.logprobs(prompts, ids, account)
    scores = RANKINGS[scorer.rank_by](sums, [len(encoded) for encoded in ids], priors[0] if priors else ())
    best = index_of_best(scores)
    weights = [math.exp(value - scores[best]) for value in scores]
    return best, [
        RankedChoice(choice=choice, probability=weight / sum(weights), logprob=value)
        for choice, weight, value in zip(choices, weights, sums, strict=True)
    ]


def _prompt(layout: Layout, question: Question) -> str:
    try:
        return layout.prompt(question.instruction, question.input)
    except ChatTemplateError as error:
        raise RequestProblem(f"`fields`: {error}", param="fields") from error


def _template(task: Task, name: str | None) -> Template:
    known = {template.name: template for template in task.scored_templates}
    if name is None:
        return task.scored_templates[0]
    if name not in known:
        message = f"`template`: task {task.name!r} has no wording {name!r} that asks.{did_you_mean(name, known)}"
        raise RequestProblem(message, param="template")
    return known[name]


def _needed_fields(task: Task, template: Template) -> frozenset[str]:
    """Fields of a row that the template's instruction and input, its choices and the task's are made of."""
    asking = template.parts[0].names | template.parts[1].names
    chosen = Expression(task.choices).names if isinstance(task.choices, str) else frozenset()
    return (asking - {"choices"}) | chosen | template.choices_names


def _question(task: Task, template: Template, fields: dict[str, Any]) -> Question:
    needed = sorted(_needed_fields(task, template))
    if missing := [name for name in needed if fields.get(name) is None]:
        message = f"`fields`: {missing[0]!r} is missing; this wording of {task.name!r} needs {', '.join(needed)}."
        raise RequestProblem(message, param="fields", code="missing")
    try:
        choices = task.choices_for(fields, template)
        values = fields | ({"choices": choices} if choices else {})
        instruction, input, _ = template.parts
        return Question(instruction(values), input(values), choices)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise RequestProblem(f"`fields`: they do not fit the task's wording: {error}.", param="fields") from error
