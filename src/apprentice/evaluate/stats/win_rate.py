"""Win rates of subjects' generated replies by a reward model, the judge. Pure functions.

The win rate is how often (0 to 100) the reward of a reply is higher than that of the reply it is compared with; a tie counts half.
Its interval is Wilson's over rows, with the wordings of a row together. Two numbers beside it show ways to please a reward model
without being better: the length of replies, and how unlikely they are to the other subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apprentice.evaluate.report.report_schema import Column, WinRate, WinRates
from apprentice.evaluate.stats.bootstrap import RowSums, adjust_p_values, p_value, permuted_differences, score_interval, verdict
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.tasks.exposure import EXPOSURES

Record = Mapping[str, Any]
EVEN = 50.0  # the win rate of equals


def compute_win_rates(
    judge: str, records: Sequence[Record], columns: Sequence[Column], exposures: Mapping[str, str], resamples: int
) -> WinRates:
    """Win rates by the reward model `judge`: a line for each exposure and each column that is compared with another.

    `records` are predictions with their `reward`, `exposures` those of their tasks. `p` is of the permutation test of wins and
    losses. Replies are greedy and tokenised again, so `log_ratio` does not estimate a divergence of the two models.
    """
    rewarded = {(_column_key(record), *_question_key(record)): record for record in records if record["reward"] is not None}
    lines = []
    for exposure in EXPOSURES:
        for column in columns:
            pairs = [
                (record, rewarded[column.against, *question])
                for (key, *question), record in rewarded.items()
                if key == column.key and exposures[record["task"]] == exposure and (column.against, *question) in rewarded
            ]
            if pairs:
                fields = {"held_out": exposure == "held_out", "exposure": exposure, "column": column.key, "against": column.against}
                lines.append(fields | _compare_replies(pairs, f"{exposure} {column.key}", resamples))
    adjusted = adjust_p_values([line["p"] for line in lines])
    return WinRates(judge=judge, lines=[_win_rate(line, p) for line, p in zip(lines, adjusted, strict=True)])


def _win_rate(line: Mapping[str, Any], p_adjusted: float) -> WinRate:
    low, high = line["interval"]
    return WinRate(**line, p_adjusted=p_adjusted, verdict=verdict(low - EVEN, high - EVEN, p_adjusted))


def _compare_replies(pairs: Sequence[tuple[Record, Record]], key: str, resamples: int) -> dict[str, Any]:
    """Fields of `WinRate` that are computed from pairs of records, the column's own and the other's."""
    wins = [[float(np.sign(ours["reward"] - theirs["reward"])) / 2 + 0.5] for ours, theirs in pairs]
    names = sorted({(ours["task"], ours["row"]) for ours, _ in pairs})
    numbers = {name: number for number, name in enumerate(names)}
    rows = [numbers[ours["task"], ours["row"]] for ours, _ in pairs]
    sums, losses = RowSums.of(rows, wins), RowSums.of(rows, [[1.0 - won] for [won] in wins])
    share = METRICS["accuracy"]  # the mean of numbers between 0 and 1, as 0 to 100
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    measured = [ours for ours in sides[0] if ours["log_ratio"] is not None]
    tokens = sum(ours["reply_tokens"] for ours in measured)
    draws = permuted_differences(sums, losses, share, f"judge {key}", resamples)
    return {
        "questions": len(pairs),
        "win_rate": sums.score(share),
        "interval": score_interval(sums, share, f"judge {key}", resamples),
        "p": p_value(sums.score(share) - losses.score(share), draws),
        "reward": tuple(float(np.mean([record["reward"] for record in side])) for side in sides),
        "words": tuple(float(np.mean([len(record["prediction"].split()) for record in side])) for side in sides),
        "log_ratio": sum(ours["log_ratio"] for ours in measured) / tokens if tokens else None,
    }


def _column_key(record: Record) -> str:
    return f"{record['subject']}@{record['shots']}"


def _question_key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["row"], record["template"], record["perturbation"]
