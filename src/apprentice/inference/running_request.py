"""State of a generation request while it runs in the scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from apprentice.inference.generation_request import GenerationRequest, ScoredToken, SplitPrompt
from apprentice.inference.token_scoring import score_tokens


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
