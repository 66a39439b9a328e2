"""Grammar of replies that may or must call functions: the calls follow their JSON Schemas, whatever the model would write.

A reply is free until it opens a call; from there on the name and the arguments are forced. Texts that are special tokens to the
tokenizer stand in the grammar by their ids, since llguidance takes them for no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from apprentice.data.encoding.prompt_format import Layout
from apprentice.pretrained.replies.reply_syntax import CallSyntax
from apprentice.serve.api.schemas.tools import Tool

# As `json.dumps` writes arguments, which is how chat templates show them to the model.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY = "/(?s:.*)/"


class ToolGrammar:
    """Writes grammars of replies with calls in the syntax of `layout`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._special = {text: layout.tokenizer.encode(text)[0] for text in layout.tokenizer.special_texts}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")

    @property
    def _calls(self) -> CallSyntax:
        calls = self._layout.reply_syntax.calls
        assert calls is not None, "only a template with calls gets requests with functions"
        return calls

    @property
    def can_force(self) -> bool:
        """Whether calls can be forced: arguments are written as a JSON object."""
        return self._calls.kind in ("object", "named") and not self._calls.middle.endswith('"')

    @property
    def can_follow(self) -> bool:
        """Whether a call can be forced once a reply has begun it, which needs a text that nothing but calls begin with."""
        return self.can_force and bool(self._calls.begin.strip()) and not self._layout.reply_syntax.answer_opening

    def write(self, tools: Sequence[Tool], *, must_call: bool, is_parallel: bool, is_in_thought: bool) -> str:
        """Lark grammar of a reply that calls `tools`, several times where `is_parallel`; a call or free text unless `must_call`.

        With `is_in_thought` the prompt ends within a thought, which comes first.
        """
        calls = self._calls
        begin, trigger = calls.begin, calls.begin.strip()
        names = [f"call_{number}" for number in range(len(tools))]
        one = f"({' | '.join(names)})"
        several = f"({self._text(calls.between)} {one})*" if is_parallel and calls.is_parallel else ""
        rest = f"{one} {several} {self._text(calls.end)}"
        opening = None if must_call else self._opening_text(is_in_thought)
        rules = self.opening(is_in_thought=is_in_thought, thoughtless="reply" if opening is None else "thoughtless")
        if must_call:
            rules += [f"reply: {self._text(begin)} {rest}"]
        else:
            behind = self._text(begin[begin.index(trigger) + len(trigger) :])
            rules += [f"reply: FREE | trigger {behind} {rest}", self._until("trigger", trigger), self._without("FREE", trigger)]
            if opening is not None:
                rules += [
                    f"thoughtless: FREE_AT_ONCE | trigger_at_once {behind} {rest}",
                    self._until("trigger_at_once", trigger, opening),
                    self._without("FREE_AT_ONCE", trigger, opening),
                ]
        for name, tool in zip(names, tools, strict=True):
            head = calls.opening + tool.function.name + calls.middle
            schema = {"type": "object", **tool.function.parameters, "x-guidance": _SPACING}
            rules += [f"{name}: {self._text(head)} {name}_arguments {self._text(calls.closing)}"]
            rules += [f"{name}_arguments: %json {json.dumps(schema)}"]
        return "\n".join(rules)

    def opening(self, *, is_in_thought: bool, thoughtless: str = "reply") -> list[str]:
        """Rules of a reply's beginning: its thought, if it has one, and then `reply`; `thoughtless` is the rule of one without."""
        thoughts = self._layout.reply_syntax.thoughts
        if thoughts is None or not (is_in_thought or self._layout.leaves_thoughts):
            return ["start: reply"]
        start = "thought SPACE reply"
        if not is_in_thought:
            start = f"{thoughtless} | {self._text(thoughts.opening.strip())} {start}"
        return [f"start: {start}", self._until("thought", thoughts.closing.strip()), "SPACE: /[ \\n]{0,4}/"]

    def _opening_text(self, is_in_thought: bool) -> str | None:
        """The text that opens a thought, where a reply that begins with it could be taken for one without a thought."""
        thoughts = self._layout.reply_syntax.thoughts
        if thoughts is None or is_in_thought or not self._layout.leaves_thoughts:
            return None
        opening = thoughts.opening.strip()
        return None if self._pattern.match(opening) else opening

    def _text(self, text: str) -> str:
        """`text` as terms of a grammar, special tokens by their ids; empty for an empty text."""
        terms: list[str] = []
        position = 0
        for match in self._pattern.finditer(text):
            terms += [json.dumps(text[position : match.start()])] if match.start() > position else []
            terms.append(f"<[{self._special[match[0]]}]>")
            position = match.end()
        terms += [json.dumps(text[position:])] if text[position:] else []
        return " ".join(terms)

    def _until(self, name: str, marker: str, opening: str | None = None) -> str:
        """Rule of any text up to `marker` and with it; the text does not begin with `opening`."""
        other = "" if opening is None else f" & ~/{_escaped(opening)}(?s:.*)/"
        if self._pattern.match(marker):
            terminal = f"{name.upper()}_TEXT"
            return f"{name}: {terminal} {self._text(marker)}\n{terminal}: {_ANY}{other}"
        return f"{name}[lazy]: /(?s:.*){_escaped(marker)}/{other}"

    def _without(self, name: str, marker: str, opening: str | None = None) -> str:
        """Rule of any text without `marker`, which does not begin with `opening`."""
        other = "" if opening is None else f" & ~/{_escaped(opening)}(?s:.*)/"
        return f"{name}: {_ANY}{other}" + ("" if self._pattern.match(marker) else f" & ~/(?s:.*){_escaped(marker)}(?s:.*)/")


def _escaped(text: str) -> str:
    return re.sub(r"([.^$*+?()\[\]{}|\\/&~#-])", r"\\\1", text)
