"""Log-probabilities in the two shapes that OpenAI's clients read. Knows nothing of engines or HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apprentice.serve.engine import Score
from apprentice.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON has not


def of_completion(scores: Sequence[Score], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """Four lists, one entry for each token; `offset` is the place of the first one's text in the whole."""
    texts = [_text(tokenizer, score.id) for score in scores]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if score.logprob is None else max(score.logprob, _LEAST) for score in scores],
        "top_logprobs": [None if score.logprob is None else _best(score, tokenizer) for score in scores],
        "text_offset": offsets,
    }


def of_chat(scores: Sequence[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    """`content`, one entry for each token, with the bytes of its text."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        piece = tokenizer.token_bytes(id)
        return {"token": piece.decode(errors="replace"), "logprob": max(logprob or 0.0, _LEAST), "bytes": list(piece)}

    content = [
        entry(score.id, score.logprob) | {"top_logprobs": [entry(id, logprob) for id, logprob in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def _best(score: Score, tokenizer: Tokenizer) -> dict[str, float]:
    found: dict[str, float] = {}
    for id, logprob in score.top:
        found.setdefault(_text(tokenizer, id), max(logprob, _LEAST))  # best first; two tokens may have the same text
    return found


def _text(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.token_bytes(id).decode(errors="replace")
