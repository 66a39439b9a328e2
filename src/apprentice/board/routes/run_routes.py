"""Routes of the pages Runs and One run: the list, one run, its series and live records, tags and archive."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from apprentice.board.confirmation import confirm
from apprentice.board.record_feed import RecordFeed, RecordFeeds
from apprentice.board.run_list import Board, describe_row, list_rows
from apprentice.board.run_notes import RunNotes, Tag

_MOST_EVENTS = 500


class TagsRequest(BaseModel):
    """The tags that a run has afterwards."""

    model_config = ConfigDict(extra="forbid")
    tags: list[Tag] = Field(max_length=50)


class ArchiveRequest(BaseModel):
    """Whether the run is archived afterwards."""

    model_config = ConfigDict(extra="forbid")
    archived: bool


def add_run_routes(app: FastAPI, board: Board) -> None:
    """Adds the routes under `/api/runs`."""
    feeds = RecordFeeds()

    @app.get("/api/runs")
    def runs() -> dict[str, Any]:
        """All runs of the storage: what `apprentice runs --json` prints, with holder, GPU-hours, cost, tags and archive."""
        return {"runs": list_rows(board), "storage": board.storage, "read_only": board.read_only}

    @app.get("/api/runs/{name}")
    def run(name: str) -> dict[str, Any]:
        """One run: what `apprentice runs NAME --json` prints, with events, samples, memory, the mixture and names of series."""
        opened = board.run(name)
        series = feeds.of(opened).series()
        ledger = opened.ledger_file
        checkpoints = [child.name for child in opened.checkpoints.children() if not child.name.startswith(".")]
        return describe_row(board, name) | {
            "events": series.events[-_MOST_EVENTS:],
            "samples": series.samples,
            "memory": series.memory,
            "series": series.names,
            "checkpoints": checkpoints,
            "ledger": ledger.read_json() if ledger.exists() else None,
            "has_report": (opened.report / "report.json").exists(),
        }

    @app.get("/api/runs/{name}/series")
    def series_of(
        name: str,
        metric: Annotated[list[str], Query(max_length=20)],
        points: Annotated[int, Query(ge=10, le=5000)] = 800,
        smoothing: Annotated[float, Query(ge=0.0, le=0.999)] = 0.0,
        first: int | None = None,
        last: int | None = None,
    ) -> dict[str, Any]:
        """Series of figures over the steps, downsampled to about `points` between the steps `first` and `last`."""
        series = feeds.of(board.run(name)).series()
        return {each: series.sampled(each, points=points, smoothing=smoothing, first=first, last=last) for each in metric}

    @app.get("/api/runs/{name}/records")
    async def records(name: str) -> StreamingResponse:
        """Server-sent events: `records`, a list of new records of steps.jsonl; and `end` once nobody holds the run."""
        feed = feeds.of(board.run(name))
        return StreamingResponse(_events(feed), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    _add_changes(app, board)


def _add_changes(app: FastAPI, board: Board) -> None:
    @app.put("/api/runs/{name}/tags")
    def set_tags(request: Request, name: str, body: TagsRequest) -> dict[str, Any]:
        """Sets the tags of a run."""
        tagged = board.run(name)
        tags = list(dict.fromkeys(body.tags))
        confirm(request, f"The run {name} gets the tags {', '.join(tags)}." if tags else f"All tags of the run {name} are removed.")
        RunNotes.of(tagged).model_copy(update={"tags": tags}).save(tagged)
        return describe_row(board, name)

    @app.put("/api/runs/{name}/archive")
    def set_archive(request: Request, name: str, body: ArchiveRequest) -> dict[str, Any]:
        """Archives a run, or takes it out of the archive."""
        noted = board.run(name)
        out = f"The run {name} is listed again."
        confirm(request, f"The run {name} is archived: the list leaves it out, and no file is removed." if body.archived else out)
        RunNotes.of(noted).model_copy(update={"archived": body.archived}).save(noted)
        return describe_row(board, name)


async def _events(feed: RecordFeed) -> AsyncIterator[str]:
    async for batch in feed.watch():
        yield f"event: records\ndata: {json.dumps(batch)}\n\n"
    yield "event: end\ndata: {}\n\n"
