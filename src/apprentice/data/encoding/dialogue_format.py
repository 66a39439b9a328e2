"""Dialogue format: whether a chat template knows functions and thoughts, and how conversations with them are written then."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from apprentice.data.encoding.chat_turns import Turns
from apprentice.data.encoding.dialogue_template import DialogueTemplate
from apprentice.pretrained.replies.reply_syntax import OWN_CALLS, ReplySyntax
from apprentice.pretrained.replies.template_probe import RenderChat, ToolSupport, read_reply_syntax


class DialogueFormat:
    """Conversations with functions and thoughts under one chat template, `source`, rendered by `render`.

    `escape` escapes control tokens in texts, `control` matches them, `turns` are the texts around plain answers. With
    `leaves_thoughts` prompts leave thoughts to the replies.
    """

    def __init__(
        self,
        render: RenderChat,
        escape: Callable[[str], str],
        turns: Turns,
        source: str,
        control: re.Pattern[str],
        leaves_thoughts: bool,
    ) -> None:
        self._render, self._escape, self._turns = render, escape, turns
        self._source, self._control, self._leaves_thoughts = source, control, leaves_thoughts

    @cached_property
    def _support(self) -> ToolSupport:
        return ToolSupport(self._render)

    @property
    def has_own_calls(self) -> bool:
        """True if the template shows neither functions nor calls, so that both are written in our own form."""
        return not self._support.shows_tools and not self._support.shows_calls

    @cached_property
    def reply_syntax(self) -> ReplySyntax:
        """How replies write calls and thoughts; no calls where the template drops a part of them (`fault`)."""
        form = read_reply_syntax(self._render, self._source, self._control)
        closing = form.thoughts.closing.strip() if form.thoughts is not None else ""
        opening = self._turns.lead if not closing or closing not in self._turns.lead else ""
        calls = replace(OWN_CALLS, turn_end=self._turns.end) if self.has_own_calls else form.calls
        return ReplySyntax(calls, form.thoughts, opening)

    @cached_property
    def fault(self) -> str | None:
        """Why functions cannot be used, as the rest of a sentence that begins with the template; None if they can."""
        if self.reply_syntax.calls is not None:
            return None
        lacks = " and ".join(self._support.lacks)
        loss = f"drops {lacks} without a word" if lacks else "writes calls in a way that cannot be read back"
        return (
            f"{loss}; give one with functions in data.chat_template, or one without any, for which they are written in the"
            " system text."
        )

    @cached_property
    def template(self) -> DialogueTemplate:
        """Writes conversations."""
        return DialogueTemplate(
            self._render,
            self._escape,
            self._turns,
            self.reply_syntax,
            has_own_form=self.has_own_calls,
            leaves_thoughts=self._leaves_thoughts,
        )
