"""Schema of report.json as pydantic models; `apprentice report-schema` prints it as JSON Schema for programs that read reports.

Tests validate reports against it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apprentice.tasks.exposure import Exposure

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "unclear"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SubjectEntry(_Entry):
    """A model or endpoint that was scored."""

    name: str
    shots: list[int]
    folder: str
    layout: str
    contract: str = Field(description="Whose words it was spoken to in: `its own` or `the recipe's`.")
    weights_sha256: str | None = Field(None, description="Of what answered, where it is known.")
    dtype: str | None = Field(None, description="The number format that it computed in, where it was loaded for this.")
    prompt_tokens: int | None = None


class Column(_Entry):
    """A subject at one number of exemplars; `against` is the key of the column that it is compared with."""

    key: str
    subject: str
    shots: int
    title: str
    against: str | None


class WordingScore(_Entry):
    score: float
    questions: int


class PerturbationScore(_Entry):
    questions: int
    score: float
    unchanged_score: float
    changed: float | None


class LabelShares(_Entry):
    choice: str
    said: float
    right: float


class ColumnScores(_Entry):
    """A task in one column. If `score` is null, no question was answered, and the fields after it are left out."""

    questions: int
    truncated: dict[str, int]
    dropped: dict[str, int]
    unscored: int
    score: float | None = Field(description="0 to 100, by the task's first metric.")
    interval: Interval | None = None
    metrics: dict[str, float] | None = None
    rows: int | None = None
    wordings: dict[str, WordingScore] | None = None
    median: float | None = None
    worst: float | None = None
    worst_wording: str | None = None
    worst_interval: Interval | None = None
    spread: float | None = Field(None, description="Distance between the quartiles of the wordings' scores.")
    changed: float | None = Field(None, description="Share of rows (0 to 100) whose answer changes with the wording.")
    consistency: float | None = Field(None, description="How often (0 to 100) two askings of a row agree.")
    perturbations: dict[str, PerturbationScore] | None = None
    labels: list[LabelShares] | None = None
    exemplars: float | None = None
    prompt_tokens: float | None = None


class Difference(_Entry):
    """A difference of two columns: `mean` in points, and `p` of the paired randomisation test.

    `p_adjusted` is `p` after Benjamini and Hochberg's correction for the number of comparisons in the same table. `verdict` is
    better or worse if `p_adjusted` is at most 0.05 and the interval excludes zero.
    """

    against: str
    mean: float
    interval: Interval
    p: float
    p_adjusted: float
    verdict: Verdict
    rows: int | None = None
    tasks: int | None = None


class SampleQuestion(_Entry):
    row: int
    template: str
    prompt: str | None
    target: str | None
    replies: dict[str, str]
    task: str | None = None
    score: float | None = None
    gain: float | None = None


class Contamination(_Entry):
    rows: int
    of: int
    dropped: int
    kept: int = Field(0, description="Training rows that share a passage and were trained on all the same.")


class TaskEntry(_Entry):
    task: str
    cluster: str
    summary: str
    kind: Literal["ranked", "generated"]
    metrics: list[str]
    metric: str
    held_out: bool
    exposure: Exposure = Field(description="Whether its cluster is nowhere trained on, others of it are, or it is itself.")
    majority: dict[str, Any] | None
    contaminated: Contamination | None = None
    columns: dict[str, ColumnScores]
    differences: dict[str, Difference]
    samples: list[SampleQuestion]
    extremes: dict[Literal["best", "worst"], list[SampleQuestion]]


class GroupMean(_Entry):
    mean: float
    interval: Interval
    tasks: int
    worst: float | None
    spread: float | None
    changed: float | None
    consistency: float | None


class GroupEntry(_Entry):
    """Means over the tasks of one kind or one cluster, all weighted the same."""

    held_out: bool
    exposure: Exposure
    kind: Literal["ranked", "generated"] | None = None
    cluster: str | None = None
    tasks: int
    columns: dict[str, GroupMean]
    differences: dict[str, Difference]


class WinRate(_Entry):
    """A column's generated replies against those of the column it is compared with; pairs are (its own, the other's)."""

    held_out: bool
    exposure: Exposure
    column: str
    against: str
    questions: int
    win_rate: float = Field(description="How often (0 to 100) its reward is the higher one; a tie counts half.")
    interval: Interval
    p: float = Field(description="Of wins and losses changing sides at random.")
    p_adjusted: float
    verdict: Verdict
    reward: tuple[float, float]
    words: tuple[float, float]
    log_ratio: float | None = Field(
        description="How much likelier its replies are to it than to the other, in nats per token; greedy, so no divergence."
    )


class WinRates(_Entry):
    """Win rates by the reward model `judge`."""

    judge: str
    lines: list[WinRate]


class SharedQuestions(_Entry):
    """Number of a task's questions that all compared runs answered; columns and differences are over these."""

    rows: int
    questions: int
    of: dict[str, int] = Field(description="Run → rows that it answered.")


class GateCheck(_Entry):
    name: str
    found: float | None
    needed: float
    passed: bool


class GateVerdict(_Entry):
    subject: str
    passed: bool
    checks: list[GateCheck]


class UnscoredQuestion(_Entry):
    subject: str
    task: str
    row: int
    template: str
    shots: int
    perturbation: str
    reason: str


class Report(_Entry):
    """The contents of report.json: what was scored, how, and the results."""

    version: int
    name: str
    created: str
    seconds: float
    seed: int
    versions: dict[str, str]
    recipe: dict[str, Any]
    settings: dict[str, Any]
    subjects: list[SubjectEntry]
    not_scored: list[dict[Literal["task", "reason"], str]]
    test_rows: dict[str, int] = {}
    shared: dict[str, SharedQuestions] | None = Field(None, description="Task → what compared runs have in common.")
    story: dict[Literal["history", "ledger", "export"], Any]
    confidence: float
    resamples: int
    ranking: dict[Literal["by", "meaning"], str]
    signatures: dict[str, str]
    columns: list[Column]
    tasks: list[TaskEntry]
    pools: list[GroupEntry]
    clusters: list[GroupEntry]
    unscored: list[UnscoredQuestion]
    headline: list[str]
    summary: dict[Literal["score", "sentence"], Any]
    gate: GateVerdict | None
    judged: WinRates | None = None
