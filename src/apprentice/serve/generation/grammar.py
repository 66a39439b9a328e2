"""Constrained decoding with llguidance: replies that follow a JSON schema, a list of choices or a regular expression.

An engine asks a `GrammarConstraint` which tokens may come next, and reports to it the token that was chosen.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ModelError
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.requests import ChatRequest, GenerationFields
from apprentice.serve.generation.replies.reply_parts import PartReader
from apprentice.serve.generation.tool_grammar import ToolGrammar


class GrammarCompiler:
    """Compiles requests' grammars into constraints on replies in the prompt format `layout`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def tool_grammar_of(self, body: ChatRequest, reader: PartReader) -> str | None:
        """Grammar of a reply that may or must call functions; None where it is free, and only read.

        Raises `RequestProblem` for a call that is asked for and cannot be forced.
        """
        grammar = ToolGrammar(reader.layout)
        if not body.callable_tools or not (grammar.can_force if body.must_call else grammar.can_follow):
            if body.must_call:
                raise RequestProblem(
                    "`tool_choice`: this model's chat template writes calls in a way that cannot be forced; leave it at `auto`.",
                    param="tool_choice",
                )
            return None
        lark = grammar.write(
            body.callable_tools,
            must_call=body.must_call,
            is_parallel=body.parallel_tool_calls,
            is_in_thought=reader.is_in_thought,
        )
        return str(llguidance.LLMatcher.grammar_from_lark(lark))

    def grammar_of(self, body: GenerationFields, reader: PartReader | None) -> str:
        """Grammar, as llguidance's text, of a reply that `is_constrained`; takes milliseconds, so not in an event loop.

        Where replies begin with a thought (`reader`), the form is that of the answer behind it.
        """
        matcher = llguidance.LLMatcher
        if reader is not None and reader.layout.leaves_thoughts:
            rules = ToolGrammar(reader.layout).opening(is_in_thought=reader.is_in_thought)
            return str(matcher.grammar_from_lark("\n".join([*rules, f"reply: {_form_term(body)}"])))
        if (response_format := body.response_format) is not None:
            schema = response_format.json_schema.schema_ if response_format.json_schema is not None else {"type": "object"}
            return str(matcher.grammar_from_json_schema(json.dumps(schema)))
        outputs = body.structured_outputs
        assert outputs is not None
        if outputs.choice is not None:
            texts = (json.dumps(text, ensure_ascii=False) for text in outputs.choice)
            return str(matcher.grammar_from_lark("start: " + " | ".join(texts)))
        if outputs.regex is not None:
            return str(matcher.grammar_from_regex(outputs.regex))
        return str(matcher.grammar_from_json_schema(json.dumps(outputs.json_)))

    def compile(self, grammar: str, stop_ids: tuple[int, ...] = ()) -> GrammarConstraint:
        """A new constraint at the start of `grammar`, ended by `stop_ids` (none: the layout's); takes milliseconds.

        Raises `RequestProblem` where llguidance cannot follow the grammar.
        """
        stop_ids = stop_ids or tuple(self._layout.stop_ids)
        tokenizer = _tokenizer(str(self._layout.tokenizer.folder / "tokenizer.json"), stop_ids)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestProblem(f"the form of the reply cannot be followed: {_reason(matcher)}.", code="invalid_form")
        return GrammarConstraint(matcher, tokenizer.vocab_size, stop_ids, grammar)


def _form_term(body: GenerationFields) -> str:
    """The form of a reply as a term of a Lark grammar."""
    outputs, response_format = body.structured_outputs, body.response_format
    if outputs is None or outputs.json_ is not None:
        schema: Any = {"type": "object"} if outputs is None else outputs.json_
        if response_format is not None and response_format.json_schema is not None:
            schema = response_format.json_schema.schema_
        return f"%json {json.dumps(schema)}"
    if outputs.choice is not None:
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in outputs.choice)
    slashes = re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", str(outputs.regex))
    return f"/{slashes}/"


def _reason(matcher: Any) -> str:
    return " ".join(str(matcher.get_error()).split())[:300].rstrip(".")


@lru_cache(maxsize=4)
def _tokenizer(file: str, stop_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    """llguidance's tokenizer, shared by all adapters of a base; takes a tenth of a second to make."""
    return llguidance.LLTokenizer(file, eos_token=list(stop_ids))


class GrammarConstraint:
    """Constraint of one reply, with the state of its `grammar`, whose text an engine that keeps the state itself reads."""

    def __init__(self, matcher: Any, size: int, stop_ids: tuple[int, ...], grammar: str) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._bits = llguidance.numpy.allocate_token_bitmask(1, size)
        self._size = size
        self._stop_ids = stop_ids

    def copy(self) -> GrammarConstraint:
        """A constraint in the same state, which goes on by itself; cheaper than compiling anew."""
        return GrammarConstraint(self._matcher.deep_copy(), self._size, self._stop_ids, self.grammar)

    def allowed(self) -> np.ndarray:
        """Mask (vocabulary,) bool of the token ids that may come next; only the stop ids once the grammar is complete.

        Raises `ModelError` where the grammar cannot be followed any further.
        """
        if self._matcher.is_error():
            raise ModelError(f"its form cannot be followed: {_reason(self._matcher)}.")
        if not self._matcher.is_stopped():
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
            allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: self._size].astype(bool)
            if allowed.any():
                return allowed
        ended = np.zeros(self._size, dtype=bool)
        ended[list(self._stop_ids)] = True
        return ended

    def accept(self, id: int) -> None:
        """Advances by the token `id`."""
        self._matcher.consume_token(id)
