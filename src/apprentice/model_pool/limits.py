"""How long prompts and replies may be, and how questions are answered."""

from __future__ import annotations

from dataclasses import dataclass

from apprentice.data.encoding.prompt_format import Layout


@dataclass(frozen=True)
class Limits:
    """Tokens: of a prompt, of a generated reply, and of what the model can see at once (None: no bound is known)."""

    prompt: int
    reply: int
    context: int | None = None

    def prompt_before(self, answer: int) -> int:
        """The longest prompt before an answer of so many tokens."""
        return self.prompt if self.context is None else min(self.prompt, self.context - answer)


@dataclass(frozen=True)
class Manner:
    """How questions are answered: the layout they are phrased in, the longest reply, and whether choices need priors."""

    layout: Layout
    reply: int  # tokens
    priors: bool = False

    @property
    def empty_prompt(self) -> list[int]:
        """The prompt of an empty question, after which a choice's prior is taken."""
        return self.layout.empty_prompt
