"""Replies to a few fixed instructions while a run trains, so that a person sees what it learns.

Greedy and without a cache: the training engine makes one forward pass for each token, equally many on all workers whatever is said,
because ZeRO-3 gathers weights in every pass. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apprentice.data.encoding.prompt_format import Layout

MOST_TOKENS = 32  # of a reply


class Samples:
    """`instructions`, asked as `layout` phrases them."""

    def __init__(self, layout: Layout, instructions: Sequence[str]) -> None:
        self._layout = layout
        self._asked = [(text, layout.encode_prompt(layout.prompt(text))) for text in instructions]

    def taken(self, likeliest: Callable[[Sequence[int], Sequence[int]], int]) -> list[dict[str, str]]:
        """Each `instruction` with its `reply`; `likeliest(prompt, reply)` gives the next token. All workers must call it."""
        return [{"instruction": text, "reply": self._reply(prompt, likeliest)} for text, prompt in self._asked]

    def _reply(self, prompt: Sequence[int], likeliest: Callable[[Sequence[int], Sequence[int]], int]) -> str:
        reply: list[int] = []
        for _ in range(MOST_TOKENS):
            reply.append(likeliest(prompt, reply))
        stops = set(self._layout.stop_ids)
        end = next((place for place, token in enumerate(reply) if token in stops), len(reply))
        return self._layout.tokenizer.decode(reply[:end]).strip()
