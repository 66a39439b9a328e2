"""Report of an evaluation as pydantic models: what `summarise` builds, report.json holds and `apprentice report-schema` prints.

    Report ── columns   a subject at one number of exemplars
           ├─ tasks     scores of each column (`ColumnScores`), differences of columns, sample questions
           ├─ pools     means over the tasks of one exposure and kind
           └─ clusters  means over the tasks of one exposure and cluster

The order of the fields is that of the keys in report.json; a field that was not set has no key.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apprentice.tasks.exposure import Exposure

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "unclear"]
Kind = Literal["ranked", "generated"]


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
    """Score of the questions in one wording."""

    score: float
    questions: int


class PerturbationScore(_Entry):
    """Score of perturbed questions, beside that of the same questions unperturbed."""

    questions: int
    score: float
    unchanged_score: float
    changed: float | None = Field(description="Share of rows (0 to 100) whose answer changed.")


class LabelShares(_Entry):
    """Share (0 to 100) of one choice among the predictions (`said`) and among the right answers."""

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
    rows: int | None = None
    tasks: int | None = None
    mean: float
    interval: Interval
    p: float
    p_adjusted: float
    verdict: Verdict


class SampleQuestion(_Entry):
    """A question with the reply of each column; `score` and `gain` are those of the last subject, in the lists of extremes."""

    task: str | None = None
    row: int
    template: str
    prompt: str | None
    target: str | None
    replies: dict[str, str]
    score: float | None = None
    gain: float | None = None


class Contamination(_Entry):
    """Number of a task's test rows, `of` so many, that share a passage with training rows."""

    rows: int
    of: int
    dropped: int
    kept: int = Field(0, description="Training rows that share a passage and were trained on all the same.")


class TaskEntry(_Entry):
    """A task: its scores in each column, and the differences of columns over the rows that both answered."""

    task: str
    cluster: str
    summary: str
    kind: Kind
    metrics: list[str]
    held_out: bool
    exposure: Exposure = Field(description="Whether its cluster is nowhere trained on, others of it are, or it is itself.")
    majority: dict[str, Any] | None
    contaminated: Contamination | None = None
    metric: str
    columns: dict[str, ColumnScores]
    differences: dict[str, Difference]
    samples: list[SampleQuestion]
    extremes: dict[Literal["best", "worst"], list[SampleQuestion]]


class GroupMean(_Entry):
    """Means of one column over the tasks of a group."""

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
    kind: Kind | None = None
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
    reward: tuple[float, float]
    words: tuple[float, float]
    log_ratio: float | None = Field(
        description="How much likelier its replies are to it than to the other, in nats per token; greedy, so no divergence."
    )
    p_adjusted: float
    verdict: Verdict


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
    """One bound of the quality gate; `found` is null if nothing was measured for it."""

    name: str
    found: float | None
    needed: float
    passed: bool


class GateVerdict(_Entry):
    """Verdict of the quality gate on one subject: passed if all checks are."""

    subject: str
    passed: bool
    checks: list[GateCheck]


class UnscoredQuestion(_Entry):
    """A question that was asked and has no answer."""

    subject: str
    task: str
    row: int
    template: str
    shots: int
    perturbation: str
    reason: str


class UnscoredTask(_Entry):
    """A task that was not scored, or not at every number of exemplars."""

    task: str
    reason: str


class Ranking(_Entry):
    """Rule by which choices were ranked, and its meaning in words."""

    by: str
    meaning: str


class Summary(_Entry):
    """Mean score of the last subject over all tasks, at its fewest exemplars, and one sentence about the pools."""

    score: float | None
    sentence: str


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
    tasks: list[TaskEntry]
    subjects: list[SubjectEntry]
    not_scored: list[UnscoredTask]
    test_rows: dict[str, int] = {}
    story: dict[Literal["history", "ledger", "export", "time"], Any]
    shared: dict[str, SharedQuestions] | None = Field(None, description="Task → what compared runs have in common.")
    confidence: float
    resamples: int
    ranking: Ranking
    signatures: dict[str, str]
    columns: list[Column]
    pools: list[GroupEntry]
    clusters: list[GroupEntry]
    unscored: list[UnscoredQuestion]
    judged: WinRates | None = None
    headline: list[str]
    summary: Summary
    gate: GateVerdict | None

    def as_json(self) -> dict[str, Any]:
        """The contents of report.json as JSON values; fields that were not set have no key."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def compared_columns(self) -> list[Column]:
        """Columns that are compared with another."""
        return [column for column in self.columns if column.against]

    @property
    def last_column(self) -> Column:
        """The last subject at its fewest exemplars: the column that summary, gate and extremes are about."""
        return first_column_of(self.columns[-1].subject, self.columns)

    @property
    def titles(self) -> dict[str, str]:
        """Column key → title."""
        return {column.key: column.title for column in self.columns}


def first_column_of(subject: str, columns: list[Column]) -> Column:
    """First column of a subject, which is that with the fewest exemplars."""
    return next(column for column in columns if column.subject == subject)
