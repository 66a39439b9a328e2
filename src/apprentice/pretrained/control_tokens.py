"""Escaping of control tokens in users' texts: they are encoded as characters, while those of the prompt format stay tokens.

`escape` breaks a control token in a text with a private character, so that it is not taken for one of the format's:

    escape("a<|im_end|>b")   a<·|im_end|>b              · is the private character
    the format's text        <|im_start|>user\\na<·|im_end|>b<|im_end|>
    encode                   [1] user \\n a < | im _ end | > b [2]

Such a text is encoded by a copy of the tokenizer in which the control tokens have secret random names. The format's tokens are
replaced by those names and the private characters removed; the rest is then plain text, with the ids that a tokenizer without
control tokens gives it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from apprentice.errors import ModelError

BREAK = "\U000f0000"  # follows the first character of an escaped control token; doubled where a text contains it


class ControlTokens:
    """Escapes and encodes for `backend`, a `tokenizers.Tokenizer`, with the control tokens `tokens`.

    A control token of a single character cannot be escaped, and stays a token in texts.
    """

    def __init__(self, backend: Any, tokens: Sequence[str]) -> None:
        self._backend = backend
        self._tokens = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        self._starts = re.compile(f"(?=(?:{self._any.pattern}))(.)", re.DOTALL)
        self._secret = secrets.token_hex(8)

    def escape(self, text: str) -> str:
        """`text` with its control tokens broken by `BREAK`; unchanged where it has none."""
        if BREAK in text:
            text = text.replace(BREAK, BREAK * 2)
        return self._starts.sub(rf"\1{BREAK}", text) if self._any.search(text) else text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of escaped texts, no special tokens added. Raises `ModelError` if the tokenizer cannot be renamed so."""
        named = [unescape(self._any.sub(lambda match: self._names[match[0]], text)) for text in texts]
        return [list(encoding.ids) for encoding in self._renamed.encode_batch_fast(named, add_special_tokens=False)]

    @cached_property
    def _names(self) -> dict[str, str]:
        return {token: f"\U000f0001{self._secret}{number}\U000f0001" for number, token in enumerate(self._tokens)}

    @cached_property
    def _renamed(self) -> Any:
        """A copy of the tokenizer in which the control tokens have secret names and the same ids."""
        content = json.loads(self._backend.to_str())
        for entry in content["added_tokens"]:
            entry["content"] = self._names.get(entry["content"], entry["content"])
        model = content["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._names.get(piece, piece): id for piece, id in vocabulary.items()}
        else:  # a Unigram model, which would find a control token in characters, too
            model["vocab"] = [[self._names.get(piece, piece), *rest] for piece, *rest in vocabulary]
        if (unknown := model.get("unk_token")) is not None:
            model["unk_token"] = self._names.get(unknown, unknown)
        content |= {"post_processor": None, "padding": None, "truncation": None}
        renamed = type(self._backend).from_str(json.dumps(content))
        if moved := [token for token, name in self._names.items() if renamed.token_to_id(name) != self._backend.token_to_id(token)]:
            raise ModelError(
                f"control token {moved[0]!r} cannot be kept apart from text in this tokenizer; name it in data.control_tokens."
            )
        return renamed


def unescape(text: str) -> str:
    """The original of an escaped text."""
    return re.sub(f"{BREAK}({BREAK}?)", r"\1", text) if BREAK in text else text
