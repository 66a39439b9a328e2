"""Sample replies to a few fixed instructions while a run trains, so that a person sees what the model learns.

Greedy decoding without a KV cache: the training engine makes one forward pass for each of `MOST_TOKENS` tokens. A reply that ends
early takes as many, because ZeRO-3 gathers weights in each pass and all workers must make equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apprentice.data.encoding.prompt_format import Layout

MOST_TOKENS = 32  # in a reply

NextToken = Callable[[Sequence[int], Sequence[int]], int]  # (prompt, reply so far) → id of the next token


class SampleReplies:
    """Sample replies to `instructions`, each put into the prompt format `layout`."""

    def __init__(self, layout: Layout, instructions: Sequence[str]) -> None:
        self._layout = layout
        self._prompts = [(text, layout.encode_prompt(layout.prompt(text))) for text in instructions]

    def generate(self, next_token: NextToken) -> list[dict[str, str]]:
        """A dict with `instruction` and `reply` for each; `next_token(prompt, reply)` gives the next token id.

        All workers must call it.
        """
        return [{"instruction": text, "reply": self._reply(prompt, next_token)} for text, prompt in self._prompts]

    def _reply(self, prompt: Sequence[int], next_token: NextToken) -> str:
        reply: list[int] = []
        for _ in range(MOST_TOKENS):
            reply.append(next_token(prompt, reply))
        stops = set(self._layout.stop_ids)
        end = next((place for place, token in enumerate(reply) if token in stops), len(reply))
        return self._layout.tokenizer.decode(reply[:end]).strip()
