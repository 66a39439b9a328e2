"""A small corpus for tests: sums (short, generated, one inverted wording) and stories (longer, ranked), in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder

CorpusOf = Callable[..., Corpus]

SUMS = {
    "name": "sums",
    "cluster": "numbers",
    "sources": [{"files": {"train": "sums.jsonl"}}],
    "answer": "{{ a + b }}",
    "metrics": ["exact_match"],
    "templates": [
        {"name": "add", "instruction": "Add the two numbers.", "input": "{{ a }} and {{ b }}"},
        {"name": "total", "instruction": "What is the total of {{ a }} and {{ b }}?"},
        {
            "name": "back",
            "inverted": True,
            "instruction": "Two numbers with the sum {{ answer }}, please.",
            "output": "{{ a }} and {{ b }}",
        },
    ],
}
STORIES = {
    "name": "stories",
    "cluster": "tone",
    "sources": [{"files": {"train": "stories.jsonl"}}],
    "choices": ["sad", "glad"],
    "label": "glad",
    "metrics": ["accuracy"],
    "templates": [
        {"name": "mood", "instruction": "Is the story sad or glad?", "input": "{{ story }}"},
        {"name": "ending", "instruction": "How does it end?", "input": "Story: {{ story }}", "choices": ["badly", "well"]},
    ],
}


def _story(number: int) -> str:
    return " ".join(["The children are playing in the garden."] * (1 + number % 7)) + f" That was in the year {1900 + number}."


def write_tasks(folder: Path) -> None:
    """The two task files and their rows."""
    rows = {
        "sums": [{"a": number, "b": 3 * number % 17} for number in range(150)],
        "stories": [{"story": _story(number), "glad": number % 2} for number in range(90)],
    }
    for task in (SUMS, STORIES):
        name = str(task["name"])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))


def make_small_corpus(folder: Path, base: Path, training: dict[str, Any] | None = None, **data: Any) -> Corpus:
    """The corpus in `folder` for the model in `base`; keyword arguments are keys of the recipe's `data`."""
    write_tasks(folder)
    content = {
        "name": "small",
        "seed": 5,
        "storage": str(folder / "runs"),
        "model": {"base": str(base)},
        "data": {
            "tasks": [str(folder / "sums.yaml"), str(folder / "stories.yaml")],
            "validation": 0.1,
            "max_length": 200,
            "packing": {"length": 256},
            "formats": {"zero_shot": 0.6, "few_shot": 0.2, "inverted": 0.2},
            "window": 32,
        }
        | data,
        "training": training or {"workers": 2, "steps": 5, "global_batch": 4},
    }
    recipe = Recipe.model_validate(content)
    return make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=False)
