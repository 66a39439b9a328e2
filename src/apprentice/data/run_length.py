"""Length of a run, estimated from the mean example lengths in the index: optimizer steps, tokens a step, rows a window."""

from __future__ import annotations

from math import ceil

from apprentice.data.corpus import Corpus
from apprentice.data.sampling.mixture import Size, epoch_rows

# Share of a row's tokens that each packing strategy fills with examples; two sides that must both fit waste more.
FILLED = {"best_fit": 0.98, "greedy": 0.85, "none": 1.0}
FILLED_PAIRS = {"best_fit": 0.9, "greedy": 0.75, "none": 1.0}


def estimate_steps(corpus: Corpus) -> dict[str, float]:
    """Estimates a run's size from the mean example lengths in the index: deterministic, and good to about a tenth.

    Keys: `steps` (exact where the recipe gives them), `tokens_per_step` (without padding), `target_tokens_per_step` and
    `rows_per_window`.
    """
    data, training = corpus.recipe.data, corpus.recipe.training
    tokens, targets = _mean_example(corpus)
    examples_per_row = _examples_per_row(corpus, tokens, targets)
    examples_per_step = training.global_batch * examples_per_row
    if training.steps is not None:
        steps = training.steps
    elif training.tokens is not None:
        steps = ceil(training.tokens / (examples_per_step * tokens))
    else:
        steps = ceil(positions_of_epochs(corpus) / examples_per_step)
    return {
        "steps": max(1, steps),
        "tokens_per_step": round(examples_per_step * tokens, 1),
        "target_tokens_per_step": round(examples_per_step * targets, 1),
        "rows_per_window": round(data.window / examples_per_row, 1),
    }


def positions_of_epochs(corpus: Corpus) -> int:
    """Number of plan positions in `training.epochs` epochs; an epoch has each kept row of a task once, up to the mixture's cap."""
    sizes = {
        task.name: Size(len(corpus.indices[task.name].train), task.cluster)
        for task in corpus.tasks
        if task.name not in corpus.held_out
    }
    rows = epoch_rows(corpus.recipe.data.mixture, sizes)
    return ceil((corpus.recipe.training.epochs or 0.0) * sum(rows.values()))


def _examples_per_row(corpus: Corpus, tokens: float, targets: float) -> float:
    if corpus.recipe.training.aim.rounds:
        shape = corpus.recipe.round
        return shape.prompts * shape.group * shape.passes / shape.rows
    if corpus.strategy == "none":
        return 1.0
    if corpus.target_length is None:
        return max(1.0, FILLED[corpus.strategy] * corpus.row_length / tokens)
    fitting = min(corpus.row_length / max(tokens - targets, 1.0), corpus.target_length / max(targets, 1.0))
    return max(1.0, FILLED_PAIRS[corpus.strategy] * fitting)


def _mean_example(corpus: Corpus) -> tuple[float, float]:
    """Mean (tokens, target tokens) of the plan's examples, tasks weighted by their shares."""
    data = corpus.recipe.data
    shots = sum(data.shots) / 2  # mean of a uniform draw between the two bounds
    tokens = targets = 0.0
    for task, share in corpus.plan.shares.items():
        index = corpus.indices[task]
        few_shot = min(index.mean_tokens * (1 + shots), data.max_length)
        tokens += float(share) * (index.mean_tokens + data.formats.few_shot * (few_shot - index.mean_tokens))
        targets += float(share) * index.mean_target_tokens
    return max(tokens, 1.0), targets
