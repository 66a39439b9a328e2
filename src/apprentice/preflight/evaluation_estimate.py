"""Estimate of a recipe's evaluation: how many questions it asks, and roughly how long they take."""

from __future__ import annotations

from apprentice.data.stream import Corpus
from apprentice.errors import DataError
from apprentice.evaluate.questions.row_selection import select_requests
from apprentice.preflight.dry_run import format_duration
from apprentice.ray_cluster.nodes import node_resources
from apprentice.tasks.importers.unpaired import has_labels

READ_PER_DECODED = 8  # decoding one token takes as long as reading so many of a prompt: measured for 16 to 32 replies at once


def describe_evaluation(corpus: Corpus, reading_per_cpu: float | None) -> str:
    """One sentence on the number of evaluation questions, and roughly how long they take.

    `reading_per_cpu` is the speed of a forward pass in tokens/s; without it no time is given. Raises `DataError` if no
    task has test rows.
    """
    settings, length = corpus.recipe.evaluation, corpus.recipe.data.max_length
    base = settings.shots if settings.baseline_shots is None else settings.baseline_shots
    columns = [*base, *settings.shots]
    questions, tokens = 0, 0.0
    for task in corpus.tasks:
        index = corpus.indices[task.name]
        for shots in columns:
            requests = select_requests(
                task,
                index.test,
                [shots],
                max_examples=settings.max_examples,
                templates_per_row=settings.templates_per_row,
                seed=0,
                perturbations=settings.perturbations,
            )
            decoding = settings.max_new_tokens * READ_PER_DECODED if task.choices is None else 0
            questions += len(requests)
            tokens += len(requests) * (min(index.mean_tokens * (1 + shots), length) + decoding)
    without_tests = [task.name for task in corpus.tasks if not len(corpus.indices[task.name].test)]
    if not questions and any(task.has_answers and not has_labels(task) for task in corpus.tasks):
        raise DataError(
            "none of the recipe's tasks has test rows, so nothing can be scored; give one a test split, in `files` or `splits` of"
            " its source, or as `test` of an entry such as `{alpaca: FILE, test: FILE}`."
        )
    if not questions:
        return (
            f"nothing can be scored: the tasks have prompts {'with labelled' if has_labels(corpus.tasks[0]) else 'without'} answers"
        )
    more = ", …" if len(without_tests) > 3 else ""
    left_out = f"; none of {', '.join(without_tests[:3])}{more}, without test rows" if without_tests else ""
    cpus = sum(node.get("CPU", 0.0) for node in node_resources())
    time = "" if reading_per_cpu is None else f", {format_duration(tokens / (reading_per_cpu * max(1.0, cpus)))}, roughly"
    return f"{questions:,} questions to {'base and tuned model' if base else 'the tuned model'}{time}{left_out}"
