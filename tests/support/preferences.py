"""Preference records small enough for tests: forty questions with a better and a worse answer of several lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("red", "blue", "a warm green", "grey", "the colour of the sea at night", "pink")


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Name colour {number}.",
            "chosen": f"{WORDS[number % 6]}, gladly {number}.",
            "rejected": f"No. {'Never. ' * (number % 4)}{number}",
        }
        for number in range(count)
    ]


def write_pairs(file: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in (pairs() if rows is None else rows)))
    return file


def labelled(count: int = 40) -> list[dict[str, Any]]:
    """As many answers, each labelled desirable or not: the better or the worse one of a pair."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label}
        for number, pair in enumerate(pairs(count))
        for side, label in [sides[number % 2]]
    ]
