"""Replies of one request, generated side by side, and the account that is closed at their end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from apprentice.serve.api.limits.accounts import Account
from apprentice.serve.api.schemas.responses import Usage
from apprentice.serve.generation.replies.streams import ReplyChunk, ReplyStream, merge_replies


class ReplyGroup:
    """The `replies` to `prompts` different prompts, equally many to each; iterating gives their chunks as they arrive.

    Must be closed, which frees the engine's slots.
    """

    def __init__(self, replies: Sequence[ReplyStream], prompts: int, account: Account) -> None:
        self.replies = replies
        self._prompts = prompts
        self._account = account
        self._chunks = merge_replies(replies)
        self._first_token_at: float | None = None  # by `time.perf_counter`

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[ReplyStream, ReplyChunk]:
        arrival = await anext(self._chunks)
        self._first_token_at = self._first_token_at or time.perf_counter()
        return arrival

    @property
    def usage(self) -> Usage:
        """Tokens so far: those of each prompt, counted once, and those of all replies."""
        first_of_prompts = self.replies[:: len(self.replies) // self._prompts]
        prompt_tokens = sum(len(reply.request.prompt) for reply in first_of_prompts)
        cached = sum(reply.cached for reply in first_of_prompts)
        thoughts = sum(reply.thought_tokens for reply in self.replies)
        return Usage.of(prompt_tokens, sum(len(reply.ids) for reply in self.replies), cached, thoughts)

    async def close(self, status: int) -> None:
        """Ends all replies and the account; `status` is the HTTP status that is counted."""
        await self._chunks.aclose()
        for reply in self.replies:
            reply.tokens.close()
        self._account.close(self.usage, self._first_token_at, status)
