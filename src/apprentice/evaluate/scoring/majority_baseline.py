"""The majority answer: what a model that never reads the question would score.

Ranked tasks: the choice in the place that is right most often in training. Generated tasks: the most frequent training answer,
where one answer makes up at least one in a hundred; summaries have no such answer, and no such baseline.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.render import Renderer
from apprentice.errors import RowError

NAME = "majority"
SAMPLE = 1_000  # training rows looked at
LEAST_SHARE = 0.01


def majority_of(corpus: Corpus, name: str) -> dict[str, Any] | None:
    """The majority answer of a task, or None: its `label` (place of the choice) or `text`, and its `share` of the `sample` rows."""
    task = next(task for task in corpus.tasks if task.name == name)
    index = corpus.indices[name]
    if index.train_source is None or not len(index.train):
        return None
    renderer = Renderer(corpus.tasks, corpus.indices)
    random = np.random.default_rng(list(hashlib.sha256(f"majority {corpus.recipe.seed} {name}".encode()).digest()))
    rows = np.sort(random.permutation(index.train)[:SAMPLE])
    template = task.scored_templates[0].name
    found: Counter[tuple[int | None, str]] = Counter()
    for row in rows:
        try:
            example = renderer.example(name, "train", int(row), template)
        except RowError:
            continue
        if not example.choices:
            found[None, example.target] += 1
        elif example.target in example.choices:
            found[example.choices.index(example.target), ""] += 1
    if not found:
        return None
    # The first in order among equals, not the first met.
    (label, text), count = min(found.items(), key=lambda item: (-item[1], str(item[0])))
    share = count / found.total()
    if label is None and share < LEAST_SHARE:
        return None
    return {"label": label, "text": text, "share": share, "sample": found.total()}


def predicted(questions: Sequence[Mapping[str, Any]], majorities: Mapping[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The majority answer to every question that has one, as records with `prediction`."""
    answers: list[dict[str, Any]] = []
    for question in questions:
        majority = majorities.get(question["task"])
        if majority is None or question["dropped"]:
            continue
        label, choices = majority["label"], question["choices"]
        if label is None or label < len(choices):
            answer = {"prediction": majority["text"] if label is None else choices[label], "choice_logprobs": None, "prompt": None}
            answers.append(
                dict(question) | answer | {"subject": NAME, "shots": 0, "exemplars": [], "prompt_tokens": 0, "truncated": ""}
            )
    return answers
