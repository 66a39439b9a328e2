"""Classes of mixed-quality data: which one each task belongs to, what its answers count, and whether the prompt shows it.

OpenChat's conditioned fine-tuning (Wang et al. 2023): a model learns from good and poor answers which is which, and is asked for
good ones. Knows nothing of rows or losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import RecipeError, did_you_mean
from apprentice.recipe import Quality
from apprentice.tasks.schema import Task


def best_of(qualities: Mapping[str, Quality]) -> str:
    """The class that counts most, and of equals the first: replies are asked for in it."""
    return max(qualities, key=lambda name: qualities[name].weight)


def classes_of(qualities: Mapping[str, Quality], tasks: Sequence[Task]) -> dict[str, str]:
    """Task → name of its class. Raises `RecipeError` for a name that is no task, or a task in two classes."""
    known = {task.name for task in tasks} | {task.cluster for task in tasks}
    found: dict[str, str] = {}
    for name, quality in qualities.items():
        for entry in quality.tasks:
            if entry not in known:
                raise RecipeError(
                    f"data.qualities.{name}: {entry!r} is neither a task nor a cluster of this recipe.{did_you_mean(entry, known)}"
                )
            for task in [task.name for task in tasks if entry in (task.name, task.cluster)]:
                if found.setdefault(task, name) != name:
                    raise RecipeError(f"data.qualities: {task!r} is in both {found[task]!r} and {name!r}; leave it in one of them.")
    return {task.name: found.get(task.name, best_of(qualities)) for task in tasks}


def layouts_of(qualities: Mapping[str, Quality], layout: Layout) -> dict[str, Layout]:
    """Class → the layout that shows it, for learning; `layout` itself is what a reply is asked for in.

    Raises `RecipeError` where a chat template shows the class, but without one does not say what it says of the best.
    """
    layouts = {name: replace(layout, quality=name) for name in qualities}
    if layout.name == "chat":
        prompts = {name: each.prompt("a") for name, each in layouts.items()}
        best = best_of(qualities)
        if len(set(prompts.values())) > 1 and layout.prompt("a") != prompts[best]:
            raise RecipeError(
                f"data.qualities: replies are asked for in the class that counts most, {best!r}, but without a `quality` the chat"
                f" template says {layout.prompt('a')!r}, not {prompts[best]!r}; write `quality | default({best!r})` in"
                " data.chat_template."
            )
    return layouts


def shown_in_the_prompt(layouts: Mapping[str, Layout]) -> bool:
    """Whether a model can tell the classes apart."""
    return len({layout.prompt("a") for layout in layouts.values()}) == len(layouts)
