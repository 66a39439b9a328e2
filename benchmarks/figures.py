"""Output of benchmarks: each measured figure is one JSON line on stdout.

Our runs and a peer's are interleaved, because the speed of a machine drifts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import TextIO

_out: TextIO | None = None


def claim_stdout() -> None:
    """Reserves standard output for figures: what libraries and other processes print there goes to standard error."""
    global _out
    sys.stdout.flush()
    _out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def compare(figure: str, ours: Callable[[], float], peer_name: str, peer: Callable[[], float], *, runs: int, goal: float) -> None:
    """Reports the median ratio of `ours()` to `peer()` over `runs` interleaved runs.

    Both give a value in the same unit, of which more is better, such as tokens/s.
    """
    pairs = [(ours(), peer()) for _ in range(runs)]
    for number, (mine, theirs) in enumerate(pairs, start=1):
        print(f"{figure} run {number}: ours {mine:.1f}, {peer_name} {theirs:.1f}", file=sys.stderr)
    report(
        figure,
        statistics.median(mine / theirs for mine, theirs in pairs),
        unit="ratio",
        ours=round(statistics.median(mine for mine, _ in pairs), 1),
        peer={"name": peer_name, "value": round(statistics.median(theirs for _, theirs in pairs), 1)},
        runs=runs,
        goal=goal,
    )


def report(figure: str, value: float | None, **rest: object) -> None:
    """Prints one figure as JSON; a `value` of None comes with the reason in `why`."""
    rounded = None if value is None else round(value, 4)
    print(json.dumps({"figure": figure, "value": rounded, **rest}), file=_out, flush=True)
