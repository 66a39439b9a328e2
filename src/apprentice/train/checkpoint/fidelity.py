"""Fidelity of an exported model: its distance from the trained one on rows of the run, in log-probabilities or rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apprentice.data.encoding.tokenize import Tokenized
from apprentice.errors import TrainingError
from apprentice.models.reward import choice_rewards, is_reward
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
    loss = (Seq2SeqLoss if model.config.is_encoder_decoder else SupervisedLoss)(model)
    with torch.no_grad():
        return torch.cat([loss.target_log_probabilities(*_parts(answer)).float().cpu() for answer in answers])


def _parts(answer: Tokenized) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and reply ids, int64, and the reply's target mask, boolean; all of shape (1, tokens)."""
    start = answer.prompt_length if answer.prompt_length < len(answer.ids) else 1
    is_target = torch.ones(1, len(answer.ids), dtype=torch.bool)
    for first, last in answer.untrained:
        is_target[0, first:last] = False
    ids = torch.tensor([answer.ids])
    return ids[:, :start], ids[:, start:], is_target[:, start:]


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
