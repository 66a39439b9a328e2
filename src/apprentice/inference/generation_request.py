"""Generation requests and the tokens that they get, for all engines; without PyTorch, so that requests can be made without it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from apprentice.errors import ModelError

Finish = Literal["stop", "length"]
NOT_FINITE = (
    "the model's logits are not finite, and nothing can be written by them; its weights are damaged, or they leave their number"
    " format's range: try model.dtype float32."
)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a request.

    Temperature 0 takes the most probable token. `top_p` keeps the fewest tokens that together have that probability. Before that,
    `bias` (token id → number) is added to the logits; tokens that the reply has already lose `presence_penalty` once, and
    `frequency_penalty` for each occurrence.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is taken, without a random number."""
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """True if logits have to be adjusted before a token is drawn."""
        return bool(self.frequency_penalty or self.presence_penalty or self.bias)


GREEDY = Sampling()


class Constraint(Protocol):
    """Constraint on a reply, token by token, such as a JSON schema; it has state and belongs to one request."""

    def allowed(self) -> np.ndarray:
        """Bool array: for each token id, whether it may come next. Ids beyond its end may not; it may be longer than the logits."""

    def accept(self, id: int) -> None:
        """Advances the state by the token `id` that was chosen."""


@dataclass(frozen=True)
class GenerationRequest:
    """Request for a reply. It ends at one of `stop_ids`, after `max_new_tokens`, or where the context is full.

    `logprobs` n: each token comes with its log-probability and those of the n most probable tokens; None: without. `score_from`
    asks for the same for the prompt's tokens from that index on. `adapter`, as the engine has loaded it, is for this request alone.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    sampling: Sampling = GREEDY
    constraint: Constraint | None = None
    logprobs: int | None = None
    score_from: int | None = None
    adapter: Any = None

    @property
    def adapter_number(self) -> int:
        """Number of the adapter, 0 for none."""
        return self.adapter.number if self.adapter is not None else 0


class NotFiniteError(ModelError):
    """Logits after a text are NaN or infinite, so no token can be chosen; `number` is the index of the prompt."""

    def __init__(self, number: int) -> None:
        super().__init__(NOT_FINITE)
        self.number = number

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[int]]:
        return type(self), (self.number,)


class ScoredToken(NamedTuple):
    """Token id with its natural log-probability under the model's unmodified logits (None for the first token of a text).

    `top` has (id, log-probability) of the most probable tokens, best first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class GeneratedToken(NamedTuple):
    """New token of the request `key`; `finish` is why it is the last one, or None. A stop id is reported too.

    `score` is set if log-probabilities were asked for. The first token of a request also has `prompt_scores`, those of the prompt's
    tokens if asked for, and `reused`, the number of prompt tokens whose keys and values were reused from the cache.
    """

    key: Hashable
    id: int
    finish: Finish | None
    score: ScoredToken | None = None
    prompt_scores: tuple[ScoredToken, ...] = ()
    reused: int = 0


class SplitPrompt(NamedTuple):
    """A prompt as a model reads it: ids that the encoder reads (none in a causal model), then those that the decoder reads.

    `score_from` is the index of the first of `decoder_ids` to score, None to score none.
    """

    encoder_ids: Sequence[int]
    decoder_ids: Sequence[int]
    score_from: int | None
