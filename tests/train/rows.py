"""Packed rows made by hand, and a plain PyTorch reference that trains on the same examples one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from apprentice.train.batch import PackedRows

LENGTH = 48
WINDOW = 1024  # positions of the plan
TABLES = ("input_ids", "positions", "segment_ids", "loss_mask")


WEIGHTS = (1.0, 0.1)  # of the two tasks, where their tokens do not count alike


def packed_columns(count: int, seed: int = 0, first: int = 0, *, weighted: bool = False, window: int = 0) -> dict[str, Any]:
    """`count` packed rows of 2 to 4 examples and some padding, over a vocabulary of 500; of `window`, rows from `first`."""
    columns: dict[str, list[Any]] = {
        name: [] for name in (*TABLES, "window", "row", "examples", "example_tasks", "example_targets", "dropped")
    }
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number])
        row = {name: np.zeros(LENGTH, np.int32) for name in TABLES}
        at, targets = 0, []
        for segment in range(1, int(rng.integers(2, 5)) + 1):
            size, answer = int(rng.integers(6, 12)), int(rng.integers(1, 5))
            part = slice(at, at + size)
            row["input_ids"][part] = rng.integers(3, 500, size)
            row["positions"][part] = np.arange(size)
            row["segment_ids"][part] = segment
            row["loss_mask"][at + size - answer : at + size] = 1
            at += size
            targets.append(answer)
        row["positions"][at:] = np.arange(LENGTH - at)
        row["loss_mask"] = row["loss_mask"].astype(np.uint8)
        for name, values in row.items():
            columns[name].append(values)
        columns["window"].append(window)
        columns["row"].append(number)
        columns["examples"].append([window * WINDOW + number * 10 + place for place in range(len(targets))])
        columns["example_tasks"].append([place % 2 for place in range(len(targets))])
        columns["example_targets"].append(targets)
        columns["dropped"].append("")
    if weighted:
        columns["example_weights"] = [np.array([WEIGHTS[task] for task in row], np.float32) for row in columns["example_tasks"]]
    return columns


def packed_rows(count: int, seed: int = 0, first: int = 0, *, weighted: bool = False) -> PackedRows:
    return PackedRows.from_columns(packed_columns(count, seed, first, weighted=weighted))


def reply_rows(count: int, seed: int = 0) -> PackedRows:
    """Packed rows of an on-policy round: each example is a reply with an advantage, a reward and log-probabilities."""
    columns = packed_columns(count, seed)
    rng, replies = np.random.default_rng([3, seed]), [len(row) for row in columns["examples"]]
    for name in ("written", "held"):
        columns[name] = rng.normal(-6.2, 0.3, (count, LENGTH)).astype(np.float32)
    columns["advantages"] = [rng.normal(0, 1, number).astype(np.float32) for number in replies]
    columns["rewards"] = [np.arange(number, dtype=np.float32) for number in replies]
    return PackedRows.from_columns(columns)


def examples_of(rows: PackedRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, target mask) of every example by itself."""
    examples = []
    for ids, segments, mask in zip(rows.input_ids, rows.segment_ids, rows.loss_mask, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            here = segments == segment
            examples.append((torch.tensor(ids[here], dtype=torch.long), torch.tensor(mask[here] > 0)))
    return examples


def reference_nll(model: Any, rows: PackedRows) -> torch.Tensor:
    """The sum over target tokens with their weights, each example in a forward pass of its own, with all its logits."""
    total = torch.zeros((), dtype=torch.float32)
    tasks = [task for row in rows.facts for task in row.tasks]
    for (ids, mask), task in zip(examples_of(rows), tasks, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nll = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
        total = total + nll[mask[1:]].sum() * (WEIGHTS[task] if rows.weights is not None else 1.0)
    return total


def counted(rows: PackedRows) -> float:
    """The target tokens with their weights."""
    tasks = [(task, targets) for row in rows.facts for task, targets in zip(row.tasks, row.targets, strict=True)]
    return sum(targets * (WEIGHTS[task] if rows.weights is not None else 1.0) for task, targets in tasks)
