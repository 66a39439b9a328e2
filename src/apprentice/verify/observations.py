"""Observations of a verification: what was looked at, whether it has drifted from the contract, and how that shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["same", "drifted", "cannot be seen"]
SHOWN_IDS = 3  # around the first difference


@dataclass(frozen=True)
class Observation:
    """One line of the table: a `check` of a `subject`, such as a golden prompt."""

    check: Literal["weights", "tokenizer", "prompt format", "chat template", "token ids", "stops", "special tokens", "greedy text"]
    subject: str
    verdict: Verdict
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The observation as a JSON object."""
        return asdict(self)


def compare_ids(subject: str, expected: Sequence[int], seen: Sequence[int]) -> Observation:
    """Whether a prompt has the golden ids; if not, where they part and what that usually means."""
    if list(expected) == list(seen):
        return Observation("token ids", subject, "same", f"{len(expected)} ids")
    if list(seen[-len(expected) :]) == list(expected):
        extra = list(seen[: -len(expected)])
        return Observation("token ids", subject, "drifted", f"{extra} stand before the prompt; a start token is added twice?")
    if list(seen[: len(expected)]) == list(expected):
        return Observation(
            "token ids", subject, "drifted", f"{list(seen[len(expected) :])} follow the prompt; an end token is added?"
        )
    pairs = zip(expected, seen, strict=False)
    place = next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(seen)))
    ids = [list(row[place : place + SHOWN_IDS]) for row in (expected, seen)]
    return Observation(
        "token ids",
        subject,
        "drifted",
        f"{len(expected)} ids expected, {len(seen)} seen; from number {place} on {ids[0]} is {ids[1]}",
    )


def compare_values(check: Any, subject: str, expected: Any, seen: Any) -> Observation:
    """Whether a value is that of the contract."""
    shown = [value[:12] if isinstance(value, str) and len(value) == 64 else value for value in (expected, seen)]
    if expected == seen:
        return Observation(check, subject, "same", str(shown[0]))
    return Observation(check, subject, "drifted", f"expected {shown[0]!r}, seen {shown[1]!r}")


def unseen(check: Any, subject: str, reason: str) -> Observation:
    """An observation that says why something cannot be seen."""
    return Observation(check, subject, "cannot be seen", reason)
