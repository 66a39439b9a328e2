"""`apprentice.Run`: a run folder with the stages that follow training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from apprentice.console import ignore_progress
from apprentice.errors import EvaluationError, RunError
from apprentice.pipeline import Progress
from apprentice.python_api.endpoint_client import EndpointClient, open_endpoint
from apprentice.python_api.evaluation_report import EvaluationReport
from apprentice.python_api.html_display import html_heading, html_table
from apprentice.run.folder import Run, find_run
from apprentice.run.json_lines import read_records

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class InteractiveRun(Run):
    """One run, given by its folder; `Run.open` finds it by name. `name`, `is_trained`, `status()` and `recipe()` tell of it."""

    @classmethod
    def open(cls, name: str | Path, storage: str = "./runs") -> Self:
        """The run of this name in `storage`, or in this folder (path or URI). Raises `RunError` if there is none."""
        run = find_run(str(name), storage)
        if run is None:
            raise RunError(f"{str(name)!r} is not a run in {storage}; `apprentice runs` lists them.")
        return cls(run.folder)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The records of its training so far: steps (`step`, `loss`, `learning_rate`, …), validations and other news, in order."""
        yield from read_records(self.folder / "steps.jsonl")

    def metrics_frame(self) -> pd.DataFrame:
        """Its steps as a DataFrame, a row a step; a step that was made again after a fault stands there as it was made last."""
        return records_to_frame(self.metrics())

    def evaluate(
        self,
        *overrides: str,
        tasks: Iterable[str] = (),
        against: str | None = None,
        out: str | Path | None = None,
        restart: bool = False,
        progress: Progress | None = None,
    ) -> EvaluationReport:
        """Scores it beside its base model, or beside the run or model `against`, as `apprentice evaluate` does.

        `overrides` are `key.path=value`; `tasks` are scored instead of the recipe's; the report goes into the run, or to `out`.
        Raises `RunError` for a run without a trained model, and `FencedError` if another process holds it.
        """
        from apprentice.pipeline import EvaluationOptions, evaluate_target

        options = EvaluationOptions(
            tasks=tuple(tasks), against=against, out=Path(out) if out else None, restart=restart, storage=str(self._storage)
        )
        report, folder = evaluate_target(str(self.folder), overrides, options=options, progress=progress or ignore_progress)
        return EvaluationReport.from_json(report, folder)

    def last_report(self) -> EvaluationReport:
        """The report that lies in the run. Raises `EvaluationError` if it was not evaluated yet."""
        file = self.report / "report.json"
        if not file.exists():
            raise EvaluationError(f"run {self.name!r} has no report yet; score it first with `evaluate`.")
        return EvaluationReport.from_json(file.read_json(), self.report)

    def predict(
        self,
        file: str | Path,
        out: str | Path | None = None,
        *,
        max_tokens: int = 128,
        restart: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Writes its replies to every row of `file` (JSONL or Parquet with `instruction`, `input`), as `apprentice predict` does.

        Returns `out` (the folder with the Parquet parts), `rows`, `parts` and `bad_rows`. Raises as `apprentice.predict_file` does.
        """
        from apprentice.python_api.functions import predict_file

        return predict_file(str(self.folder), file, out, max_tokens=max_tokens, restart=restart, progress=progress)

    def serve(self, *, port: int = 0, progress: Progress | None = None, **options: Any) -> AbstractContextManager[EndpointClient]:
        """Serves it for a `with` block, which gets a client; port 0 takes a free one.

        `options` are those of `apprentice.serve_model`. Raises `RunError` for a run without a trained model, and `ServingError`
        where the endpoint cannot start.
        """
        return open_endpoint(str(self.folder), port=port, progress=progress, **options)

    def export(self, folder: str | Path) -> dict[str, Any]:
        """Writes merged weights, tokenizer and prompt contract into a new folder; returns `folder` and `bytes`."""
        from apprentice.pipeline import export_run

        return export_run(str(self.folder), str(folder), storage=str(self._storage))

    @property
    def _storage(self) -> str:
        return str(self.folder).rpartition("/")[0]

    def _repr_html_(self) -> str:
        status = self.status()
        shown = ("state", "step", "steps", "loss", "validation_loss", "score", "updated")
        rows = [(key.replace("_", " "), status[key]) for key in shown if status.get(key) is not None]
        return html_heading(f"run {self.name}") + html_table(["", str(self.folder)], rows)


def records_to_frame(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of a training as a DataFrame, a row a step, with the validations of that step; later records replace earlier ones."""
    import pandas as pd

    steps: dict[int, dict[str, Any]] = {}
    left_out = ("examples", "samples", "message", "memory")
    for record in records:
        if "loss" in record or "validation_loss" in record or "held_out" in record:
            steps.setdefault(record["step"], {}).update({key: value for key, value in record.items() if key not in left_out})
    return pd.DataFrame([steps[step] for step in sorted(steps)])
