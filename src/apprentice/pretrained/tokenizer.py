"""The tokenizer of a model folder (a wrapped fast tokenizer): batch encoding, special tokens, chat template, fingerprint."""

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
from apprentice.pretrained.compat import resize_word_cache
from apprentice.pretrained.control_tokens import ControlTokens
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.segment_cache import SegmentCache

CACHED_WORDS = 1 << 18  # the tokenizer's default of 10,000 soon fills up, and rarer words are then merged again at every occurrence


def _byte_of_character() -> dict[str, int]:
    """Character → byte in byte-level tokenizers: printable bytes as themselves, the others from U+0100 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Tokenizer:
    """The tokenizer in `folder`; `chat_template` replaces its own. Picklable.

    Raises `ModelError` if the folder has no tokenizer.json, or the tokenizer has no end token.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        # Not AutoTokenizer: its import alone brings torch, four seconds in every worker.
        from transformers import PreTrainedTokenizerFast

        folder = folder if folder.is_dir() else local_folder(str(folder))  # a folder in the cache of another node
        self.folder = folder
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there.")
        self._inner: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.template_override = chat_template
        if chat_template is not None:
            self._inner.chat_template = chat_template
        self._backend: Any = self._inner.backend_tokenizer
        self._control_tokens: dict[tuple[str, ...], ControlTokens] = {}
        self._backend.no_padding()
        self._backend.no_truncation()
        resize_word_cache(self._backend, CACHED_WORDS)
        if self._inner.eos_token_id is None:
            raise ModelError(f"the tokenizer in {folder} has no end token (eos_token); set one in tokenizer_config.json.")

    @classmethod
    def load(cls, base: str) -> Tokenizer:
        """The tokenizer of the model `base` (folder, hub id or packaged model)."""
        return cls(local_folder(base))

    def with_template(self, chat_template: str | None) -> Tokenizer:
        """This tokenizer with another chat template; itself if that is None or the one it has."""
        return self if chat_template in (None, self.chat_template) else Tokenizer(self.folder, chat_template)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, str | None]]:
        return type(self), (self.folder, self.template_override)

    @cached_property
    def _segments(self) -> SegmentCache:
        return SegmentCache(self._backend, [token for token in self._inner.added_tokens_decoder.values() if token.special])

    @property
    def end_id(self) -> int:
        """Id of the token that ends a text."""
        return int(self._inner.eos_token_id)

    @property
    def end_text(self) -> str:
        """The token that ends a text."""
        return str(self._inner.eos_token)

    @property
    def pad_id(self) -> int:
        """The padding id, or the end id without one (padding is masked by position, so that both are safe)."""
        pad = self._inner.pad_token_id
        return int(self.end_id if pad is None else pad)

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer adds before a text (`<s>`, or nothing)."""
        return self._surrounding_ids[0]

    @property
    def finish_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer adds behind a text (the `</s>` of T5 and BART, or nothing)."""
        return self._surrounding_ids[1]

    @cached_property
    def _surrounding_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        plain = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start]), tuple(full[start + len(plain) :])
        return (), ()

    @property
    def chat_template(self) -> str | None:
        """The chat template in Jinja; None if there is none, or several."""
        template = self._inner.chat_template
        return template if isinstance(template, str) else None

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens as texts, the end token among them."""
        added = [str(token.content) for token in self._inner.added_tokens_decoder.values() if token.special]
        return tuple(dict.fromkeys([*added, self.end_text]))

    @cached_property
    def other_added_texts(self) -> tuple[str, ...]:
        """Added tokens that are not special, as texts; like special ones they are found in a text before it is pre-tokenized."""
        return tuple(str(token.content) for token in self._inner.added_tokens_decoder.values() if not token.special)

    def is_added_text(self, text: str) -> bool:
        """True if `text` is a special or another added token."""
        return text in self.special_texts or text in self.other_added_texts

    def strips_space_after(self, id: int) -> bool:
        """True for an added token that swallows the white space behind it (`rstrip`)."""
        token = self._inner.added_tokens_decoder.get(id)
        return token is not None and bool(token.rstrip)

    def control_tokens(self, tokens: tuple[str, ...]) -> ControlTokens:
        """The escaping of these control tokens in texts; made once for each set of tokens."""
        if tokens not in self._control_tokens:
            self._control_tokens[tokens] = ControlTokens(self._backend, tokens)
        return self._control_tokens[tokens]

    def is_added(self, id: int) -> bool:
        """True for the end token and all added tokens, which ordinary text does not produce."""
        return id == self.end_id or id in self._inner.added_tokens_decoder

    def __len__(self) -> int:
        return len(self._inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised, none are added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, with a cache for repeated segments."""
        return self._segments.encode(texts)

    def truncate(self, text: str, tokens: int) -> str:
        """The prefix of `text` that its first `tokens` tokens cover, in whole characters, without trailing white space."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return text[: offsets[tokens][0]].rstrip() if tokens < len(offsets) else text

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, without special tokens if `skip_special`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token, with a leading space if it has one; they may be only a part of a character."""
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
        """The chat template's text for `messages`; `generate` adds the opening of the assistant's turn, `now` replaces the clock.

        Raises `ChatTemplateError` where the template fails over the messages, `ModelError` without a chat template.
        """
        return self._chat_template.render(messages, generate=generate, now=now, **(self._inner.special_tokens_map | variables))

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ModelError(f"the tokenizer in {self.folder} has no chat template; give one in data.chat_template.")
        return ChatTemplate(self.chat_template, str(self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's whole definition (vocabulary, merges, normalisation, special tokens …)."""
        # Padding and truncation are settings of a call and do not change a text's ids.
        content = json.loads(self._backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
