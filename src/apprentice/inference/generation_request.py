"""Generation requests, their state while they run, and the tokens that they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from apprentice.errors import ModelError
from apprentice.inference.lora import Lora
from apprentice.inference.sampler import GREEDY, Constraint, Sampling
from apprentice.inference.token_scoring import ScoredToken, score_tokens

Finish = Literal["stop", "length"]
NOT_FINITE = (
    "the model's logits are not finite, and nothing can be written by them; its weights are damaged, or they leave their number"
    " format's range: try model.dtype float32."
)


@dataclass(frozen=True)
class GenerationRequest:
    """Request for a reply. It ends at one of `stop_ids`, after `max_new_tokens`, or where the context is full.

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


@dataclass
class RunningRequest:
    """State of a request that has a KV slot.

    The decoder has computed the tokens up to position `start`; of the `pending` ones behind them the next pass computes the first
    `scheduled`. `reused` prompt tokens were copied from the cache.
    """

    key: Hashable
    request: GenerationRequest
    prompt: SplitPrompt
    slot: int
    pending: Sequence[int]
    start: int = 0
    reused: int = 0
    scheduled: int = 0
    produced: int = 0  # tokens of the reply so far
    reply_counts: Counter[int] = field(default_factory=Counter)  # how often each token is in the reply, for penalties
    prompt_scores: list[ScoredToken] = field(default_factory=list)

    @property
    def scheduled_ids(self) -> Sequence[int]:
        """Token ids that the next pass computes."""
        return self.pending[: self.scheduled]

    @property
    def is_prefill(self) -> bool:
        """True while the prompt is computed: there is no token of the reply yet."""
        return not self.produced

    @property
    def needs_all_logits(self) -> bool:
        """True if the next pass needs the logits after every scheduled token, to score the prompt; else only after the last."""
        return self.is_prefill and self.prompt.score_from is not None

    @property
    def logit_rows(self) -> int:
        """Rows of logits that the next pass gives for this request."""
        return self.scheduled if self.needs_all_logits else 1

    @property
    def used_positions(self) -> int:
        """Positions of the KV cache that it uses, the encoder's among them."""
        return self.start + len(self.prompt.encoder_ids) if self.start else 0

    def score_prompt(self, logits: Tensor) -> None:
        """Scores the prompt's tokens that follow the scheduled ones, from their `logits` (scheduled tokens, vocabulary)."""
        first, ids = self.prompt.score_from or 0, self.prompt.decoder_ids
        if self.start == first == 0:
            self.prompt_scores.append(ScoredToken(ids[0], None))
        begin = max(first, self.start + 1)
        targets = ids[begin : self.start + 1 + self.scheduled]
        rows = logits[begin - self.start - 1 :][: len(targets)]
        self.prompt_scores += score_tokens(rows, targets, [self.request.logprobs or 0] * len(targets))

    def advance(self) -> None:
        """Notes that the scheduled tokens are computed."""
        self.start += self.scheduled
        self.pending = self.pending[self.scheduled :]
        self.scheduled = 0
