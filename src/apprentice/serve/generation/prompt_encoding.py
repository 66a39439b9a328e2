"""Conversion of request bodies to token ids in the prompt contract's format; `RequestProblem` for a request that does not fit.

Needs a tokenizer and no engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ChatTemplateError
from apprentice.inference.generation_request import GenerationRequest, Sampling
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.requests import (
    EFFORTS,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    InstructRequest,
    Message,
    RenderRequest,
)
from apprentice.serve.generation.replies.reply_parts import PartReader


@dataclass(frozen=True)
class EncodedPrompt:
    """The engine requests for one prompt, one for each of its `n` choices, and the `echo` that each reply begins with.

    `echo` leaves out `unechoed_tokens` at the prompt's start. With `is_only_scored` the reply is the echo alone, and the token that
    the engine adds to it is left out. `reader` reads the parts of the replies to a
    conversation with functions or thoughts.
    """

    requests: tuple[GenerationRequest, ...]
    echo: str = ""
    unechoed_tokens: int = 0
    is_only_scored: bool = False
    reader: PartReader | None = None


@dataclass(frozen=True)
class PromptEncoder:
    """Makes prompts for one model: its prompt format (`layout`), its `context` in tokens, the size of its vocabulary.

    All methods raise `RequestProblem`.
    """

    layout: Layout
    context: int
    vocabulary: int  # number of ids that the model's weights have

    def encode_completion(self, body: CompletionRequest) -> list[EncodedPrompt]:
        """Each prompt as it is, text or token ids."""
        scores_prompt = body.echo and body.scored_tokens is not None
        if scores_prompt and self.layout.family == "seq2seq":
            raise RequestProblem("`echo` with `logprobs`: an encoder-decoder gives its prompt no probabilities.", param="logprobs")
        prompts = [(prompt, self.layout.encode_raw(prompt) if isinstance(prompt, str) else prompt) for prompt in body.prompts]
        if not prompts:
            raise RequestProblem("`prompt` is empty; give at least one token.", param="prompt")
        score_from = 0 if scores_prompt else None
        encoded = [
            EncodedPrompt(self._requests(body, ids, body.max_tokens, param="prompt", score_from=score_from)) for _, ids in prompts
        ]
        if not body.echo:
            return encoded
        return [self._echoing(one, prompt, body) for one, (prompt, _) in zip(encoded, prompts, strict=True)]

    def _echoing(self, encoded: EncodedPrompt, prompt: str | Sequence[int], body: CompletionRequest) -> EncodedPrompt:
        tokenizer, is_text = self.layout.tokenizer, isinstance(prompt, str)
        return replace(
            encoded,
            echo=prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False),
            unechoed_tokens=len(tokenizer.start_ids) if is_text and self.layout.name != "chat" else 0,
            is_only_scored=body.max_tokens == 0,
        )

    def encode_chat(self, body: ChatRequest) -> list[EncodedPrompt]:
        """A conversation under the chat template; in a format without turns, one user message, which is the instruction."""
        if (encoder := self._for_thoughts_of(body)) is not self:
            return encoder.encode_chat(body.model_copy(update={"chat_template_kwargs": None, "reasoning_effort": None}))
        if body.thinking_token_budget is not None and not self.layout.leaves_thoughts:
            raise RequestProblem(
                "`thinking_token_budget`: replies of this model begin with no thought; leave it out, or set"
                " `chat_template_kwargs.enable_thinking`.",
                param="thinking_token_budget",
            )
        max_tokens = body.max_completion_tokens or body.max_tokens
        tools = body.offered_tools
        text, ids = self._conversation(body.messages, tools)
        requests = self._requests(body, ids, max_tokens, param="messages")
        if not tools and not self.layout.leaves_thoughts:
            return [EncodedPrompt(requests)]
        if not body.ignore_eos:
            requests = tuple(replace(request, stop_ids=frozenset(self.layout.call_stop_ids)) for request in requests)
        is_in_thought = self.layout.leaves_thoughts and self.layout.reply_syntax.is_in_thought(text)
        return [EncodedPrompt(requests, reader=PartReader(self.layout, tuple(tools), is_in_thought))]

    def _for_thoughts_of(self, body: ChatRequest) -> PromptEncoder:
        """The encoder for what `body` says of thoughts: whether there are any, and with how much effort."""
        is_on, effort = body.enables_thinking, body.effort
        if effort == "none":
            if is_on:
                raise RequestProblem(
                    "`reasoning_effort` none and `enable_thinking` true contradict each other; leave one of them out.",
                    param="reasoning_effort",
                )
            is_on, effort = False, None
        encoder = self if is_on in (None, self.layout.leaves_thoughts) else self._with_other_thoughts
        return encoder if effort is None else encoder._by_effort[effort]

    @cached_property
    def _by_effort(self) -> Mapping[str, PromptEncoder]:
        """An encoder for each effort. Raises `RequestProblem` where the chat template reads none."""
        encoders = {name: replace(self, layout=replace(self.layout, effort=name)) for name in EFFORTS}
        question = [{"role": "user", "content": "a"}]
        texts = set[str]()
        for encoder in encoders.values() if self.layout.name == "chat" else ():
            with suppress(ChatTemplateError):  # of an effort that the template refuses
                texts.add(encoder.layout.chat_prompt(question))
        if len(texts) < 2:
            raise RequestProblem(
                "`reasoning_effort`: this model's chat template reads none; leave it out.", param="reasoning_effort"
            )
        return encoders

    @cached_property
    def _with_other_thoughts(self) -> PromptEncoder:
        """The encoder of replies with thoughts, for a model that was trained without, and the other way about."""
        if self.layout.leaves_thoughts:
            return replace(self, layout=replace(self.layout, reasoning="drop"))
        if self.layout.reply_syntax.thoughts is None:
            raise RequestProblem(
                "`chat_template_kwargs.enable_thinking`: this model's chat template has no thoughts; leave it out.",
                param="chat_template_kwargs.enable_thinking",
            )
        return replace(self, layout=replace(self.layout, reasoning="mask"))

    def encode_instruction(self, body: InstructRequest) -> list[EncodedPrompt]:
        """Instruction and input in the prompt format of training."""
        ids = self._instruction(body.instruction, body.input, param="input")[1]
        return [EncodedPrompt(self._requests(body, ids, body.max_tokens, param="input"))]

    def render(self, body: RenderRequest) -> tuple[str, list[int]]:
        """The prompt that the model would read, as text and as token ids."""
        if body.messages:
            return self._conversation(body.messages)
        return self._instruction(body.instruction, body.input, param="input")

    def check_known(self, ids: Iterable[int], *, param: str) -> None:
        """Raises `RequestProblem` for an id that the model's weights or the tokenizer do not have.

        A tokenizer may have more special tokens than the weights have rows, and a text that spells one gets its id.
        """
        size = min(self.vocabulary, len(self.layout.tokenizer))
        if (highest := max(ids, default=0)) >= size:
            raise RequestProblem(f"`{param}`: token id {highest} is outside the vocabulary of {size}.", param=param)

    def _instruction(self, instruction: str, input: str, *, param: str) -> tuple[str, list[int]]:
        try:
            text = self.layout.prompt(instruction, input)
        except ChatTemplateError as error:
            raise RequestProblem(f"`{param}`: {error}", param=param) from error
        return self.layout.shown(text), self.layout.encode_prompt(text)

    def _conversation(self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[int]]:
        messages = [message.turn for message in turns]
        if messages[-1]["role"] not in ("user", "tool"):
            raise RequestProblem("`messages`: the last message must be the user's.", param="messages")
        self._check_tools(messages, tools)
        if self.layout.name == "chat":
            try:
                return self.layout.shown(self.layout.chat_prompt(messages, tools)), self.layout.encode_chat(messages, tools)
            except ChatTemplateError as error:
                raise RequestProblem(f"`messages`: {error}", param="messages") from error
        if len(messages) > 1:
            raise RequestProblem(
                f"`messages`: this model was trained in the layout `{self.layout.name}`, which has no turns;"
                " send exactly one user message.",
                param="messages",
            )
        return self._instruction(messages[0]["content"], "", param="messages")

    def _check_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
        """Refuses functions, calls and results that the model could not read."""
        has_calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        if not tools and not has_calls:
            return
        dialogues, param = self.layout.dialogues, "tools" if tools else "messages"
        if dialogues is None:
            reason = (
                f"this model was trained in the layout `{self.layout.name}`, version {self.layout.version}, which has no functions;"
            )
            raise RequestProblem(f"`{param}`: {reason} leave them out.", param=param, code="tools_not_supported")
        if dialogues.fault is not None:
            raise RequestProblem(
                f"`{param}`: this model's chat template {dialogues.fault}", param=param, code="tools_not_supported"
            )

    def _requests(
        self, body: GenerationFields, prompt: list[int], max_tokens: int | None, *, param: str, score_from: int | None = None
    ) -> tuple[GenerationRequest, ...]:
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
        self.check_known(body.logit_bias, param="logit_bias")
        first_seed = secrets.randbits(62) if body.seed is None else body.seed
        request = GenerationRequest(
            prompt=tuple(prompt),
            max_new_tokens=room if max_tokens is None else max(max_tokens, 1),
            stop_ids=frozenset() if body.ignore_eos else frozenset(self.layout.stop_ids),
            logprobs=body.scored_tokens,
            score_from=score_from,
        )
        sampling = Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            seed=first_seed,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            bias=body.logit_bias,
        )
        seeds = range(first_seed, first_seed + body.n)
        return tuple(replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds)
