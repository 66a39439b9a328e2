"""Our own routes: instructions and tasks in the prompt format of training, rendered prompts, and the prompt contract."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest

from apprentice.errors import did_you_mean
from apprentice.serve.api.api_state import ApiState
from apprentice.serve.api.request_body import run_in_thread_if_large
from apprentice.serve.api.schemas.descriptions import RenderedPrompt, TaskAnswer, TaskList
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.requests import InstructRequest, RenderRequest, TaskRequest
from apprentice.serve.generation.choice_logprobs import ChoiceScorer
from apprentice.serve.generation.prompt_encoding import PromptEncoder
from apprentice.serve.generation.replies.reply_formats import CompletionFormat
from apprentice.serve.generation.task_answers import answer_task, describe_task, render_task
from apprentice.tasks.schema import Task


def add_instruction_routes(app: FastAPI, state: ApiState, tasks: dict[str, Task]) -> None:
    """Adds `/v1/instruct`, `/v1/render`, `/v1/contract` and `/v1/tasks` to `app`."""

    def task_named(name: str) -> Task:
        if name not in tasks:
            message = f"task {name!r} is not known here.{did_you_mean(name, tasks)} GET /v1/tasks lists them."
            raise RequestProblem(message, status=404, param="task", code="task_not_found")
        return tasks[name]

    @app.post("/v1/instruct")
    async def instruct(http: HttpRequest, body: InstructRequest) -> Response:
        return await state.respond(http, body, PromptEncoder.encode_instruction, CompletionFormat)

    @app.post("/v1/render", response_model=RenderedPrompt)
    async def render(http: HttpRequest, body: RenderRequest) -> Response:
        with await state.lease(http, body.model) as model:
            encoder = state.service(model).encoder

            def rendered() -> Response:
                if body.task is not None:
                    return JSONResponse(render_task(task_named(body.task), body, model.layout).to_dict())
                text, ids = encoder.render(body)
                return JSONResponse(RenderedPrompt(text=text, token_ids=ids).to_dict())

            return await run_in_thread_if_large(http, rendered)

    @app.get("/v1/contract")
    async def read_contract(http: HttpRequest, model: str | None = None) -> dict[str, Any]:
        with await state.lease(http, model) as leased:
            if leased.contract is None:
                raise RequestProblem("this endpoint was started without a prompt contract of its own.", status=404)
            return leased.contract.model_dump(mode="json")

    @app.get("/v1/tasks")
    async def list_tasks() -> TaskList:
        return TaskList(object="list", data=[describe_task(task) for task in tasks.values()])

    @app.post("/v1/tasks/{name}", response_model_exclude_unset=True)
    async def ask_task(http: HttpRequest, name: str, body: TaskRequest) -> TaskAnswer:
        async with state.account(http, body.model) as (model, account):
            service = state.service(model)
            scorer = ChoiceScorer(model, service.encoder)
            return await answer_task(task_named(name), body, model.layout, service, scorer, account)
