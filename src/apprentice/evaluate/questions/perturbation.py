"""Perturbations of a question: other letter case, punctuation, synonyms, order of choices or of input, politeness. Seeded.

A perturbation keeps the meaning of the question and its right answer. If it finds nothing to change, or would change an answer, the
perturbed question is dropped and counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np

from apprentice.tasks.schema import Example

Random = np.random.Generator

# Words that are common in instructions, with synonyms.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "answer": ("reply to", "respond to"),
    "article": ("text", "piece"),
    "based on": ("according to", "going by"),
    "choose": ("pick", "select"),
    "correct": ("right",),
    "decide": ("determine", "judge"),
    "describe": ("portray", "characterise"),
    "does": ("would",),
    "explain": ("clarify", "spell out"),
    "find": ("locate", "identify"),
    "following": ("next",),
    "give": ("provide", "state"),
    "is": ("would you say it is",),
    "message": ("note",),
    "name": ("state", "tell me"),
    "passage": ("text", "paragraph"),
    "question": ("query",),
    "read": ("look at", "go through"),
    "review": ("critique", "opinion"),
    "say": ("state",),
    "select": ("choose", "pick"),
    "sentence": ("line", "statement"),
    "summarise": ("sum up", "condense"),
    "summarize": ("sum up", "condense"),
    "tell": ("let me know",),
    "text": ("passage",),
    "topic": ("subject", "theme"),
    "translate": ("put", "render"),
    "use": ("take",),
    "using": ("with",),
    "write": ("compose", "put down"),
}
_BEFORE = ("Please help me with this. ", "Could you please do the following? ", "I would be grateful for your help. ")
_AFTER = (" Thank you!", " Thanks a lot.", " Many thanks in advance.")
_ENDS = (".", "!", "?", ":")
_ENUMERATOR = re.compile(r"[).:]\s+\S")  # behind a letter or number that stands before what it names


def perturb(example: Example, kind: str, seed: int, row: int) -> Example | None:
    """Applies the perturbation `kind` to `example`; None if that changes nothing, or would change the answer.

    The change is a pure function of `seed`, task, `row`, template and `kind`.
    """
    random = np.random.default_rng(
        list(hashlib.sha256(f"perturbation {seed} {example.task} {row} {example.template} {kind}".encode()).digest())
    )
    changed = PERTURBATIONS[kind](example, random)
    return None if changed is None or changed == example else changed


def _case(example: Example, random: Random) -> Example | None:
    ways: tuple[Callable[[str], str], ...] = (str.lower, str.upper)
    changed = ways[int(random.integers(len(ways)))](example.instruction)
    return replace(example, instruction=_restore_choices(example, changed))


def _restore_choices(example: Example, changed: str) -> str:
    """Restores the letter case of the choices in `changed`, the instruction in another case."""
    for choice in sorted(example.choices, key=len, reverse=True):
        changed = re.sub(rf"\b{re.escape(choice)}\b", _as_it_is(choice), changed, flags=re.IGNORECASE)
    return changed


def _as_it_is(text: str) -> Callable[[re.Match[str]], str]:
    return lambda _: text


def _punctuation(example: Example, random: Random) -> Example | None:
    text = example.instruction
    bare = text.rstrip("".join(_ENDS) + " ")
    endings = [ending for ending in ("", "...", "!!", " :") if bare + ending != text]
    return replace(example, instruction=bare + endings[int(random.integers(len(endings)))])


def _synonyms(example: Example, random: Random) -> Example | None:
    def other(match: re.Match[str]) -> str:
        word = match.group(0)
        ways = SYNONYMS[word.lower()]
        chosen = ways[int(random.integers(len(ways)))]
        return chosen.capitalize() if word[0].isupper() else chosen

    answers = " ".join((*example.choices, example.target)).lower()
    words = [word for word in SYNONYMS if not re.search(rf"\b{re.escape(word)}\b", answers)]
    pattern = rf"\b({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})\b"
    return replace(example, instruction=re.sub(pattern, other, example.instruction, flags=re.IGNORECASE))


def _choice_order(example: Example, random: Random) -> Example | None:
    """Rotates the choices in the text that lists them; None unless each occurs in it exactly once, without overlap.

    Letters that stand before the answers, as in "A: a bird", name them by their places: to rotate them would change the answer.
    """
    text = f"{example.instruction}\x00{example.input}"
    places = []
    for choice in example.choices:
        spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", text)]
        if len(spans) != 1:
            return None
        places.append(spans[0])
    if all(end - start <= 2 and _ENUMERATOR.match(text, end) for start, end in places):
        return None
    ordered = sorted(range(len(places)), key=lambda number: places[number])
    overlap = any(places[left][1] > places[right][0] for left, right in pairwise(ordered))
    if len(ordered) < 2 or overlap:
        return None
    turn = 1 + int(random.integers(len(ordered) - 1))  # a rotation moves every choice
    for number in reversed(range(len(ordered))):  # from the end, so that earlier offsets stay valid
        start, end = places[ordered[number]]
        text = text[:start] + example.choices[ordered[(number + turn) % len(ordered)]] + text[end:]
    instruction, _, input_text = text.partition("\x00")
    return replace(example, instruction=instruction, input=input_text)


def _input_first(example: Example, random: Random) -> Example | None:
    if not example.input:
        return None
    return replace(example, instruction=f"{example.input}\n\n{example.instruction}", input="")


def _politeness(example: Example, random: Random) -> Example | None:
    before, after = _BEFORE[int(random.integers(len(_BEFORE)))], _AFTER[int(random.integers(len(_AFTER)))]
    return replace(example, instruction=f"{before}{example.instruction}{after}")


PERTURBATIONS: dict[str, Callable[[Example, Random], Example | None]] = {
    "case": _case,
    "punctuation": _punctuation,
    "synonyms": _synonyms,
    "choice_order": _choice_order,
    "input_first": _input_first,
    "politeness": _politeness,
}
