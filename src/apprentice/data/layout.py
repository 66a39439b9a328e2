"""Layouts: how instruction, input and exemplars become the model's text, the same in training, evaluation and serving.

plain     instruction, blank line, input; the answer after a newline; exemplars before it, with a separator line
alpaca    the section headings of Stanford Alpaca (Taori et al. 2023); exemplars as in plain
chat      the tokenizer's own chat template; exemplars are earlier turns

Prompt and answer are tokenised apart and joined as ids, so that a served prompt has exactly the ids it had in training.
Knows nothing of tasks or packing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from apprentice.errors import ContractError
from apprentice.family import Family, family_of
from apprentice.tokenizer import Tokenizer

LayoutName = Literal["plain", "alpaca", "chat"]
LAYOUT_VERSION = 1  # raised whenever a layout's text changes
SEPARATOR = "\n\n###\n\n"
_MARK = "\u2402answer\u2403"  # stands for an answer while the text after it is looked up
# What chat templates are known to look for in a message, and what else they might.
_QUESTIONS = (
    "a",
    "B\n\nc",
    "<think>d</think>e",
    "<tool_response>f</tool_response>",
    "{{ g }}",
    "<|h|>",
    "</s>",
    "[INST] i [/INST]",
    "é字",
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A solved example shown before the question."""

    instruction: str
    input: str
    answer: str


@dataclass(frozen=True)
class Layout:
    """One layout over one tokenizer.

    `system` is the system text (empty: the template's own default); `date` freezes chat templates that insert today's date
    (`YYYY-MM-DD`; templates see it as `date_string`). `quality` is the class of mixed-quality data that chat templates see under
    that name (empty: they do not, and say what is said to a model that is to reply).
    """

    name: LayoutName
    tokenizer: Tokenizer
    system: str = ""
    date: str = "2025-01-01"
    quality: str = ""

    def __post_init__(self) -> None:
        if self.name not in get_args(LayoutName):
            raise ContractError(f"layout {self.name!r} is unknown; choose one of {', '.join(get_args(LayoutName))}.")
        if self.name == "chat" and self.tokenizer.chat_template is None:
            raise ContractError(
                f"the tokenizer in {self.tokenizer.folder} has no chat template; use layout `plain` or `alpaca`, or give"
                " data.chat_template."
            )

    def prompt(self, instruction: str, input: str = "", exemplars: Sequence[Exemplar] = ()) -> str:
        """The text up to where the answer starts."""
        if self.name == "chat":
            asked = _user_text(instruction, input)
            if self._around and not exemplars and asked == asked.strip():
                return asked.join(self._around)
            turns = [(_user_text(shot.instruction, shot.input), shot.answer) for shot in exemplars]
            return self.chat_prompt([*_messages(turns), {"role": "user", "content": asked}])
        shown = [self._single(shot.instruction, shot.input) + shot.answer for shot in exemplars]
        head = f"{self.system}\n\n" if self.system else ""
        return head + SEPARATOR.join([*shown, self._single(instruction, input)])

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat template's text for OpenAI-style messages, with the assistant's turn opened.

        Raises `ContractError` where the layout has no turns.
        """
        if self.name != "chat":
            raise ContractError(f"layout `{self.name}` has no turns; it takes one instruction.")
        system = [{"role": "system", "content": self.system}] if self.system and messages[0]["role"] != "system" else []
        return self._templated([*system, *messages], generate=True)

    def _templated(self, messages: Sequence[dict[str, str]], *, generate: bool) -> str:
        seen = {"quality": self.quality} if self.quality else {}
        return self.tokenizer.apply_chat_template(messages, generate=generate, date_string=self.date, **seen)

    def chat_pieces(self, messages: Sequence[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """(ids, whether they are an earlier answer with its end) of a conversation whose last turn is opened for the assistant.

        Answers are encoded apart, as they are when they are learnt or generated, so that a conversation that goes on has the ids
        that it had. One piece, none of it an answer, where the chat template changes earlier answers.
        """
        text = self.chat_prompt(messages)
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        if not answers:
            return [(self.encode_prompt(text), False)]
        marks = iter([f"{_MARK}{number}\u2403" for number in range(len(answers))])
        marked = [dict(m, content=next(marks)) if m["role"] == "assistant" else m for m in messages]
        parts = re.split(f"{_MARK}\\d+\u2403", self.chat_prompt(marked))
        rebuilt = "".join(part + answer for part, answer in zip(parts, [*answers, ""], strict=False))
        stripped = [dict(m, content=m["content"].strip()) if m["role"] == "assistant" else m for m in messages]
        behind = parts[1:]
        if (
            len(behind) != len(answers)
            or rebuilt != self.chat_prompt(stripped)
            or not all(p.startswith(self._closing) for p in behind)
        ):
            return [(self.encode_prompt(text), False)]
        rests = self.encode_prompts([parts[0], *(part.removeprefix(self._closing) for part in behind)])
        pieces = [(rests[0], False)]
        for answer, rest in zip(self.encode_answers(answers), rests[1:], strict=True):
            pieces += [(answer + list(self.end_ids), True), (rest, False)]
        return pieces

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation with the assistant's turn opened. Raises `ContractError` where the layout has no turns."""
        return [id for ids, _ in self.chat_pieces(messages) for id in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt's text, with what the tokenizer puts at a text's start (chat templates write that themselves)."""
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        start = [] if self.name == "chat" else list(self.tokenizer.start_ids)
        # An encoder's text is a text of its own, and ends like one; a causal model's prompt goes on with the answer.
        finish = list(self.tokenizer.finish_ids) if self.family == "seq2seq" else []
        encoded = self.tokenizer.encode_batch(texts)
        return [start + ids + finish for ids in encoded] if start or finish else encoded

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers, without the end."""
        return self.tokenizer.encode_batch(texts)

    @cached_property
    def family(self) -> Family:
        """Of the model whose tokenizer this is: an encoder reads prompts as texts of their own."""
        folder = self.tokenizer.folder
        return family_of(folder) if (folder / "config.json").is_file() else "causal"

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids after an answer, trained on: the end token, or what closes the template's assistant turn."""
        if self.name != "chat":
            return (self.tokenizer.end_id,)
        ids = tuple(self.tokenizer.encode(self._closing))
        return ids or (self.tokenizer.end_id,)

    @cached_property
    def _closing(self) -> str:
        """What the chat template writes behind an answer, without white space at its end."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        return self._templated(turns, generate=False).partition(_MARK)[2].rstrip()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation ends."""
        return tuple(sorted({self.tokenizer.end_id, self.end_ids[-1]}))

    @cached_property
    def _around(self) -> tuple[str, str] | None:
        """What the chat template writes before and after a lone question; None if that depends on the question."""
        before, _, after = self.chat_prompt([{"role": "user", "content": _MARK}]).partition(_MARK)
        same = all(self.chat_prompt([{"role": "user", "content": text}]) == before + text + after for text in _QUESTIONS)
        return (before, after) if same else None

    def _single(self, instruction: str, input: str) -> str:
        if self.name == "plain":
            return f"{_user_text(instruction, input)}\n"
        if input:
            return f"{_ALPACA_WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        return f"{_ALPACA}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def _user_text(instruction: str, input: str) -> str:
    return "\n\n".join(part for part in (instruction, input) if part)


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        message
        for asked, answer in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
