"""Mixture ledger: each task's requested share of training against its realised share, in examples and in target tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # batch.py imports torch, which takes seconds and is not needed to count
    from apprentice.train.batch import RowFacts

DropCounts = Mapping[str, Mapping[str, int]]  # task → reason → number of examples dropped or cut
MANY_PASSES = 4  # from this pass on, repeated rows are worth clearly less than fresh ones (Muennighoff et al. 2023)


@dataclass
class Ledger:
    """Counts so far: examples and target tokens by task number; examples dropped or truncated by task name and reason."""

    examples: dict[int, int] = field(default_factory=dict)
    targets: dict[int, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, rows: Iterable[RowFacts]) -> None:
        """Counts the examples of packed rows, and what their windows dropped."""
        for row in rows:
            for task, targets in zip(row.tasks, row.targets, strict=True):
                self.examples[task] = self.examples.get(task, 0) + 1
                self.targets[task] = self.targets.get(task, 0) + targets
            self.add_drops(row.dropped)

    def add_drops(self, drops: DropCounts) -> None:
        """Counts examples that a window dropped or cut."""
        for name, reasons in drops.items():
            counts = self.dropped.setdefault(name, {})
            for reason, count in reasons.items():
                counts[reason] = counts.get(reason, 0) + count

    def to_json(self) -> dict[str, Any]:
        """The counts as they lie in a checkpoint."""
        return {"examples": _texts(self.examples), "targets": _texts(self.targets), "dropped": self.dropped}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The ledger of a checkpoint."""
        return cls(
            {int(task): count for task, count in value["examples"].items()},
            {int(task): count for task, count in value["targets"].items()},
            {name: dict(reasons) for name, reasons in value["dropped"].items()},
        )

    def drift(self, requested: Mapping[int, float]) -> float:
        """Largest difference between a task's share of the examples and its requested one; `requested` is task number → share."""
        examples = max(sum(self.examples.values()), 1)
        return max((abs(self.examples.get(task, 0) / examples - share) for task, share in requested.items()), default=0.0)

    def report(
        self,
        tasks: Sequence[str],
        requested: Mapping[str, float],
        rows: Mapping[str, int],
        mean_targets: Mapping[str, float],
        left_out: Mapping[str, Mapping[str, int]],
    ) -> dict[str, Any]:
        """Content of `ledger.json`: requested against realised shares of every trained task, and warnings.

        tasks         names, in order of the task numbers; those without a requested share are left out
        requested     name → share of the examples
        rows          name → number of training rows
        mean_targets  name → mean target tokens of an example, as frozen in the index
        left_out      name → reason → rows that are not in the index
        """
        weights = {name: float(requested[name]) * mean_targets.get(name, 0.0) for name in tasks if name in requested}
        whole = sum(weights.values()) or 1.0
        examples, targets = sum(self.examples.values()), sum(self.targets.values())
        tasks_report: dict[str, dict[str, Any]] = {
            name: {
                "requested_share": round(float(requested[name]), 6),
                "requested_share_of_target_tokens": round(weights[name] / whole, 6),
                "share_of_examples": round(self.examples.get(number, 0) / max(examples, 1), 6),
                "share_of_target_tokens": round(self.targets.get(number, 0) / max(targets, 1), 6),
                "examples": self.examples.get(number, 0),
                "target_tokens": self.targets.get(number, 0),
                "passes_over_its_rows": round(self.examples.get(number, 0) / max(rows.get(name, 0), 1), 4),
                "dropped_or_truncated": self.dropped.get(name, {}),
                "left_out_of_the_index": dict(left_out.get(name, {})),
            }
            for number, name in enumerate(tasks)
            if name in requested
        }
        warnings = [
            f"{name}: every row was drawn {task['passes_over_its_rows']:.1f} times; more of the same adds little from the"
            f" {MANY_PASSES}th time on, so cap its share or give it more rows"
            for name, task in tasks_report.items()
            if task["passes_over_its_rows"] > MANY_PASSES - 1
        ]
        return {"examples": examples, "target_tokens": targets, "tasks": tasks_report, "warnings": warnings}


def _texts(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(task): count for task, count in sorted(counts.items())}
