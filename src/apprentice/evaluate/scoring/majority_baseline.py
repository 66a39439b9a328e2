"""Majority baseline: the score of always giving the most frequent training answer, without reading the question.

For ranked tasks it is the choice at the index that is right most often in training; for generated tasks the most frequent answer,
if it makes up at least 1 in 100. Tasks without such an answer, as summaries, have no baseline.
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
SAMPLE = 1_000  # training rows that are counted, at most
LEAST_SHARE = 0.01


def majority_answer(corpus: Corpus, name: str) -> dict[str, Any] | None:
    """Majority answer of a task, or None: its `label` (index of the choice) or `text`, and its `share` of the `sample` rows."""
    task = next(task for task in corpus.tasks if task.name == name)
    index = corpus.indices[name]
    if index.train_source is None or not len(index.train):
        return None
    renderer = Renderer(corpus.tasks, corpus.indices)
    random = np.random.default_rng(list(hashlib.sha256(f"majority {corpus.recipe.seed} {name}".encode()).digest()))
    rows = np.sort(random.permutation(index.train)[:SAMPLE])
    template = task.scored_templates[0].name
    counts: Counter[tuple[int | None, str]] = Counter()
    for row in rows:
        try:
            example = renderer.example(name, "train", int(row), template)
        except RowError:
            continue
        if not example.choices:
            counts[None, example.target] += 1
        elif example.target in example.choices:
            counts[example.choices.index(example.target), ""] += 1
    if not counts:
        return None
    # Ties are broken by the answer itself, so that the result does not depend on the order of rows.
    (label, text), count = min(counts.items(), key=lambda item: (-item[1], str(item[0])))
    share = count / counts.total()
    if label is None and share < LEAST_SHARE:
        return None
    return {"label": label, "text": text, "share": share, "sample": counts.total()}


def baseline_records(
    questions: Sequence[Mapping[str, Any]], majorities: Mapping[str, dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """Records with the majority answer as `prediction`, for every question that has one."""
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
