"""The board's application and the process that serves it until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from apprentice import __version__
from apprentice.board.access import BoardAccess, is_every_address, is_loopback
from apprentice.board.confirmation import add_confirmation
from apprentice.board.routes.report_routes import add_report_routes
from apprentice.board.routes.run_routes import add_run_routes
from apprentice.board.routes.static_routes import add_static_routes
from apprentice.board.run_list import Board
from apprentice.errors import ApprenticeError, EvaluationError, MissingError, RunError, ServingError

KEY = "APPRENTICE_BOARD_KEY"  # environment variable with the board's key


def board_app(board: Board, *, host: str = "127.0.0.1", key: str | None = None) -> ASGIApp:
    """The board as an ASGI application, which answers requests for `host` that send `key`, or all if it is None."""
    app = FastAPI(title="apprentice board", version=__version__, docs_url=None, redoc_url=None)
    add_run_routes(app, board)
    add_report_routes(app, board)
    add_static_routes(app)
    add_confirmation(app)

    @app.exception_handler(ApprenticeError)
    async def refuse(_: Request, error: ApprenticeError) -> JSONResponse:
        status = 404 if isinstance(error, RunError | EvaluationError | MissingError) else 400
        return JSONResponse({"error": {"code": type(error).__name__, "message": str(error)}}, status)

    return BoardAccess(app, key=key, hosts=[host], any_host=is_every_address(host), read_only=board.read_only)


def serve_board(board: Board, *, host: str, port: int, key: str | None, tell: Callable[[str], None]) -> None:
    """Serves the board until Ctrl-C or SIGTERM, and calls `tell` with its address once it listens; port 0 takes a free one.

    Raises `ServingError` for an address other than loopback without a key, and for one that cannot be listened on.
    """
    if key is None and not is_loopback(host):
        raise ServingError(
            f"a board on {host} can be reached by others, so it needs a key: set {KEY}, give --key, or listen on 127.0.0.1."
        )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServingError(f"port {port} on {host} cannot be used ({error.strerror}); choose another with --port.") from error
    with listener:
        shown = f"[{host}]" if ":" in host else host
        tell(f"http://{shown}:{listener.getsockname()[1]}")
        server = uvicorn.Server(
            uvicorn.Config(
                board_app(board, host=shown, key=key), log_level="warning", server_header=False, timeout_graceful_shutdown=1
            )
        )
        server.run(sockets=[listener])
