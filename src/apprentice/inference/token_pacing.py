"""Token pacing: under load a reply's tokens are sent in groups, so that passing them on takes little from computing them."""

from __future__ import annotations

_SECONDS_PER_REQUEST = 0.003
_MOST_SECONDS = 0.1


def pacing_seconds(running: int) -> float:
    """Least seconds between two groups of tokens of one reply while `running` requests run: 0 for one alone, at most 0.1."""
    return min(_MOST_SECONDS, _SECONDS_PER_REQUEST * (running - 1))
