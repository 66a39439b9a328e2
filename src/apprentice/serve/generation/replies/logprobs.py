"""Log-probabilities in OpenAI's two shapes, for completions and for chats.

The produced token is listed among the best even where it was none of them. A token that is only some bytes of a character is
spelled as OpenAI spells it: `bytes:\\xf0\\x9f` in completions, `\\xf0\\x9f` in chats.
"""

from __future__ import annotations

from collections.abc import Sequence

from apprentice.inference.generation_request import ScoredToken
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.api.schemas.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot express


def completion_logprobs(scores: Sequence[ScoredToken], tokenizer: Tokenizer, offsets: Sequence[int]) -> CompletionLogprobs:
    """`logprobs` of a completion; `offsets` are the tokens' places in the choice's text, in characters."""
    return CompletionLogprobs(
        tokens=[_text(tokenizer, score.id) for score in scores],
        token_logprobs=[None if score.logprob is None else max(score.logprob, _LEAST) for score in scores],
        top_logprobs=[None if score.logprob is None else _by_text(score, tokenizer) for score in scores],
        text_offset=list(offsets),
    )


def chat_logprobs(scores: Sequence[ScoredToken], tokenizer: Tokenizer) -> ChatLogprobs:
    """`logprobs` of a chat. `top_logprobs` are empty where the request asks for no best tokens, as OpenAI's are."""

    def top(id: int, logprob: float) -> TopLogprob:
        text = tokenizer.token_bytes(id)
        return TopLogprob(token=_spelled(text), logprob=max(logprob, _LEAST), bytes=list(text))

    def entry(score: ScoredToken) -> ChatTokenLogprob:
        text = tokenizer.token_bytes(score.id)
        return ChatTokenLogprob(
            token=_spelled(text),
            logprob=max(score.logprob or 0.0, _LEAST),
            bytes=list(text),
            top_logprobs=[top(*best) for best in _best(score)] if score.top else [],
        )

    return ChatLogprobs(content=[entry(score) for score in scores], refusal=None)


def _best(score: ScoredToken) -> list[tuple[int, float]]:
    """The best tokens, and last the produced one if it is none of them."""
    is_listed = score.logprob is None or any(id == score.id for id, _ in score.top)
    return [*score.top] if is_listed else [*score.top, (score.id, score.logprob or 0.0)]


def _by_text(score: ScoredToken, tokenizer: Tokenizer) -> dict[str, float]:
    logprobs: dict[str, float] = {}
    for id, logprob in _best(score):
        logprobs.setdefault(_text(tokenizer, id), max(logprob, _LEAST))  # best first; two tokens may have the same text
    return logprobs


def _text(tokenizer: Tokenizer, id: int) -> str:
    raw = tokenizer.token_bytes(id)
    text = _spelled(raw)
    return text if text.encode() == raw else f"bytes:{text}"


def _spelled(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)
