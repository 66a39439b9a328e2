"""Log-probabilities in OpenAI's two shapes, for completions and for chats.

The produced token is listed among the best even where it was none of them. A token that is only some bytes of a character is
spelled as OpenAI spells it: `bytes:\\xf0\\x9f` in completions, `\\xf0\\x9f` in chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.engines.base import Score

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot express


def of_completion(scores: Sequence[Score], tokenizer: Tokenizer, offsets: Sequence[int]) -> dict[str, Any]:
    """`logprobs` of a completion: four lists, one entry for each token.

    `offsets` are the tokens' places in the choice's text, in characters.
    """
    return {
        "tokens": [_text(tokenizer, score.id) for score in scores],
        "token_logprobs": [None if score.logprob is None else max(score.logprob, _LEAST) for score in scores],
        "top_logprobs": [None if score.logprob is None else _by_text(score, tokenizer) for score in scores],
        "text_offset": list(offsets),
    }


def of_chat(scores: Sequence[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a chat: `content`, one entry for each token, with the bytes of its text."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        piece = tokenizer.token_bytes(id)
        return {"token": _spelled(piece), "logprob": max(logprob or 0.0, _LEAST), "bytes": list(piece)}

    content = [
        # Empty where the request asks for no best tokens, as OpenAI's is.
        entry(score.id, score.logprob) | {"top_logprobs": [entry(*each) for each in _best(score)] if score.top else []}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _best(score: Score) -> list[tuple[int, float]]:
    """The best tokens, and last the produced one if it is none of them."""
    said = [] if score.logprob is None or any(id == score.id for id, _ in score.top) else [(score.id, score.logprob)]
    return [*score.top, *said]


def _by_text(score: Score, tokenizer: Tokenizer) -> dict[str, float]:
    found: dict[str, float] = {}
    for id, logprob in _best(score):
        found.setdefault(_text(tokenizer, id), max(logprob, _LEAST))  # best first; two tokens may have the same text
    return found


def _text(tokenizer: Tokenizer, id: int) -> str:
    piece = tokenizer.token_bytes(id)
    text = _spelled(piece)
    return text if text.encode() == piece else f"bytes:{text}"


def _spelled(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
