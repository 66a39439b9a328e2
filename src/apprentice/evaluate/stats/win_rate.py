"""Win rates of subjects' generated replies by a reward model, the judge. Pure functions.

The win rate is how often (0 to 100) the reward of a reply is higher than that of the reply it is compared with; a tie counts half.
Its interval is Wilson's over rows, with the wordings of a row together. Two numbers beside it show ways to please a reward model
without being better: the length of replies, and how unlikely they are to the other subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apprentice.evaluate.stats.bootstrap import RowSums, p_value, permuted_differences, score_interval
from apprentice.evaluate.stats.metrics import METRICS
from apprentice.tasks.exposure import EXPOSURES

Record = Mapping[str, Any]


def compute_win_rates(
    judge: str, records: Sequence[Record], columns: Sequence[Mapping[str, Any]], exposures: Mapping[str, str], resamples: int
) -> dict[str, Any]:
    """Judgement of the report: `judge`, and `lines`, one for each exposure and each column that is compared with another.

    A line has `win_rate`, `interval`, `p` (permutation test of wins and losses), `questions`, and for both sides the mean `reward`
    and `words`. `log_ratio` is how much likelier the replies are to the column itself than to the other one, in nats per token, if
    both got the same prompts. Replies are greedy and tokenised again, so it does not estimate a divergence of the two models.
    """
    met = {(_column(record), *_question(record)): record for record in records if record["reward"] is not None}
    lines = []
    for exposure in EXPOSURES:
        for column in columns:
            ours, theirs = column["key"], column["against"]
            pairs = [
                (record, met[theirs, *question])
                for (key, *question), record in met.items()
                if key == ours and exposures[record["task"]] == exposure and (theirs, *question) in met
            ]
            if pairs:
                about = {"held_out": exposure == "held_out", "exposure": exposure, "column": ours, "against": theirs}
                lines.append(about | _line(pairs, f"{exposure} {ours}", resamples))
    return {"judge": judge, "lines": lines}


def _line(pairs: Sequence[tuple[Record, Record]], key: str, resamples: int) -> dict[str, Any]:
    wins = [[float(np.sign(one["reward"] - other["reward"])) / 2 + 0.5] for one, other in pairs]
    names = sorted({(one["task"], one["row"]) for one, _ in pairs})
    numbers = {name: number for number, name in enumerate(names)}
    rows = [numbers[one["task"], one["row"]] for one, _ in pairs]
    sums, losses = RowSums.of(rows, wins), RowSums.of(rows, [[1.0 - won] for [won] in wins])
    share = METRICS["accuracy"]  # the mean of numbers between 0 and 1, as 0 to 100
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    measured = [one for one in sides[0] if one["log_ratio"] is not None]
    tokens = sum(one["reply_tokens"] for one in measured)
    return {
        "questions": len(pairs),
        "win_rate": sums.score(share),
        "interval": list(score_interval(sums, share, f"judge {key}", resamples)),
        "p": p_value(sums.score(share) - losses.score(share), permuted_differences(sums, losses, share, f"judge {key}", resamples)),
        "reward": [float(np.mean([record["reward"] for record in side])) for side in sides],
        "words": [float(np.mean([len(record["prediction"].split()) for record in side])) for side in sides],
        "log_ratio": sum(one["log_ratio"] for one in measured) / tokens if tokens else None,
    }


def _column(record: Record) -> str:
    return f"{record['subject']}@{record['shots']}"


def _question(record: Record) -> tuple[Any, ...]:
    return record["task"], record["row"], record["template"], record["perturbation"]
