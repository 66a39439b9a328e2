"""Arithmetic word problems, and dates to be written out."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.passages import MONTHS
from apprentice.tasks.builtin.seeded_random import SeededRandom

NAMES = ["Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lars"]
THINGS = ["apples", "marbles", "books", "coins", "stamps", "eggs", "pencils", "shells", "cards", "buttons"]


def word_problems(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `problem` and its `calculation`, such as 7 + 5 = 12."""
    name, other = rng.some(NAMES, 2)
    things = rng.one(THINGS)
    more, has = sorted([rng.between(2, 10), rng.between(3, 10)])
    if number % 2:
        story = rng.one(
            [
                f"{name} has {has} {things} and finds {more} more. How many {things} does {name} have now?",
                f"{name} has {has} {things} and {other} has {more}. How many {things} do they have together?",
                f"There are {has} {things} in a box. {name} puts {more} more into it. How many {things} are in the box now?",
            ]
        )
        return {"problem": story, "calculation": f"{has} + {more} = {has + more}"}
    has += 1  # so that something is left
    story = rng.one(
        [
            f"{name} has {has} {things} and gives {more} of them to {other}. How many {things} does {name} have left?",
            f"{name} had {has} {things} but lost {more}. How many {things} are left?",
            f"{name} has {has} {things} and {other} has {more}. How many more {things} does {name} have?",
        ]
    )
    return {"problem": story, "calculation": f"{has} - {more} = {has - more}"}


def written_dates(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `date`, such as 2021-03-04, and `written`, 4 March 2021."""
    year, month, day = rng.between(1950, 2049), number % 12 + 1, rng.between(1, 28)
    return {"date": f"{year}-{month:02}-{day:02}", "written": f"{day} {MONTHS[month - 1]} {year}"}
