"""Log-probabilities of a question's choices, scored by the engine a few at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing

from apprentice.inference.generation_request import GenerationRequest
from apprentice.serve.api.limits.accounts import Account
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.responses import Usage
from apprentice.serve.engines.base import TokenStream
from apprentice.serve.generation.prompt_encoding import PromptEncoder
from apprentice.serve.generation.replies.streams import ReplyStream
from apprentice.serve.generation.served_models import ServedModel

_CHOICES_AT_ONCE = 8  # choices of one question that are scored at a time, so that it does not fill the engine


class ChoiceScorer:
    """Scores choices with `model`; `rank_by` is how its prompt contract ranks them."""

    def __init__(self, model: ServedModel, encoder: PromptEncoder) -> None:
        self.rank_by = model.contract.rank_by if model.contract is not None else "sum"
        self._model = model
        self._encoder = encoder

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], account: Account
    ) -> list[list[float]]:
        """Summed natural log-probability of each of `choices` after each of `prompts`, all token ids: [prompt][choice].

        `_CHOICES_AT_ONCE` are scored at a time. Closes `account` unless it raises. Raises `RequestProblem`, with status 500 where
        the model's numbers are not finite.
        """
        requests = self._requests(prompts, choices)
        usage = Usage.of(sum(map(len, prompts)) + len(prompts) * sum(map(len, choices)), 0)
        await account.reserve(usage.prompt_tokens)
        sums = await self._sums(requests, account.deadline)
        if not all(map(math.isfinite, sums)):
            message = "the model's log-probabilities are not finite, so no choice is larger than another."
            raise RequestProblem(message, status=500, kind="server_error", code="not_finite")
        account.close(usage, None, 200)
        return [sums[first : first + len(choices)] for first in range(0, len(sums), len(choices))]

    def _requests(self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]) -> list[GenerationRequest]:
        context = self._model.engine.context
        longest = max(map(len, prompts)) + max(map(len, choices))
        if longest >= context:
            message = f"prompt and choice have {longest} tokens; the context of {context} leaves no room."
            raise RequestProblem(message, param="fields", code="context_length_exceeded")
        for ids in (*prompts, *choices):
            self._encoder.check_known(ids, param="fields")
        return [
            GenerationRequest((*prompt, *ids), max_new_tokens=1, logprobs=0, score_from=len(prompt), stop_ids=frozenset())
            for prompt in prompts
            for ids in choices
        ]

    async def _sums(self, requests: Sequence[GenerationRequest], deadline: float) -> list[float]:
        """The summed log-probability of each request's scored tokens."""
        sums = [0.0] * len(requests)
        opening = self._model.generate(requests[: min(_CHOICES_AT_ONCE, self._model.engine.capacity)])
        unscored = iter(range(len(opening), len(requests)))

        async def score(place: int, tokens: TokenStream) -> None:
            while True:
                tokenizer = self._model.layout.tokenizer
                reply = ReplyStream(place, tokens, tokenizer, requests[place], deadline, is_only_scored=True)
                async with aclosing(reply.chunks()) as chunks:
                    async for chunk in chunks:
                        sums[place] += sum(score.logprob or 0.0 for score in chunk.scores)
                # The request that ended has freed its slot. Nothing is awaited before the next one takes it.
                following = next(unscored, None)
                if following is None:
                    return
                place = following
                (tokens,) = self._model.generate([requests[place]])

        try:
            async with asyncio.TaskGroup() as group:
                for place, tokens in enumerate(opening):
                    group.create_task(score(place, tokens))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for tokens in opening:
                tokens.close()
        return sums
