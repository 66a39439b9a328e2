"""Result of an evaluation: the contents of report.json with its folder, as a table and for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from apprentice.errors import EvaluationError
from apprentice.evaluate.report.report_schema import Report
from apprentice.python_api.html_display import html_heading, html_paragraph, html_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class EvaluationReport:
    """A report: `content` is report.json as an object, `folder` the path or URI of the folder with report.html beside it."""

    content: Report
    folder: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any], folder: object) -> Self:
        """The report with the contents of report.json. Raises `EvaluationError` for one that another version wrote."""
        try:
            return cls(Report.model_validate(values), str(folder))
        except ValidationError as error:
            raise EvaluationError(
                f"the report in {folder} was written by another version of apprentice; make it again with `apprentice report`."
            ) from error

    @property
    def score(self) -> float | None:
        """Mean score of the last subject over all tasks, 0 to 100; None if nothing was scored."""
        return self.content.summary.score

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        return self.content.summary.sentence

    @property
    def is_passed(self) -> bool | None:
        """Verdict of the recipe's `evaluation.gate`; None without a gate."""
        return self.content.gate.passed if self.content.gate is not None else None

    def scores(self) -> Iterator[dict[str, Any]]:
        """One row for each task and column: task, cluster, exposure, metric, column, score and its interval, questions."""
        titles = self.content.titles
        for task in self.content.tasks:
            for key, column in task.columns.items():
                low, high = column.interval or (None, None)
                yield {
                    "task": task.task,
                    "cluster": task.cluster,
                    "exposure": task.exposure,
                    "metric": task.metric,
                    "column": titles[key],
                    "score": column.score,
                    "low": low,
                    "high": high,
                    "questions": column.questions,
                }

    def to_frame(self) -> pd.DataFrame:
        """`scores` as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(list(self.scores()))

    def __str__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        rows = [list(row.values()) for row in self.scores()]
        columns = ["task", "cluster", "exposure", "metric", "column", "score", "low", "high", "questions"]
        where = html_paragraph(f"{self.folder}/report.html")
        return html_heading(self.content.name) + html_paragraph(self.sentence) + html_table(columns, rows) + where
