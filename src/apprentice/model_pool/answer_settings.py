"""Limits on the tokens of prompts and replies, and the settings under which questions are answered."""

from __future__ import annotations

from dataclasses import dataclass

from apprentice.data.encoding.prompt_format import Layout


@dataclass(frozen=True)
class TokenLimits:
    """Maximal tokens of a prompt, of a generated reply, and of the model's context (None: no bound is known)."""

    prompt: int
    reply: int
    context: int | None = None

    def prompt_before(self, answer: int) -> int:
        """Maximal tokens of a prompt that is followed by an answer of `answer` tokens."""
        return self.prompt if self.context is None else min(self.prompt, self.context - answer)


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of answering: prompt format, maximal tokens of a reply, and whether the priors of choices are needed (PMI)."""

    layout: Layout
    reply: int  # tokens
    priors: bool = False

    @property
    def empty_prompt(self) -> list[int]:
        """Token ids of the prompt of an empty question; a choice's prior is its log-probability after these."""
        return self.layout.empty_prompt
