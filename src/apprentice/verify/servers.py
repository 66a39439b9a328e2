"""Servers of OpenAI's API, each with the routes by which it shows how it makes prompts.

apprentice   /v1/contract, /v1/render
vLLM, SGLang /tokenize with messages or a prompt
llama.cpp    /props with its chat template, /apply-template and /tokenize
TGI          /chat_tokenize, /tokenize
Ollama       nothing but the number of a prompt's tokens
others       the same number, in `usage`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from apprentice.errors import EvaluationError

Messages = Sequence[Mapping[str, Any]]
TIMEOUT_S = 120.0


class Server:
    """A server at `url` (with or without `/v1`) that shows no more than OpenAI's API; `model` is the model's name there.

    `has_answered` says whether it has answered anything but a refusal.
    """

    name = "OpenAI's API"

    def __init__(self, client: httpx.Client, model: str) -> None:
        self.client, self.model, self.has_answered = client, model, False

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON from a POST of `body`, or without one from a GET; None where the server refuses it or gives no JSON."""
        try:
            response = self.client.get(path) if body is None else self.client.post(path, json=body)
            answer = response.json() if response.is_success else None
        except ValueError:
            return None
        except httpx.HTTPError as error:
            raise EvaluationError(
                f"{self.client.base_url} does not answer ({type(error).__name__}); start the server, or check its address."
            ) from error
        self.has_answered |= answer is not None
        return answer

    def encode_messages(self, messages: Messages) -> list[int] | None:
        """The prompt that it makes of messages, as token ids; None where it does not show that."""
        return None

    def encode_text(self, text: str) -> list[int] | None:
        """The prompt that it makes of a text to be continued, as token ids; None where it does not show that."""
        return None

    def chat_template(self) -> str | None:
        """Its chat template; None where it does not show it."""
        return None

    def count_tokens(self, messages: Messages | None, text: str | None) -> int | None:
        """The number of tokens of the prompt that it makes of messages, or of a text; None where it does not say it."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": 1, "temperature": 0}
        if messages is not None:
            reply = self.ask("/v1/chat/completions", body | {"messages": list(messages)})
        else:
            reply = self.ask("/v1/completions", body | {"prompt": text})
        count = _at(reply, "usage", "prompt_tokens")
        return count if isinstance(count, int) else None

    def complete(self, ids: Sequence[int], most: int, biases: Mapping[int, float] | None = None) -> tuple[str, str] | None:
        """Greedy continuation of token ids and why it ended (`stop`, `length`); None where it takes no ids."""
        body: dict[str, Any] = {"model": self.model, "prompt": list(ids), "max_tokens": most, "temperature": 0}
        if biases:
            body["logit_bias"] = {str(token): bias for token, bias in biases.items()}
        choice = _at(self.ask("/v1/completions", body), "choices", 0)
        text, reason = _at(choice, "text"), _at(choice, "finish_reason")
        return (text, str(reason)) if isinstance(text, str) else None


class Apprentice(Server):
    """Our own endpoint."""

    name = "apprentice"

    def contract(self) -> dict[str, Any]:
        """The contract that it follows."""
        return dict(self.ask(f"/v1/contract?model={self.model}") or {})

    def encode_instruction(self, instruction: str, input_text: str) -> list[int] | None:
        """The prompt that it makes of an instruction and its input, in the format of training."""
        body = {"instruction": instruction, "input": input_text, "model": self.model}
        return _ids(self.ask("/v1/render", body), "token_ids")

    def encode_messages(self, messages: Messages) -> list[int] | None:
        """As in `Server`."""
        return _ids(self.ask("/v1/render", {"messages": list(messages), "model": self.model}), "token_ids")


class Vllm(Server):
    """vLLM; SGLang has the second of these routes."""

    name = "vLLM"

    def encode_messages(self, messages: Messages) -> list[int] | None:
        """As in `Server`."""
        body = {"model": self.model, "messages": list(messages), "add_generation_prompt": True}
        return _ids(self.ask("/tokenize", body), "tokens")

    def encode_text(self, text: str) -> list[int] | None:
        """As in `Server`."""
        return _ids(self.ask("/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": True}), "tokens")


class LlamaCpp(Server):
    """llama.cpp's server."""

    name = "llama.cpp"

    def encode_messages(self, messages: Messages) -> list[int] | None:
        """As in `Server`. Its chat routes add a start token only where the template has not."""
        text = _at(self.ask("/apply-template", {"messages": list(messages)}), "prompt")
        if not isinstance(text, str):
            return None
        return self.encode_text(text)

    def encode_text(self, text: str) -> list[int] | None:
        """As in `Server`."""
        return _ids(self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True}), "tokens")

    def chat_template(self) -> str | None:
        """As in `Server`."""
        template = _at(self.ask("/props"), "chat_template")
        return template if isinstance(template, str) and template else None


class TextGenerationInference(Server):
    """Hugging Face's text-generation-inference."""

    name = "TGI"

    def encode_messages(self, messages: Messages) -> list[int] | None:
        """As in `Server`."""
        return self._ids_of(_at(self.ask("/chat_tokenize", {"messages": list(messages)}), "tokenize_response"))

    def encode_text(self, text: str) -> list[int] | None:
        """As in `Server`."""
        return self._ids_of(self.ask("/tokenize", {"inputs": text}))

    @staticmethod
    def _ids_of(tokens: Any) -> list[int] | None:
        ids = [_at(token, "id") for token in tokens] if isinstance(tokens, list) else []
        return ids if ids and all(isinstance(token, int) for token in ids) else None


class Ollama(Server):
    """Ollama, whose templates are of another language than the tokenizers', and which shows no token ids."""

    name = "Ollama"


def connect(url: str, key: str | None = None) -> httpx.Client:
    """A client of the server at `url`. Raises `EvaluationError` for what is no address."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises ValueError
    except ValueError as error:
        raise EvaluationError(f"{url!r} is no address ({error}); write it as http://HOST:PORT.") from error
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=TIMEOUT_S)


def find_server(client: httpx.Client, model: str | None) -> Server:
    """The server behind `client`, known by its routes; `model` is by default the first that it lists.

    Raises `EvaluationError` if it does not answer, or lists no model and none is named.
    """
    asker = Server(client, "")
    name = model or _at(asker.ask("/v1/models"), "data", 0, "id")
    if not isinstance(name, str):
        raise EvaluationError(f"{client.base_url} lists no models at /v1/models; check its address and the key, or name --model.")
    if "golden" in (asker.ask(f"/v1/contract?model={name}") or {}):
        return Apprentice(client, name)
    if "default_generation_settings" in (asker.ask("/props") or {}):
        return LlamaCpp(client, name)
    if "docker_label" in (info := asker.ask("/info") or {}) or "max_total_tokens" in info:
        return TextGenerationInference(client, name)
    if "version" in (asker.ask("/api/version") or {}):
        return Ollama(client, name)
    vllm = Vllm(client, name)
    return vllm if vllm.encode_text("a") is not None else Server(client, name)


def _at(value: Any, *path: str | int) -> Any:
    """What lies in JSON at `path`; None where there is no such place."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _ids(value: Any, name: str) -> list[int] | None:
    ids = _at(value, name)
    is_list = isinstance(ids, list) and all(isinstance(token, int) for token in ids)
    return ids if is_list else None
