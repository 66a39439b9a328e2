"""OpenAI's routes: completions, chat completions, and the list of models."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from apprentice.serve.api.api_state import ApiState
from apprentice.serve.api.schemas.descriptions import ModelDescription, ModelList
from apprentice.serve.api.schemas.requests import ChatRequest, CompletionRequest
from apprentice.serve.generation.prompt_encoding import PromptEncoder
from apprentice.serve.generation.replies.reply_formats import ChatFormat, CompletionFormat


def add_openai_routes(app: FastAPI, state: ApiState) -> None:
    """Adds `/v1/completions`, `/v1/chat/completions` and `/v1/models` to `app`."""

    @app.post("/v1/completions")
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        return await state.respond(http, body, PromptEncoder.encode_completion, CompletionFormat)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
        return await state.respond(http, body, PromptEncoder.encode_chat, ChatFormat)

    @app.get("/v1/models", response_model_exclude_unset=True)
    async def models(http: HttpRequest) -> ModelList:
        names = [name for name in await state.catalogue.names() if state.may_use(http, name)]
        return ModelList(object="list", data=[state.describe_model(name) for name in names])

    @app.get("/v1/models/{name:path}", response_model_exclude_unset=True)
    async def one_model(http: HttpRequest, name: str) -> ModelDescription:
        if name not in await state.catalogue.names() or not state.may_use(http, name):
            with await state.lease(http, name):  # raises with the reason
                pass
        return state.describe_model(name)
