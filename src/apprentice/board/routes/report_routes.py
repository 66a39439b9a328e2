"""Routes of the page Reports: the stored report of a run, its HTML for a frame, and its questions row by row."""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from fastapi import FastAPI, Query
from fastapi.responses import Response

from apprentice.board.run_list import Board
from apprentice.errors import EvaluationError
from apprentice.evaluate.report import predictions
from apprentice.run.folder import Run

# A report may quote anything that a model has written: it is shown without scripts, apart from the board's origin.
_FRAME = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
}
_SHOWN = ("prompt", "target", "choices", "truncated", "dropped")


def add_report_routes(app: FastAPI, board: Board) -> None:
    """Adds the routes under `/api/reports`."""

    @app.get("/api/reports/{name}")
    def report(name: str) -> dict[str, Any]:
        """The run's report.json, what `apprentice report --json` prints."""
        return dict(_file(board.run(name), "report.json").read_json())

    @app.get("/api/reports/{name}/html")
    def report_html(name: str) -> Response:
        """The run's report.html, for a frame without scripts."""
        return Response(_file(board.run(name), "report.html").read_bytes(), media_type="text/html", headers=_FRAME)

    @app.get("/api/reports/{name}/questions")
    def questions(
        name: str,
        task: str | None = None,
        template: str | None = None,
        outcome: str | None = Query(None, pattern="^(better|worse|same)$"),
        first: Annotated[int, Query(ge=0)] = 0,
        count: Annotated[int, Query(ge=1, le=200)] = 20,
    ) -> dict[str, Any]:
        """Questions with the replies of all subjects side by side; `outcome` compares the last subject's score with the first's."""
        listed = _questions(board.run(name), task, template)
        chosen = [question for question in listed if outcome is None or question["outcome"] == outcome]
        return {"total": len(chosen), "first": first, "questions": chosen[first : first + count]}


def _file(run: Run, name: str) -> Any:
    file = run.report / name
    if not file.exists():
        raise EvaluationError(f"the run {run.name} has no report; make one with `apprentice evaluate {run.name}`.")
    return file


def _questions(run: Run, task: str | None, template: str | None) -> list[dict[str, Any]]:
    """Unperturbed questions of the run's predictions, in the table's order, each with a reply a subject."""
    _file(run, predictions.FILE)
    subjects = [subject["name"] for subject in _file(run, "report.json").read_json()["subjects"]]
    table = predictions.read(run.report)
    table = table.filter(pc.is_in(table["subject"], pa.array(subjects)))  # the majority's answers are no subject's
    for column, value in (("task", task), ("template", template), ("perturbation", "")):
        if value is not None:
            table = table.filter(pc.equal(table[column], value))
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    columns = ["subject", "task", "row", "template", "shots", "prediction", "score", *_SHOWN]
    for record in table.select(columns).to_pylist():
        key = tuple(record[name] for name in ("task", "row", "template", "shots"))
        question = merged.setdefault(
            key, {name: record[name] for name in ("task", "row", "template", "shots", *_SHOWN)} | {"replies": []}
        )
        question["replies"].append({name: record[name] for name in ("subject", "prediction", "score")})
    for question in merged.values():
        question["outcome"] = _outcome([reply["score"] for reply in question["replies"]])
    return list(merged.values())


def _outcome(scores: list[float | None]) -> str | None:
    """How the last subject's score stands to the first's; None where there are not two."""
    if len(scores) < 2 or scores[0] is None or scores[-1] is None:
        return None
    return "same" if scores[0] == scores[-1] else "better" if scores[-1] > scores[0] else "worse"
