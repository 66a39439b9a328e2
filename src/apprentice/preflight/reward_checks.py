"""Checks of the reward functions that an on-policy recipe names: they can be made, and the tasks have what they compare with."""

from __future__ import annotations

from collections.abc import Sequence

from apprentice.errors import RecipeError, TrainingError
from apprentice.recipe import RewardTerm
from apprentice.rewards.reward_process import RewardProcess
from apprentice.rewards.text_functions import NEED_ANSWERS
from apprentice.tasks.schema import Task


def check_rewards(terms: Sequence[RewardTerm], tasks: Sequence[Task]) -> None:
    """Raises `RecipeError` for a function that cannot be made, or that compares with answers which a task in `tasks` has not.

    Each function is made as training makes it: in a process of its own, where the user's module is imported.
    """
    for term in terms:
        if term.function is None:
            continue
        unanswered = [task.name for task in tasks if not task.has_answers]
        if term.function in NEED_ANSWERS and unanswered:
            raise RecipeError(
                f"training.grpo.reward: function {term.function} compares a reply with the row's answers, and task"
                f" {unanswered[0]!r} has prompts alone; leave it out of data.tasks, or take another function."
            )
        process = RewardProcess(term)
        try:
            process.start()
        except TrainingError as error:
            raise RecipeError(str(error)) from error
        finally:
            process.close()
