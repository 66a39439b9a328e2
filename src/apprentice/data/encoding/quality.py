"""Quality classes of mixed-quality data (`data.qualities`): the class of each task, and the prompt format that shows it.

This is OpenChat's conditioned fine-tuning (Wang et al. 2023): a chat template can show the class of an answer in training, and
replies are requested in the class of the largest weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import RecipeError, did_you_mean
from apprentice.recipe import Quality
from apprentice.tasks.schema import Task


def best_class(qualities: Mapping[str, Quality]) -> str:
    """The class of the largest weight, the first one among equals; replies are requested in it."""
    return max(qualities, key=lambda name: qualities[name].weight)


def assign_classes(qualities: Mapping[str, Quality], tasks: Sequence[Task]) -> dict[str, str]:
    """Task → name of its class; tasks in no class belong to the best one.

    Raises `RecipeError` for an entry that is neither a task nor a cluster, or for a task in two classes.
    """
    known = {task.name for task in tasks} | {task.cluster for task in tasks}
    class_of: dict[str, str] = {}
    for name, quality in qualities.items():
        for entry in quality.tasks:
            if entry not in known:
                raise RecipeError(
                    f"data.qualities.{name}: {entry!r} is neither a task nor a cluster of this recipe.{did_you_mean(entry, known)}"
                )
            for task in [task.name for task in tasks if entry in (task.name, task.cluster)]:
                if class_of.setdefault(task, name) != name:
                    raise RecipeError(
                        f"data.qualities: {task!r} is in both {class_of[task]!r} and {name!r}; leave it in one of them."
                    )
    return {task.name: class_of.get(task.name, best_class(qualities)) for task in tasks}


def layout_of_each_class(qualities: Mapping[str, Quality], layout: Layout) -> dict[str, Layout]:
    """Class → the layout whose chat template gets that class, for training; `layout` itself is used for replies.

    Raises `RecipeError` where a chat template shows the class, but its prompt without one is not that of the best class.
    """
    layouts = {name: replace(layout, quality=name) for name in qualities}
    if layout.name == "chat":
        prompts = {name: each.prompt("a") for name, each in layouts.items()}
        best = best_class(qualities)
        if len(set(prompts.values())) > 1 and layout.prompt("a") != prompts[best]:
            raise RecipeError(
                f"data.qualities: replies are asked for in the class that counts most, {best!r}, but without a `quality` the chat"
                f" template says {layout.prompt('a')!r}, not {prompts[best]!r}; write `quality | default({best!r})` in"
                " data.chat_template."
            )
    return layouts


def are_classes_shown(layouts: Mapping[str, Layout]) -> bool:
    """Whether every class has another prompt, so that a model can tell the classes apart."""
    return len({layout.prompt("a") for layout in layouts.values()}) == len(layouts)
