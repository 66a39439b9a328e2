"""Tokenizers without torch: fast batch encoding, special tokens, the chat template, and a fingerprint.

Wraps the fast tokenizer of a model folder. Knows nothing of layouts or tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from apprentice.errors import ModelError
from apprentice.pretrained.chat_template import ChatTemplate, Message
from apprentice.pretrained.control_tokens import ControlTokens
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.segment_cache import Passages

CACHED_WORDS = 1 << 18  # the tokenizer's own 10,000 are soon full, and then rarer words are merged anew each time they come


def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Tokenizer:
    """The tokenizer in `folder`, with `chat_template` in place of its own.

    Raises `ModelError` if there is none, or it has no end token.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        # Not AutoTokenizer: its import alone brings torch, four seconds in every worker.
        from transformers import PreTrainedTokenizerFast

        folder = folder if folder.is_dir() else local_folder(str(folder))  # a cache's folder that another node named
        self.folder = folder
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there.")
        self._inner: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.given_template = chat_template
        if chat_template is not None:
            self._inner.chat_template = chat_template
        self._backend: Any = self._inner.backend_tokenizer
        self._kept_apart: dict[tuple[str, ...], ControlTokens] = {}
        self._backend.no_padding()
        self._backend.no_truncation()
        if resize := getattr(self._backend.model, "_resize_cache", None):
            resize(CACHED_WORDS)
        if self._inner.eos_token_id is None:
            raise ModelError(f"the tokenizer in {folder} has no end token (eos_token); set one in tokenizer_config.json.")

    @classmethod
    def load(cls, base: str) -> Tokenizer:
        """The tokenizer of the model `base` (folder, hub id or packaged model)."""
        return cls(local_folder(base))

    def with_template(self, chat_template: str | None) -> Tokenizer:
        """The same with another chat template; itself where none is given, or it is its own."""
        return self if chat_template in (None, self.chat_template) else Tokenizer(self.folder, chat_template)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, str | None]]:
        return type(self), (self.folder, self.given_template)

    @cached_property
    def _passages(self) -> Passages:
        return Passages(self._backend, [token for token in self._inner.added_tokens_decoder.values() if token.special])

    @property
    def end_id(self) -> int:
        return int(self._inner.eos_token_id)

    @property
    def end_text(self) -> str:
        return str(self._inner.eos_token)

    @property
    def pad_id(self) -> int:
        """The padding id; the end token where there is none (padding is masked by position, so both are safe)."""
        pad = self._inner.pad_token_id
        return int(self.end_id if pad is None else pad)

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by itself (a `<s>`, or nothing)."""
        return self._around[0]

    @property
    def finish_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts behind a text by itself (the `</s>` that encoders of T5 and BART end a text with, or nothing)."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        plain = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start]), tuple(full[start + len(plain) :])
        return (), ()

    @property
    def chat_template(self) -> str | None:
        template = self._inner.chat_template
        return template if isinstance(template, str) else None

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens as texts, the end token among them."""
        added = [str(token.content) for token in self._inner.added_tokens_decoder.values() if token.special]
        return tuple(dict.fromkeys([*added, self.end_text]))

    @cached_property
    def other_added_texts(self) -> tuple[str, ...]:
        """Tokens that are found in a text before it is taken apart, but are not special."""
        return tuple(str(token.content) for token in self._inner.added_tokens_decoder.values() if not token.special)

    def is_added_text(self, text: str) -> bool:
        """True if `text` is one token that no text is made of by chance."""
        return text in self.special_texts or text in self.other_added_texts

    def swallows_space(self, id: int) -> bool:
        """True for a token that takes the white space behind it along."""
        token = self._inner.added_tokens_decoder.get(id)
        return token is not None and bool(token.rstrip)

    def kept_apart(self, tokens: tuple[str, ...]) -> ControlTokens:
        """What keeps these control tokens apart from texts that hold them."""
        if tokens not in self._kept_apart:
            self._kept_apart[tokens] = ControlTokens(self._backend, tokens)
        return self._kept_apart[tokens]

    def is_added(self, id: int) -> bool:
        """True for a token that no text is made of by chance: the end token and the like."""
        return id == self.end_id or id in self._inner.added_tokens_decoder

    def __len__(self) -> int:
        return len(self._inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens in it recognised, nothing added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once; passages that come again are encoded once."""
        return self._passages.encode(texts)

    def cut(self, text: str, tokens: int) -> str:
        """The start of `text` that its first `tokens` tokens cover, no character halved, white space at its end removed."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return text[: offsets[tokens][0]].rstrip() if tokens < len(offsets) else text

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, id: int) -> bytes:
        """The text of one token in UTF-8, a space at its start included; perhaps only some bytes of a character."""
        piece = str(self._inner.convert_ids_to_tokens(id))
        if id in self._inner.added_tokens_decoder:
            return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        if all(character in _BYTES for character in piece) and self._is_byte_level:
            return bytes(_BYTES[character] for character in piece)
        return piece.replace("▁", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])

    def apply_chat_template(
        self, messages: Sequence[Message], *, generate: bool, now: datetime | None = None, **variables: Any
    ) -> str:
        """The chat template's text for `messages`; `generate` adds the opening of the assistant's turn, `now` stops its clock.

        Raises `ChatTemplateError` where the template fails over them.
        """
        return self._chat_template.render(messages, generate=generate, now=now, **(self._inner.special_tokens_map | variables))

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ModelError(f"the tokenizer in {self.folder} has no chat template; give one in data.chat_template.")
        return ChatTemplate(self.chat_template, str(self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges, normalisation and special tokens."""
        # Padding and truncation are switched per call; they do not change what a text means.
        content = json.loads(self._backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
