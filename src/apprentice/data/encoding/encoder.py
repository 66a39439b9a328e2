"""Tokenization as a recipe's objective needs it: prompt and answer, two answers to a prompt, or a prompt alone."""

from __future__ import annotations

from collections.abc import Sequence

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.quality import layout_of_each_class
from apprentice.data.encoding.tokenize import Tokenized, drop_reason, encode, encode_labelled, encode_pairs, encode_prompts
from apprentice.tasks.schema import Example


class ExampleEncoder:
    """Tokenizes rendered examples of a corpus, many at once."""

    def __init__(self, corpus: Corpus) -> None:
        self._recipe, self._layout = corpus.recipe, corpus.layout
        self._sizes = (corpus.recipe.data.max_length, corpus.target_length, corpus.row_length)
        self._class_of = corpus.qualities
        qualities = corpus.recipe.data.qualities
        self._layout_of_class: dict[str, Layout] = layout_of_each_class(qualities, corpus.layout) if qualities else {}

    def encode(self, items: Sequence[tuple[Example, Sequence[Exemplar]]]) -> list[Tokenized | None]:
        """Token ids of every (example, exemplars); None for an example that is dropped (see `drop_reason`).

        An on-policy run gets the prompt alone, short enough that `grpo.max_new_tokens` of a reply fit behind it.
        """
        data, training = self._recipe.data, self._recipe.training
        if training.aim.rounds:
            room = data.max_length - training.grpo.max_new_tokens
            return encode_prompts(self._layout, [example for example, _ in items], room)
        if training.aim.labels:
            return encode_labelled(self._layout, items, data.max_length)
        if training.aim.pairs:
            return encode_pairs(self._layout, [example for example, _ in items], data.max_length)
        if not self._class_of:
            return encode(self._layout, items, *self._sizes)
        # Each class of mixed-quality data has a prompt format of its own.
        encoded = {
            name: iter(encode(layout, [item for item in items if self._class_of[item[0].task] == name], *self._sizes))
            for name, layout in self._layout_of_class.items()
        }
        return [next(encoded[self._class_of[example.task]]) for example, _ in items]

    def drop_reason(self, example: Example, exemplars: Sequence[Exemplar] = ()) -> str:
        """Why `encode` dropped this example (see `tokenize.drop_reason`)."""
        return drop_reason(self._layout, example, exemplars)
