"""The board's own files: the page at `/`, the description of the API at `/docs`, and the modules below `/static/`."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_FOLDER = Path(__file__).parents[1] / "static"
_DOCS_SCRIPT = Path(__file__).parents[2] / "serve" / "playground" / "docs.js"  # shows any OpenAPI description, the endpoint's too
_PAGES = {"/": "index.html", "/docs": "docs.html"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The pages need nothing from other hosts, must not be made to load anything from there, and must not stand in others' frames.
_POLICY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_static_routes(app: FastAPI) -> None:
    """Adds the pages and their files to `app`."""

    def route(path: str, file: Path) -> None:
        @app.get(path, include_in_schema=False)
        async def asset() -> FileResponse:
            return FileResponse(file, media_type=_TYPES[file.suffix], headers=_POLICY)

    for path, name in _PAGES.items():
        route(path, _FOLDER / name)
    for file in sorted([*_FOLDER.iterdir(), _DOCS_SCRIPT]):
        if file.suffix in _TYPES:
            route(f"/static/{file.name}", file)
