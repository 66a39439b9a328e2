"""Questions to an OpenAI-compatible endpoint instead of a model in memory: what is served is what is scored.

Choices are scored through `/v1/completions` with `echo` and `logprobs`, replies generated through the same route; prompts go as
token ids, so that the endpoint sees exactly what a local model would. An endpoint that is down or busy is asked again, when it says
or ever more seldom, for a bounded time; what cannot be had then becomes `unscored` with its reason, and the rest goes on. Knows
nothing of Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

import httpx
import pyarrow as pa
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from apprentice.data.encoding.prompt_format import SEPARATOR
from apprentice.errors import EvaluationError

if TYPE_CHECKING:
    from apprentice.model_pool.limits import Manner

AT_ONCE = 16  # requests under way
PATIENCE_S = 300.0  # how long one that is down or busy is asked again: a restart of an endpoint with its model is shorter
FAULT_PATIENCE_S = 15.0  # the same where it answers, but with a fault of its own, which may be the question's
WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # at most, before the second try and before later ones; what the endpoint says comes first
BUSY = (429, 502, 503)


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


def weights_at(endpoint: Endpoint, timeout_s: float = 20.0) -> tuple[str, str | None] | None:
    """The hashes of the weights that answer there, and of those that they are an adapter of; None where it does not say them.

    Endpoints of apprentice say it in their prompt contract.
    """
    address = endpoint.completions.removesuffix("completions") + "contract"
    try:
        reply = httpx.get(address, params={"model": endpoint.model}, headers=endpoint.headers, timeout=timeout_s)
        contract = reply.raise_for_status().json()
        weights, base = contract["weights_sha256"], contract.get("base_sha256")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError):
        return None
    return (weights, base) if weights and isinstance(weights, str) else None


class Unscored(Exception):  # noqa: N818 - it is a result
    """Why one question has no answer."""


class _Again(Exception):  # noqa: N818 - a result too
    """Why a request came to nothing, and what another one may bring; `after_s` is when the endpoint wants it."""

    def __init__(self, reason: str, after_s: float | None = None, patience_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s
        self.patience_s = PATIENCE_S if patience_s is None else patience_s


class EndpointScorer:
    """Answers blocks of questions by asking an endpoint; the same call as `Scorer`. `sleep` waits so many seconds."""

    def __init__(self, endpoint: Endpoint, manner: Manner, sleep: Callable[[float], None] = time.sleep) -> None:
        self._endpoint, self._manner, self._sleep = endpoint, manner, sleep
        self._silent_since: float | None = None  # when the first of the requests failed that nothing was answered since
        self._probe = Lock()
        self._priors: dict[tuple[tuple[int, ...], ...], list[float]] = {}

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block of the schema `ASKED` becomes one of `ANSWERED`, every question with an answer or with `unscored`."""
        from apprentice.evaluate.scoring.worker import ANSWERED

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
        from apprentice.model_pool.generate import bounded

        layout = self._manner.layout
        stop = {} if layout.name == "chat" else {"stop": [SEPARATOR.strip("\n")]}
        reply = self._post(http, {"prompt": list(prompt), "max_tokens": self._manner.reply, "temperature": 0, **stop})
        try:
            text = reply["choices"][0]["text"]
            return bounded(layout, text if isinstance(text, str) else text["text"])
        except (LookupError, TypeError) as error:
            raise Unscored("the endpoint's reply has no text") from error

    def _post(self, http: httpx.Client, asked: Mapping[str, Any]) -> Any:
        """The endpoint's body. Raises `Unscored` once patience ends, or at once where another try would be no use."""
        silent_since = self._silent_since
        if silent_since is None or time.monotonic() - silent_since <= PATIENCE_S:
            return self._patiently(http, asked)
        # It was waited for long enough. One at a time still looks whether it is back; the others are not even asked.
        if not self._probe.acquire(blocking=False):
            raise Unscored(f"not asked: the endpoint had not answered for {PATIENCE_S:.0f} s")
        try:
            return self._once(http, asked)
        except _Again as again:
            raise Unscored(str(again)) from again
        finally:
            self._probe.release()

    def _patiently(self, http: httpx.Client, asked: Mapping[str, Any]) -> Any:
        tries = Retrying(
            retry=retry_if_exception_type(_Again),
            wait=_wait,
            stop=_is_over,
            sleep=self._sleep,
            reraise=True,
        )
        began = time.monotonic()
        try:
            return tries(self._once, http, asked)
        except _Again as again:
            wish = f", and asks to come back in {again.after_s:.0f} s" if again.after_s else ""
            raise Unscored(f"{again}, for {time.monotonic() - began:.0f} s{wish}") from again

    def _once(self, http: httpx.Client, asked: Mapping[str, Any]) -> Any:
        """One request. Raises `_Again` or `Unscored`."""
        try:
            reply = http.post(self._endpoint.completions, json={"model": self._endpoint.model, **asked})
            if reply.status_code in BUSY:
                raise _Again(f"the endpoint answered {reply.status_code}", _retry_after(reply))
            if reply.status_code >= 500:
                raise _Again(f"the endpoint answered {reply.status_code}", _retry_after(reply), FAULT_PATIENCE_S)
            if reply.status_code != 200:
                raise Unscored(f"the endpoint answered {reply.status_code}: {' '.join(reply.text.split())[:200]}")
            body = reply.json()
        except (httpx.HTTPError, _Again) as error:
            if self._silent_since is None:
                self._silent_since = time.monotonic()
            if isinstance(error, _Again):
                raise
            raise _Again(f"the endpoint did not answer ({type(error).__name__})") from error
        except ValueError as error:
            raise _Again("the endpoint's reply is not JSON", patience_s=FAULT_PATIENCE_S) from error
        self._silent_since = None
        return body


def _wait(state: RetryCallState) -> float:
    """Seconds to the next try: what the endpoint asked for, else longer each time, and not all at the same moment."""
    again = _reason(state)
    return again.after_s if again.after_s is not None else wait_random_exponential(WAIT_S, LONGEST_WAIT_S)(state)


def _is_over(state: RetryCallState) -> bool:
    """Whether the next try would be later than patience lasts."""
    return (state.seconds_since_start or 0.0) + state.upcoming_sleep > _reason(state).patience_s


def _reason(state: RetryCallState) -> _Again:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, _Again)
    return error


def _retry_after(reply: httpx.Response) -> float | None:
    """The header's seconds or date, in seconds from now; None where it has none that can be read."""
    told = reply.headers.get("Retry-After", "")
    try:
        return max(0.0, float(told)) if math.isfinite(float(told)) else None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(told)
    except (TypeError, ValueError):
        return None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
