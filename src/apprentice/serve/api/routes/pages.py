"""Browser pages: the playground at `/`, and a description of the endpoint's routes at `/docs`.

Static files without a build step.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_FOLDER = Path(__file__).parents[2] / "playground"
_PAGES = {"/": "index.html", "/docs": "docs.html"}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The pages need nothing from other hosts, and must not be made to load anything from there.
_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:", "Cache-Control": "no-cache"}


def add_pages(app: FastAPI) -> None:
    """Adds both pages to `app`, and their files under `/playground/`."""

    def route(path: str, file: Path) -> None:
        @app.get(path, include_in_schema=False)
        async def asset() -> FileResponse:
            return FileResponse(file, media_type=_KINDS[file.suffix], headers=_HEADERS)

    for path, name in _PAGES.items():
        route(path, _FOLDER / name)
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in _KINDS:
            route(f"/playground/{file.name}", file)
