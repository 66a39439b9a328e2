"""From a request of the protocol to token ids, in the layout of the prompt contract; what does not fit is refused in one sentence.

Knows the layout and the size of the context; nothing of engines or HTTP.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import jinja2

from apprentice.data.layout import Layout
from apprentice.errors import ContractError
from apprentice.serve.engine import Request
from apprentice.serve.protocol import Asked, ChatRequest, CompletionRequest, InstructRequest, RequestProblem


@dataclass(frozen=True)
class Phrasing:
    """How the model is spoken to. All methods raise `RequestProblem`."""

    layout: Layout
    context: int

    def completion(self, asked: CompletionRequest) -> Request:
        """Raw text as it is, or token ids."""
        if isinstance(asked.prompt, str):
            return self._request(asked, self.layout.encode_prompt(asked.prompt), asked.max_tokens, param="prompt")
        size = len(self.layout.tokenizer)
        if outside := [id for id in asked.prompt if id >= size]:
            raise RequestProblem(f"`prompt`: token id {outside[0]} is outside the vocabulary of {size}.", param="prompt")
        return self._request(asked, asked.prompt, asked.max_tokens, param="prompt")

    def chat(self, asked: ChatRequest) -> Request:
        """A conversation under the chat template; one user turn, the instruction, where the layout has no turns."""
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        if messages[-1]["role"] != "user":
            raise RequestProblem("`messages`: the last message must be the user's.", param="messages")
        if self.layout.name == "chat":
            try:
                ids = self.layout.encode_chat(messages)
            except (jinja2.TemplateError, ContractError) as error:
                raise RequestProblem(f"`messages`: the model's chat template refuses them: {error}.", param="messages") from error
        elif len(messages) > 1:
            raise RequestProblem(
                f"`messages`: this model was trained in the layout `{self.layout.name}`, which has no turns;"
                " send exactly one user message.",
                param="messages",
            )
        else:
            ids = self.layout.encode_prompt(self.layout.prompt(messages[0]["content"]))
        most = asked.max_completion_tokens or asked.max_tokens
        return self._request(asked, ids, most, param="messages")

    def instruct(self, asked: InstructRequest) -> Request:
        """Instruction and input, phrased as in training."""
        text = self.layout.prompt(asked.instruction, asked.input)
        return self._request(asked, self.layout.encode_prompt(text), asked.max_tokens, param="input")

    def _request(self, asked: Asked, prompt: list[int], max_tokens: int | None, *, param: str) -> Request:
        if not prompt:
            raise RequestProblem(f"`{param}` is empty; give at least one token.", param=param)
        room = self.context - len(prompt)
        if room < (max_tokens or 1):
            raise RequestProblem(
                f"the prompt has {len(prompt)} tokens and the reply may have {max_tokens or 1}; at most"
                f" {self.context} fit together. Shorten the prompt or lower max_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        return Request(
            prompt=tuple(prompt),
            max_tokens=room if max_tokens is None else max_tokens,
            stop_ids=frozenset() if asked.ignore_eos else frozenset(self.layout.stop_ids),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        )
