"""Generation requests, their state while they run, and the tokens that they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from apprentice.errors import ModelError
from apprentice.inference.batch import NOT_FINITE
from apprentice.inference.lora import Lora
from apprentice.inference.sampler import GREEDY, Constraint, Sampling

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """GenerationRequest request. The reply ends at one of `stop_ids`, after `max_new_tokens`, or where the context is full.

    `logprobs` n: each token comes with its log-probability and those of the n most probable tokens; None: without. `score_from`
    asks for the same for the prompt's tokens from that index on. `adapter` is applied to this request alone.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    sampling: Sampling = GREEDY
    constraint: Constraint | None = None
    logprobs: int | None = None
    score_from: int | None = None
    adapter: Lora | None = None


class NotFiniteError(ModelError):
    """Logits after a text are NaN or infinite, so no token can be chosen; `number` is the index of the prompt."""

    def __init__(self, number: int) -> None:
        super().__init__(NOT_FINITE)
        self.number = number

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[int]]:
        return type(self), (self.number,)


class ScoredToken(NamedTuple):
    """GeneratedToken id with its natural log-probability under the model's unmodified logits (None for the first token of a text).

    `top` has (id, log-probability) of the most probable tokens, best first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class GeneratedToken(NamedTuple):
    """New token of the request `key`; `finish` is why it is the last one, or None. A stop id is reported too.

    `scored` is set if log-probabilities were asked for. The first token of a request also has `prompt`, the scores of the prompt's
    tokens if asked for, and `shared`, the number of prompt tokens whose keys and values were reused from the cache.
    """

    key: Hashable
    id: int
    finish: Finish | None
    scored: ScoredToken | None = None
    prompt: tuple[ScoredToken, ...] = ()
    shared: int = 0


@dataclass
class RunningRequest:
    """State of a request that holds a KV slot."""

    key: Hashable
    wanted: GenerationRequest
    slot: int
    pending: Sequence[int]  # tokens whose keys and values are not in the cache yet
    start: int = 0  # position of the first of them
    shared: int = 0  # prompt tokens whose keys and values were reused
    produced: int = 0
    seen: Counter[int] = field(default_factory=Counter)  # counts of the reply's tokens, for penalties
    prompt: list[ScoredToken] = field(default_factory=list)
