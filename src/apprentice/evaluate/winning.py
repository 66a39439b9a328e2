"""What a reward model says of the subjects' written replies: who wins how often, and what it may have cost. Pure.

Win rate: how often (0 to 100) the reward of a reply is higher than that of the reply it is compared with, a tie counting half; its
interval is by bootstrap over rows, the wordings of a row together. Beside it stand two ways to please a reward model without being
better: longer replies, and replies far from what the base would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apprentice.evaluate.intervals import RowSums, bootstrap, interval
from apprentice.evaluate.metrics import METRICS

Record = Mapping[str, Any]


def judged_by(
    judge: str, records: Sequence[Record], columns: Sequence[Mapping[str, Any]], held_out: Mapping[str, bool], resamples: int
) -> dict[str, Any]:
    """`judge`, and `lines`: one for held-out and one for trained-on tasks of each column that is compared with another.

    `held_out` says it of each task. A line has `win_rate`, `interval`, `questions`, and of both sides `reward` and `words` (means);
    `divergence` is the mean log-ratio to the compared column per token of the replies, in nats, where both were asked alike.
    """
    met = {(_column(record), *_question(record)): record for record in records if record["reward"] is not None}
    lines = []
    for held in (True, False):
        for column in columns:
            ours, theirs = column["key"], column["against"]
            pairs = [
                (record, met[theirs, *question])
                for (key, *question), record in met.items()
                if key == ours and held_out[record["task"]] is held and (theirs, *question) in met
            ]
            if pairs:
                lines.append({"held_out": held, "column": ours, "against": theirs, **_line(pairs, f"{held} {ours}", resamples)})
    return {"judge": judge, "lines": lines}


def _line(pairs: Sequence[tuple[Record, Record]], key: str, resamples: int) -> dict[str, Any]:
    wins = [[float(np.sign(one["reward"] - other["reward"])) / 2 + 0.5] for one, other in pairs]
    names = sorted({(one["task"], one["row"]) for one, _ in pairs})
    numbers = {name: number for number, name in enumerate(names)}
    sums = RowSums.of([numbers[one["task"], one["row"]] for one, _ in pairs], wins)
    share = METRICS["accuracy"]  # the mean of what is between 0 and 1, as 0 to 100
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    measured = [one for one in sides[0] if one["log_ratio"] is not None]
    tokens = sum(one["reply_tokens"] for one in measured)
    return {
        "questions": len(pairs),
        "win_rate": sums.score(share),
        "interval": list(interval(bootstrap({"": sums}, share, f"judge {key}", resamples)[""])),
        "reward": [float(np.mean([record["reward"] for record in side])) for side in sides],
        "words": [float(np.mean([len(record["prediction"].split()) for record in side])) for side in sides],
        "divergence": sum(one["log_ratio"] for one in measured) / tokens if tokens else None,
    }


def _column(record: Record) -> str:
    return f"{record['subject']}@{record['shots']}"


def _question(record: Record) -> tuple[Any, ...]:
    return record["task"], record["row"], record["template"], record["perturbation"]
