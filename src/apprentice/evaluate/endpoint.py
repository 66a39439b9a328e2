"""Questions to an OpenAI-compatible endpoint instead of a model in memory: what is served is what is scored.

Choices are scored through `/v1/completions` with `echo` and `logprobs`, replies generated through the same route; prompts go as
token ids, so that the endpoint sees exactly what a local model would. What cannot be had after a bounded number of tries becomes
`unscored` with its reason, and the rest goes on. Knows nothing of Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pyarrow as pa

from apprentice.data.layout import SEPARATOR
from apprentice.errors import EvaluationError

if TYPE_CHECKING:
    from apprentice.evaluate.scorer import Manner

TRIES = 4
WAIT_S = 0.5  # before the second try; doubled for each further one
AT_ONCE = 16  # requests under way
GIVE_UP_AFTER = 8  # requests in a row that came to nothing: then the rest of a block is not even tried


@dataclass(frozen=True)
class Endpoint:
    """Where to ask: the address (with or without `/v1`), the model's name there, a key if one is needed."""

    url: str
    model: str
    key: str | None = None
    timeout_s: float = 120.0

    @property
    def completions(self) -> str:
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def model_at(url: str, key: str | None = None, timeout_s: float = 20.0) -> str:
    """The name of the first model that the endpoint lists. Raises `EvaluationError` if it does not answer so."""
    endpoint = Endpoint(url, "", key)
    try:
        reply = httpx.get(endpoint.completions.removesuffix("completions") + "models", headers=endpoint.headers, timeout=timeout_s)
        return str(reply.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise EvaluationError(
            f"no model list at {url} ({type(error).__name__}); start the endpoint, check the address and the key, or name --model."
        ) from error


class Unscored(Exception):  # noqa: N818 - it is a result
    """Why one question has no answer; `lost` where the endpoint did not answer at all."""

    def __init__(self, reason: str, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


class EndpointScorer:
    """Answers blocks of questions by asking an endpoint; the same call as `Scorer`."""

    def __init__(self, endpoint: Endpoint, manner: Manner) -> None:
        self._endpoint, self._manner = endpoint, manner
        self._lost = 0  # requests in a row that came to nothing
        self._priors: dict[tuple[tuple[int, ...], ...], list[float]] = {}

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block of the schema `ASKED` becomes one of `ANSWERED`, every question with an answer or with `unscored`."""
        from apprentice.evaluate.scorer import ANSWERED

        with (
            httpx.Client(timeout=self._endpoint.timeout_s, headers=self._endpoint.headers) as http,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):
            rows = list(pool.map(lambda question: self._answer(http, question), block.to_pylist()))
        return pa.Table.from_pylist(rows, schema=ANSWERED)

    def _answer(self, http: httpx.Client, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if not question["choices"]:
                return {"place": question["place"], "prediction": self._generated(http, question["prompt_ids"])}
            sums = self._sums(http, question["prompt_ids"], question["choice_ids"])
            priors = self._prior(http, question["choice_ids"]) if self._manner.priors else None
            return {"place": question["place"], "choice_logprobs": sums, "choice_priors": priors}
        except Unscored as reason:
            return {"place": question["place"], "unscored": str(reason)}

    def _prior(self, http: httpx.Client, choices: Sequence[Sequence[int]]) -> list[float]:
        key = tuple(tuple(ids) for ids in choices)
        if key not in self._priors:
            self._priors[key] = self._sums(http, self._manner.empty_prompt, choices)
        return self._priors[key]

    def _sums(self, http: httpx.Client, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
        return [self._sum(http, prompt, choice) for choice in choices]

    def _sum(self, http: httpx.Client, prompt: Sequence[int], choice: Sequence[int]) -> float:
        """The log-probability of `choice` after `prompt`, from the echoed tokens."""
        ids = [*prompt, *choice]
        asked = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        reply = self._post(http, asked)
        try:
            values = reply["choices"][0]["logprobs"]["token_logprobs"]
            total = float(sum(values[len(prompt) : len(ids)]))
        except (LookupError, TypeError, ValueError) as error:
            raise Unscored("the endpoint gave no log-probabilities of the prompt (`echo` with `logprobs`)") from error
        if len(values) not in (len(ids), len(ids) + 1) or not math.isfinite(total) or total > 1e-3:
            raise Unscored(f"the endpoint gave {len(values)} log-probabilities for {len(ids)} tokens, or impossible ones")
        return total

    def _generated(self, http: httpx.Client, prompt: Sequence[int]) -> str:
        from apprentice.evaluate.generate import bounded

        layout = self._manner.layout
        stop = {} if layout.name == "chat" else {"stop": [SEPARATOR.strip("\n")]}
        reply = self._post(http, {"prompt": list(prompt), "max_tokens": self._manner.reply, "temperature": 0, **stop})
        try:
            text = reply["choices"][0]["text"]
            return bounded(layout, text if isinstance(text, str) else text["text"])
        except (LookupError, TypeError) as error:
            raise Unscored("the endpoint's reply has no text") from error

    def _post(self, http: httpx.Client, asked: Mapping[str, Any]) -> Any:
        """The endpoint's body. Raises `Unscored` after `TRIES` tries, or at once where another try would be no use."""
        if self._lost >= GIVE_UP_AFTER:
            raise Unscored(f"not asked: {self._lost} requests in a row came to nothing", lost=True)
        reason = ""
        for number in range(TRIES):
            if number:
                time.sleep(WAIT_S * 2 ** (number - 1))
            try:
                reply = http.post(self._endpoint.completions, json={"model": self._endpoint.model, **asked})
                if reply.status_code == 429 or reply.status_code >= 500:
                    reason = f"the endpoint answered {reply.status_code}"
                    continue
                if reply.status_code != 200:
                    raise Unscored(f"the endpoint answered {reply.status_code}: {' '.join(reply.text.split())[:200]}")
                body = reply.json()
            except httpx.HTTPError as error:
                reason = f"the endpoint did not answer ({type(error).__name__})"
            except ValueError:
                reason = "the endpoint's reply is not JSON"
            else:
                self._lost = 0
                return body
        self._lost += 1
        raise Unscored(f"{reason}, {TRIES} times", lost=True)
