"""Replies to generation requests: through the engine and back, as a whole body or as server-sent events."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import replace

from fastapi.responses import JSONResponse, Response

from apprentice.serve.api.error_status import status_of
from apprentice.serve.api.limits.accounts import Account
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.requests import ChatRequest, GenerationFields
from apprentice.serve.generation.grammar import GrammarCompiler
from apprentice.serve.generation.prompt_encoding import EncodedPrompt, PromptEncoder
from apprentice.serve.generation.replies.event_stream import EventStream, ReplyEvents, choice_tokens
from apprentice.serve.generation.replies.reply_formats import CompletionFormat, ReplyFormat, WholeReply
from apprentice.serve.generation.replies.reply_group import ReplyGroup
from apprentice.serve.generation.replies.streams import ReplyChunk, ReplyStream
from apprentice.serve.generation.served_models import ServedModel
from apprentice.serve.generation.thought_budget import ThoughtBudget


class ReplyService:
    """Generates replies with `model`, each until the deadline of its account."""

    def __init__(self, model: ServedModel) -> None:
        self.encoder = PromptEncoder(model.layout, model.engine.context, model.engine.vocabulary)
        self._weak_model = weakref.ref(model)  # services are kept for as long as their models are, by others
        self._grammars = GrammarCompiler(model.layout)

    @property
    def _model(self) -> ServedModel:
        model = self._weak_model()
        assert model is not None, "a reply needs a lease of its model"
        return model

    async def respond(
        self, body: GenerationFields, prompts: Sequence[EncodedPrompt], format_type: type[ReplyFormat], account: Account
    ) -> Response:
        """Response to `body`, whole or as a stream; `prompts` is what `encoder` made of it.

        Closes `account` at the end, if the engine has accepted the requests. Raises `RequestProblem`, `Overloaded` or
        `EngineFailed` before the response begins; a later error of a stream is sent as an event.
        """
        group = await self._start(body, prompts, format_type, account)
        bodies = format_type(self._model.name, self._model.layout.tokenizer)
        if not body.stream:
            wholes = await self._gather(group)
            choices = [
                WholeReply(whole.text, reply.finish, choice_tokens(body, whole, reply.request.prompt), whole.parts)
                for reply, whole in zip(group.replies, wholes, strict=True)
            ]
            return JSONResponse(bodies.whole(choices, group.usage).to_dict())
        try:
            opening = await anext(group)
        except BaseException as error:
            await group.close(status_of(error))
            raise
        events = ReplyEvents(body, bodies, group, opening)
        return EventStream(events.generate(), lambda: group.close(events.status))

    async def text(self, body: GenerationFields, prompts: Sequence[EncodedPrompt], account: Account) -> str:
        """Text of the first reply; closes `account` and raises as `respond` does."""
        group = await self._start(body, prompts, CompletionFormat, account)
        return (await self._gather(group))[0].text

    @staticmethod
    async def _gather(group: ReplyGroup) -> list[ReplyChunk]:
        """The whole replies; closes the group."""
        wholes = [ReplyChunk() for _ in group.replies]
        try:
            async for reply, chunk in group:
                wholes[reply.index].append(chunk)
        except BaseException as error:
            await group.close(status_of(error))
            raise
        await group.close(200)
        return wholes

    async def _start(
        self, body: GenerationFields, prompts: Sequence[EncodedPrompt], format_type: type[ReplyFormat], account: Account
    ) -> ReplyGroup:
        """Passes the requests to the engine, once the key's limit has the tokens for them."""
        prompts = await self._constrained(body, prompts)
        requests = [request for prompt in prompts for request in prompt.requests]
        prompt_tokens = sum(len(prompt.requests[0].prompt) for prompt in prompts)
        await account.reserve(prompt_tokens + sum(request.max_new_tokens for request in requests))
        streams = iter(self._model.generate(requests))
        replies: list[ReplyStream] = []
        for prompt in prompts:
            for request in prompt.requests:
                reply = ReplyStream(
                    index=len(replies),
                    tokens=next(streams),
                    tokenizer=self._model.layout.tokenizer,
                    request=request,
                    deadline=account.deadline,
                    stops=body.stops,
                    echo=prompt.echo,
                    unechoed_tokens=prompt.unechoed_tokens,
                    is_only_scored=prompt.is_only_scored,
                    scores_end_token=format_type.scores_end_token,
                    reader=prompt.reader,
                )
                replies.append(reply)
        return ReplyGroup(replies, len(prompts), account)

    async def _constrained(self, body: GenerationFields, prompts: Sequence[EncodedPrompt]) -> Sequence[EncodedPrompt]:
        """The prompts, with a constraint for each of their requests if the body asks for a form of the reply."""
        has_tools = isinstance(body, ChatRequest) and bool(body.offered_tools)
        if body.is_constrained or has_tools:
            prompts = [await asyncio.to_thread(self._constrain, body, prompt) for prompt in prompts]
        budget = body.thinking_token_budget if isinstance(body, ChatRequest) else None
        return prompts if budget is None else [self._with_budget(prompt, budget) for prompt in prompts]

    def _with_budget(self, prompt: EncodedPrompt, budget: int) -> EncodedPrompt:
        """The prompt, whose replies' thoughts have at most `budget` tokens."""
        engine, reader = self._model.engine, prompt.reader
        assert reader is not None, "replies with thoughts are read"
        if not engine.follows_any_constraint:
            raise RequestProblem(
                "`thinking_token_budget`: the engine of this endpoint cannot bound thoughts; leave it out, or set `max_tokens`.",
                param="thinking_token_budget",
            )
        requests = (
            replace(one, constraint=ThoughtBudget(reader, budget, engine.vocabulary, one.constraint)) for one in prompt.requests
        )
        return replace(prompt, requests=tuple(requests))

    def _constrain(self, body: GenerationFields, prompt: EncodedPrompt) -> EncodedPrompt:
        """The prompt, with a constraint for each of its requests; takes milliseconds, so not in an event loop."""
        grammars = self._grammars
        if isinstance(body, ChatRequest) and prompt.reader is not None and prompt.reader.tools:
            grammar = grammars.tool_grammar_of(body, prompt.reader)
        else:
            grammar = grammars.grammar_of(body, prompt.reader)
        if grammar is None:
            return prompt
        first, *others = prompt.requests  # they differ in their seeds only
        constraint = grammars.compile(grammar, tuple(sorted(first.stop_ids)))
        requests = [replace(first, constraint=constraint), *(replace(one, constraint=constraint.copy()) for one in others)]
        return replace(prompt, requests=tuple(requests))
