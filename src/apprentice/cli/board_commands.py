"""The command `board`: a web page over the runs of a storage."""

from __future__ import annotations

from typing import Annotated

import typer

from apprentice.cli.options import Storage, screen_for


def board(
    storage: Storage = "./runs",
    host: Annotated[str, typer.Option(help="Address to listen on; any other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8700,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse everything that changes something.")] = False,
    key: Annotated[str | None, typer.Option(envvar="APPRENTICE_BOARD_KEY", help="The key that the board asks for.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Price of one GPU for an hour; runs then show what they have cost.")
    ] = None,
) -> None:
    """Open a page over the runs: watch them live, compare them, read their reports; until Ctrl-C."""
    from apprentice.board.run_list import Board
    from apprentice.board.server import serve_board

    screen = screen_for(as_json=False)
    shown = Board(storage, read_only=read_only, price_per_hour=price_per_hour)
    serve_board(
        shown,
        host=host,
        port=port,
        key=key,
        tell=lambda url: screen.say(f"the board over {storage} is at {url}  (API: {url}/docs, stop with Ctrl-C)"),
    )
