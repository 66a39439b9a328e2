"""Fidelity of an exported model: its distance from the trained one on rows of the run, in log-probabilities or rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apprentice.data.encoding.tokenize import Tokenized
from apprentice.errors import TrainingError
from apprentice.models.reward import choice_rewards, is_reward
from apprentice.train.batch import Seq2SeqBatch
from apprentice.train.losses.sft import Seq2SeqLoss, SupervisedLoss

CLOSE = 5e-3  # nats, largest of all tokens: how far merging an adapter in float32 may move a log-probability
CLOSE_NARROW = 0.25  # nats, mean of all tokens: how far a 16-bit number format may


def score_examples(model: Any, examples: Sequence[Tokenized]) -> Tensor:
    """Log-probability (nats) of every target token of `examples`, float32 (targets,); from a reward model, every answer's reward.

    Both answers of a preference pair are included. In an example without an answer all tokens but the first are targets.
    """
    answers = [answer for example in examples for answer in example.answers]
    if is_reward(model):
        return torch.tensor(choice_rewards(model, [()] * len(answers), [[answer.ids] for answer in answers])).flatten()
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return _score_pairs(Seq2SeqLoss(model), answers)
        ids, is_target = _pad([answer.ids for answer in answers], [_targets(answer) for answer in answers])
        places = is_target.flatten().nonzero()[:, 0]
        return -SupervisedLoss(model).targets.causal(ids, None, places, "none").float().cpu()


def _score_pairs(loss: Seq2SeqLoss, answers: Sequence[Tokenized]) -> Tensor:
    starts = [_start(answer) for answer in answers]
    ids, segments = _pad([answer.ids[:start] for answer, start in zip(answers, starts, strict=True)])
    replies = [answer.ids[start:] for answer, start in zip(answers, starts, strict=True)]
    targets = [_targets(answer)[start:] for answer, start in zip(answers, starts, strict=True)]
    reply_ids, is_target = _pad(replies, targets)
    _, reply_segments = _pad(replies)
    positions = torch.arange(reply_ids.shape[1]).expand_as(reply_ids)
    batch = Seq2SeqBatch(ids, segments.long(), reply_ids, positions, reply_segments.long(), is_target)
    return -loss.targets.seq2seq(batch, "none").float().cpu()


def _start(answer: Tokenized) -> int:
    """Place of the first token of the reply; in an example without an answer the second token."""
    return answer.prompt_length if answer.prompt_length < len(answer.ids) else 1


def _targets(answer: Tokenized) -> list[bool]:
    """Which tokens of prompt and reply are targets."""
    is_target = [place >= _start(answer) for place in range(len(answer.ids))]
    for first, last in answer.untrained:
        is_target[first:last] = [False] * (last - first)
    return is_target


def _pad(rows: Sequence[Sequence[int]], marks: Sequence[Sequence[bool]] | None = None) -> tuple[Tensor, Tensor]:
    """The rows, int64, and their marks (by default that there is a token), boolean, both (rows, length), padded at the end.

    All in one batch: where weights are streamed, each pass through the model reads all of them.
    """
    length = max(map(len, rows))
    ids, is_marked = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        is_marked[number, : len(row)] = True if marks is None else torch.tensor(marks[number])
    return ids, is_marked


def compare_scores(trained: Tensor, exported: Tensor, dtype: torch.dtype, *, rewards: bool) -> dict[str, Any]:
    """Compares `exported`, from the exported model in `dtype`, with `trained`, from the trained weights in float32.

    Returns `of` (what was compared), `dtype`, `count`, and the `mean` and `largest` absolute difference. Raises `TrainingError` if
    the difference is too large: the largest in float32, the mean otherwise. Rewards have no fixed scale, so those above 1 are
    compared relatively.
    """
    what = "rewards" if rewards else "log-probabilities"
    difference = (exported - trained).abs()
    scaled = difference / trained.abs().clamp(min=1) if rewards else difference
    is_float32 = dtype == torch.float32
    distance = float(scaled.max() if is_float32 else scaled.mean())
    if not distance <= (CLOSE if is_float32 else CLOSE_NARROW):
        raise TrainingError(
            f"the exported model's {what} are {distance:.1e} from the trained model's; do not use it, and report this."
        )
    return {
        "of": what,
        "dtype": str(dtype).removeprefix("torch."),
        "count": len(difference),
        "mean": float(difference.mean()),
        "largest": float(difference.max()),
    }
