"""Conversion of requests to token ids in the prompt contract's format; `RequestProblem` for a request that does not fit."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ChatTemplateError
from apprentice.serve.api.schemas import (
    Asked,
    ChatRequest,
    CompletionRequest,
    InstructRequest,
    Message,
    RenderRequest,
    RequestProblem,
)
from apprentice.serve.engines.base import Request


@dataclass(frozen=True)
class Phrasing:
    """Makes prompts for one model: its prompt format (`layout`), its `context` in tokens, the size of its vocabulary.

    All methods raise `RequestProblem`.
    """

    layout: Layout
    context: int
    vocabulary: int  # number of ids that the model's weights have

    def completion(self, asked: CompletionRequest) -> list[Request]:
        """Each prompt as it is, text or token ids, `n` times."""
        if asked.echo and asked.top is not None and self.layout.family == "seq2seq":
            raise RequestProblem("`echo` with `logprobs`: an encoder-decoder gives its prompt no probabilities.", param="logprobs")
        prompts = [self.layout.encode_raw(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]
        if not prompts:
            raise RequestProblem("`prompt` is empty; give at least one token.", param="prompt")
        return [request for ids in prompts for request in self._requests(asked, ids, asked.max_tokens, param="prompt")]

    def chat(self, asked: ChatRequest) -> list[Request]:
        """A conversation under the chat template; in a format without turns, one user message, which is the instruction."""
        most = asked.max_completion_tokens or asked.max_tokens
        return self._requests(asked, self._conversation(asked.messages)[1], most, param="messages")

    def rendered(self, asked: RenderRequest) -> tuple[str, list[int]]:
        """The prompt that the model would read, as text and as token ids."""
        if asked.messages:
            return self._conversation(asked.messages)
        return self._question(asked.instruction, asked.input, param="input")

    def _question(self, instruction: str, given: str, *, param: str) -> tuple[str, list[int]]:
        try:
            text = self.layout.prompt(instruction, given)
        except ChatTemplateError as error:
            raise RequestProblem(f"`{param}`: {error}", param=param) from error
        return self.layout.shown(text), self.layout.encode_prompt(text)

    def _conversation(self, turns: Sequence[Message]) -> tuple[str, list[int]]:
        messages = [{"role": message.speaker, "content": message.text} for message in turns]
        if messages[-1]["role"] != "user":
            raise RequestProblem("`messages`: the last message must be the user's.", param="messages")
        if self.layout.name == "chat":
            try:
                return self.layout.shown(self.layout.chat_prompt(messages)), self.layout.encode_chat(messages)
            except ChatTemplateError as error:
                raise RequestProblem(f"`messages`: {error}", param="messages") from error
        if len(messages) > 1:
            raise RequestProblem(
                f"`messages`: this model was trained in the layout `{self.layout.name}`, which has no turns;"
                " send exactly one user message.",
                param="messages",
            )
        return self._question(messages[0]["content"], "", param="messages")

    def instruct(self, asked: InstructRequest) -> list[Request]:
        """Instruction and input in the prompt format of training."""
        ids = self._question(asked.instruction, asked.input, param="input")[1]
        return self._requests(asked, ids, asked.max_tokens, param="input")

    def check_known(self, ids: Iterable[int], *, param: str) -> None:
        """Raises `RequestProblem` for an id that the model's weights or the tokenizer do not have.

        A tokenizer may have more special tokens than the weights have rows, and a text that spells one gets its id.
        """
        size = min(self.vocabulary, len(self.layout.tokenizer))
        if (highest := max(ids, default=0)) >= size:
            raise RequestProblem(f"`{param}`: token id {highest} is outside the vocabulary of {size}.", param=param)

    def _requests(self, asked: Asked, prompt: list[int], max_tokens: int | None, *, param: str) -> list[Request]:
        """`n` requests for replies to one prompt, which differ in their seeds only."""
        if not prompt:
            raise RequestProblem(f"`{param}` is empty; give at least one token.", param=param)
        self.check_known(prompt, param=param)
        room = self.context - len(prompt)
        least = 1 if max_tokens is None else max_tokens
        if room < max(least, 1):
            raise RequestProblem(
                f"the prompt has {len(prompt)} tokens and the reply may have {least}; at most"
                f" {self.context} fit together. Shorten the prompt or lower max_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        self.check_known(asked.logit_bias, param="logit_bias")
        first = secrets.randbits(62) if asked.seed is None else asked.seed
        request = Request(
            prompt=tuple(prompt),
            max_tokens=room if max_tokens is None else max(max_tokens, 1),
            stop_ids=frozenset() if asked.ignore_eos else frozenset(self.layout.stop_ids),
            temperature=asked.temperature,
            top_p=asked.top_p,
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            logit_bias=asked.logit_bias,
            logprobs=asked.top,
            score_from=0 if asked.top is not None and isinstance(asked, CompletionRequest) and asked.echo else None,
        )
        return [replace(request, seed=first + number) for number in range(asked.n)]
