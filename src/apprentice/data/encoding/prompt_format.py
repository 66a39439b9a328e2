"""Prompt formats ("layouts"): instruction, input and exemplars to the model's text, the same in training, evaluation and serving.

plain     instruction, blank line, input; the answer after a newline; exemplars before it, with a separator line
alpaca    the section headings of Stanford Alpaca (Taori et al. 2023); exemplars as in plain
chat      the tokenizer's own chat template; exemplars are earlier turns

Prompt and answer are tokenized separately and joined as ids, so that a served prompt has exactly the ids it had in training.
Control tokens in users' texts and in datasets, such as `<|im_end|>`, are encoded as ordinary characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, get_args

from apprentice.data.encoding.chat_turns import PROBE_QUESTIONS, Turns, read_turns
from apprentice.data.encoding.dialogue_format import DialogueFormat
from apprentice.data.encoding.dialogue_template import AssistantTurn, DialogueTemplate
from apprentice.errors import ChatTemplateError, ContractError
from apprentice.pretrained.architecture import Family, family_of
from apprentice.pretrained.control_tokens import BREAK, ControlTokens, unescape
from apprentice.pretrained.replies.reply_syntax import ReplySyntax
from apprentice.pretrained.tokenizer import Tokenizer

LayoutName = Literal["plain", "alpaca", "chat"]
Reasoning = Literal["train", "mask", "drop"]
LAYOUT_VERSION = 2  # of new runs; raised whenever a layout's ids change. Version 1: no `turns`, control tokens in texts are tokens
LAYOUT_VERSIONS = (1, 2)  # versions that old contracts and runs have, and that are still supported
SEPARATOR = "\n\n###\n\n"
_MARK = "\u2402answer\u2403"  # stands for an answer or a question while the text around it is looked up
_THOUGHT = ("<think>", "</think>")
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
    """A prompt format together with the tokenizer that encodes it.

    `system` is the system prompt (empty: the template's own default). `date` (`YYYY-MM-DD`) replaces today's date in chat templates
    that insert one; they see it as `date_string`. `quality` is the quality class passed to chat templates under that name (empty:
    none is passed, as for replies). `version` is one of `LAYOUT_VERSIONS`. `control_tokens` are control tokens that stay tokens
    when they occur in texts. `reasoning` says what becomes of thoughts (`data.reasoning`); None: they are text like any other.
    Raises `ContractError` for an unknown name, a missing chat template or an unknown control token.
    """

    name: LayoutName
    tokenizer: Tokenizer
    system: str = ""
    date: str = "2025-01-01"
    quality: str = ""
    version: int = LAYOUT_VERSION
    control_tokens: tuple[str, ...] = ()
    reasoning: Reasoning | None = None
    effort: str = ""  # how much replies are to think, for chat templates that read `reasoning_effort`; empty: none is passed
    day: str | None = None  # today's date for chat templates in version 1 (`YYYY-MM-DD`); None: the system clock's

    def __post_init__(self) -> None:
        if self.name not in get_args(LayoutName):
            raise ContractError(f"layout {self.name!r} is unknown; choose one of {', '.join(get_args(LayoutName))}.")
        if self.name == "chat" and self.tokenizer.chat_template is None:
            raise ContractError(
                f"the tokenizer in {self.tokenizer.folder} has no chat template; use layout `plain` or `alpaca`, or give"
                " data.chat_template."
            )
        if strange := [token for token in self.control_tokens if not self.tokenizer.is_added_text(token)]:
            raise ContractError(
                f"data.control_tokens: {strange[0]!r} is no token of its own in {self.tokenizer.folder}; write it as"
                " the tokenizer does."
            )

    def prompt(self, instruction: str, input: str = "", exemplars: Sequence[Exemplar] = ()) -> str:
        """The text up to where the answer starts, to be encoded by `encode_prompt`; `shown` makes it readable.

        Raises `ChatTemplateError` where the chat template refuses the question.
        """
        if self.name == "chat":
            question = user_text(instruction, input)
            if self._around and not exemplars and question == question.strip():
                return self._text(question).join(self._around)
            turns = [(user_text(shot.instruction, shot.input), shot.answer) for shot in exemplars]
            return self.chat_prompt([*_messages(turns), {"role": "user", "content": question}])
        solved = [self._single(shot.instruction, shot.input) + self._text(shot.answer) for shot in exemplars]
        head = f"{self._text(self.system)}\n\n" if self.system else ""
        return head + SEPARATOR.join([*solved, self._single(instruction, input)])

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The chat template's text for OpenAI-style messages, up to where the answer starts, to be encoded by `encode_prompt`.

        Raises `ContractError` for a layout other than `chat` or tools that its template drops, `ChatTemplateError` where the
        template refuses the messages.
        """
        if self.name != "chat":
            raise ContractError(f"layout `{self.name}` has no turns; it takes one instruction.")
        if self._is_dialogue(messages, tools):
            return self.dialogue_template(tools).prompt(self.with_system(messages), tools)
        text = self._templated(self.with_system(messages), generate=True)
        return text if self.turns is None else self.turns.opened(text)

    def _is_dialogue(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> bool:
        """True if thoughts are left to replies, or there are functions, calls or results."""
        return self.leaves_thoughts or bool(tools) or any(one.get("tool_calls") or one["role"] == "tool" for one in messages)

    @property
    def leaves_thoughts(self) -> bool:
        """True if replies may begin with a thought, which prompts leave to them."""
        return self.reasoning in ("train", "mask")

    @cached_property
    def dialogues(self) -> DialogueFormat | None:
        """How conversations with functions and thoughts are written; None for layouts without turns, and in version 1."""
        if self.turns is None:
            return None
        source = self.tokenizer.chat_template or ""
        return DialogueFormat(self._render_dialogue, self._text, self.turns, source, self._control, self.leaves_thoughts)

    @property
    def reply_syntax(self) -> ReplySyntax:
        """How replies write calls and thoughts; empty for layouts without turns."""
        return ReplySyntax() if self.dialogues is None else self.dialogues.reply_syntax

    @cached_property
    def opens_thought(self) -> bool:
        """True if prompts end within a thought, which the reply goes on with."""
        return self.leaves_thoughts and self.reply_syntax.is_in_thought(self.chat_prompt([{"role": "user", "content": "a"}]))

    def dialogue_template(self, tools: Sequence[Mapping[str, Any]]) -> DialogueTemplate:
        """Writes conversations with functions and thoughts. Raises `ContractError` where `tools` cannot be shown."""
        if self.dialogues is None:
            raise ContractError("functions and thoughts need `layout: chat`, and a run of this version.")
        if tools and self.dialogues.fault is not None:
            raise ContractError(f"the chat template in {self.tokenizer.folder} {self.dialogues.fault}")
        return self.dialogues.template

    def _render_dialogue(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None, generate: bool
    ) -> str:
        return self._rendered(messages, generate=generate, parts=self._takes_parts, tools=tools)

    def with_system(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`messages` behind the layout's own system text, unless they begin with one."""
        system = [{"role": "system", "content": self.system}] if self.system and messages[0]["role"] != "system" else []
        return [*system, *messages]

    def _templated(self, messages: Sequence[Mapping[str, str]], *, generate: bool) -> str:
        escaped = [dict(message, content=self._text(message["content"])) for message in messages]
        return self._rendered(escaped, generate=generate, parts=self._takes_parts)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], *, generate: bool, parts: bool = False, **variables: Any) -> str:
        """The chat template's text for these messages, unescaped; with `parts`, contents are lists of one text part."""
        variables |= {"quality": self.quality} if self.quality else {}
        variables |= {"reasoning_effort": self.effort} if self.effort else {}
        day = self.date if self.version > 1 else self.day
        now = datetime.fromisoformat(day) if day is not None else None
        shaped = [dict(one, content=[{"type": "text", "text": one["content"]}]) if parts else dict(one) for one in messages]
        return self.tokenizer.apply_chat_template(shaped, generate=generate, now=now, date_string=self.date, **variables)

    @cached_property
    def _takes_parts(self) -> bool:
        """True if the template shows only contents that are lists of parts, as those of vision models do."""
        turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]

        def marks(parts: bool) -> int:
            try:
                return self._rendered(turns, generate=False, parts=parts).count(_MARK)
            except ChatTemplateError:
                return 0

        return marks(parts=False) < 2 <= marks(parts=True)

    @cached_property
    def turns(self) -> Turns | None:
        """The texts that the chat template writes around answers; None for other layouts and in version 1, which assumes ChatML."""
        if self.name != "chat" or self.version == 1:
            return None

        def render(messages: Sequence[Mapping[str, Any]], generate: bool) -> str:
            return self._templated(self.with_system(messages), generate=generate)

        return read_turns(render, self._control, self.tokenizer.end_text)

    @property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.control_names)) or "(?!)")

    @cached_property
    def control_names(self) -> tuple[str, ...]:
        """Control tokens: the tokenizer's special tokens, and other added tokens that the chat template writes around messages.

        `<think>` and `</think>` are not among these others, since answers write them themselves.
        """
        special = self.tokenizer.special_texts
        if self.name != "chat":
            return special
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        text = self._rendered(conversation, generate=True, parts=self._takes_parts)
        others = [token for token in self.tokenizer.other_added_texts if token not in _THOUGHT and not token.isspace()]
        return *special, *(token for token in others if token in text and not token.isalnum())

    @cached_property
    def _escaping(self) -> ControlTokens:
        return self.tokenizer.control_tokens(tuple(name for name in self.control_names if name not in self.control_tokens))

    def _text(self, text: str) -> str:
        """`text` with its control tokens escaped, as users' texts stand in a prompt; unchanged in version 1."""
        return text if self.version == 1 else self._escaping.escape(text)

    @staticmethod
    def shown(prompt: str) -> str:
        """A prompt's text without its escape characters, for people to read."""
        return unescape(prompt)

    def chat_pieces(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[tuple[list[int], bool]]:
        """Token ids of a conversation with the assistant's turn opened, as (ids, is an earlier answer with its end) pieces.

        Answers are encoded separately, as they are in training and generation, so that a conversation that goes on keeps its ids.
        Where the chat template changes earlier answers, the result is one piece that is no answer.
        """
        if self.name == "chat" and self._is_dialogue(messages, tools):
            template, whole = self.dialogue_template(tools), self.with_system(messages)
            return self.encode_turns(template.prompt(whole, tools), template.turns(whole, tools))
        text = self.chat_prompt(messages)
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        if not answers or (self.turns is not None and not self.turns.alike):
            return [(self.encode_prompt(text), False)]
        marks = iter([f"{_MARK}{number}\u2403" for number in range(len(answers))])
        marked = [dict(m, content=next(marks)) if m["role"] == "assistant" else m for m in messages]
        parts = re.split(f"{_MARK}\\d+\u2403", self.chat_prompt(marked))
        rebuilt = "".join(part + self._text(answer) for part, answer in zip(parts, [*answers, ""], strict=False))
        stripped = [dict(m, content=m["content"].strip()) if m["role"] == "assistant" else m for m in messages]
        end = self._closing if self.turns is None else self.turns.inner_end
        space = "" if self.turns is None else self.turns.space
        behind = parts[1:]
        if len(behind) != len(answers) or rebuilt != self.chat_prompt(stripped) or not all(part.startswith(end) for part in behind):
            return [(self.encode_prompt(text), False)]
        between = [parts[0], *(self._behind(part.removeprefix(end)) for part in behind)]
        rests = self.encode_prompts([*(part.removesuffix(space) for part in between[:-1]), between[-1]])
        pieces = [(rests[0], False)]
        for answer, rest in zip(self.encode_answers(answers), rests[1:], strict=True):
            pieces += [(answer + list(self._inner_end_ids), True), (rest, False)]
        return pieces

    def encode_turns(self, prompt: str, earlier: Sequence[AssistantTurn]) -> list[tuple[list[int], bool]]:
        """Pieces, as of `chat_pieces`, of a prompt that `dialogue_template` wrote behind these turns of the assistant."""
        pieces: list[tuple[list[int], bool]] = []
        for piece in DialogueTemplate.split(prompt, earlier):
            if isinstance(piece, str):
                swallowed = bool(pieces) and self.tokenizer.strips_space_after(pieces[-1][0][-1])
                pieces.append((self.encode_prompt(piece.lstrip() if swallowed else piece), False))
            else:
                turn, end = piece
                pieces.append(([id for ids in self.encode_turn(turn, end) for id in ids], True))
        return pieces

    def encode_turn(self, turn: AssistantTurn, end: str) -> tuple[list[int], list[int]]:
        """Ids of a turn's thought, and of its text with its end."""
        thought, body, ending = self._encoded([turn.thought, turn.body, end])
        return thought, body + ending

    def _behind(self, text: str) -> str:
        """`text` without leading white space where the end token of the answer before it takes that along (`rstrip`)."""
        swallowed = self.version > 1 and self.tokenizer.strips_space_after(self._inner_end_ids[-1])
        return text.lstrip() if swallowed else text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a conversation with the assistant's turn opened. Raises `ContractError` for a layout other than `chat`."""
        return [id for ids, _ in self.chat_pieces(messages, tools) for id in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text from `prompt` or `chat_prompt`, with the tokenizer's start ids except for `chat` (its template adds them).

        For an encoder-decoder the tokenizer's end ids follow.
        """
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_prompt` of many texts at once."""
        return self._started(self._encoded(texts))

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a complete prompt written by a user, in which control tokens are tokens."""
        return self._started([self.tokenizer.encode(text)])[0]

    @cached_property
    def empty_prompt(self) -> list[int]:
        """Ids of the prompt of an empty question; the end ids if that is empty. Used for the prior of a choice (`rank_by: pmi`)."""
        return self.encode_prompt(self.prompt("", "")) or list(self.end_ids)

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers, without the end ids."""
        return self._encoded([self._text(text) for text in texts])

    def _started(self, prompts: list[list[int]]) -> list[list[int]]:
        start = [] if self.name == "chat" else list(self.tokenizer.start_ids)
        # An encoder's input is a complete text with its end; a causal model's prompt is continued by the answer.
        finish = list(self.tokenizer.finish_ids) if self.family == "seq2seq" else []
        return [start + ids + finish for ids in prompts] if start or finish else prompts

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts whose escaped control tokens are encoded as characters."""
        broken = [number for number, text in enumerate(texts) if BREAK in text] if self.version > 1 else []
        if not broken:
            return self.tokenizer.encode_batch(texts)
        encoded = self.tokenizer.encode_batch(["" if BREAK in text else text for text in texts])
        for number, ids in zip(broken, self._escaping.encode([texts[number] for number in broken]), strict=True):
            encoded[number] = ids
        return encoded

    @cached_property
    def family(self) -> Family:
        """Family of the model in the tokenizer's folder; `causal` where the folder has no config.json."""
        folder = self.tokenizer.folder
        return family_of(folder) if (folder / "config.json").is_file() else "causal"

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids after an answer, which are trained on: the end token, or the end of the chat template's assistant turn."""
        if self.name != "chat":
            return (self.tokenizer.end_id,)
        ids = tuple(self.tokenizer.encode(self._closing if self.turns is None else self.turns.end))
        return ids or (self.tokenizer.end_id,)

    @cached_property
    def _inner_end_ids(self) -> tuple[int, ...]:
        """Ids after an answer that is followed by another turn."""
        return self.end_ids if self.turns is None else tuple(self.tokenizer.encode(self.turns.inner_end))

    @cached_property
    def _closing(self) -> str:
        """Text that the chat template writes behind an answer, without trailing white space."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        return self._templated(turns, generate=False).partition(_MARK)[2].rstrip()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation ends, sorted: the end token, and the last ids of `end_ids` and of an inner answer's end."""
        inner = self._inner_end_ids[-1] if self.name == "chat" else self.tokenizer.end_id
        return tuple(sorted({self.tokenizer.end_id, self.end_ids[-1], inner}))

    @cached_property
    def call_stop_ids(self) -> tuple[int, ...]:
        """`stop_ids` and the last id behind a turn of calls, which other templates than ChatML's end in another way."""
        calls = self.reply_syntax.calls
        ids = self.tokenizer.encode(calls.turn_end) if calls is not None and calls.turn_end else []
        return tuple(sorted({*self.stop_ids, *ids[-1:]}))

    @cached_property
    def _around(self) -> tuple[str, str] | None:
        """Texts that the chat template writes before and after a single question; None if they depend on the question."""
        before, _, after = self.chat_prompt([{"role": "user", "content": _MARK}]).partition(_MARK)
        return (before, after) if all(self._asks(text) == before + self._text(text) + after for text in PROBE_QUESTIONS) else None

    def _asks(self, question: str) -> str | None:
        """The prompt of a single question; None where the template refuses it."""
        try:
            return self.chat_prompt([{"role": "user", "content": question}])
        except ChatTemplateError:
            return None

    def _single(self, instruction: str, input: str) -> str:
        instruction, input = self._text(instruction), self._text(input)
        if self.name == "plain":
            return f"{user_text(instruction, input)}\n"
        if input:
            return f"{_ALPACA_WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        return f"{_ALPACA}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def user_text(instruction: str, input: str) -> str:
    """What the user says: instruction and input, with an empty line between them."""
    return "\n\n".join(part for part in (instruction, input) if part)


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
