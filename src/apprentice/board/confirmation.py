"""Confirmation: a request that changes something is answered with a sentence on what would happen, and done once that is confirmed.

    POST /api/runs/flan/archive                        → 428 {"confirm": {"sentence": "…", "token": "…"}}
    POST /api/runs/flan/archive   X-Confirm: <token>   → done

The token is the sentence's hash, so that a yes to one change is no yes to another, nor to the same one under changed circumstances.
"""

from __future__ import annotations

import hashlib

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

HEADER = "X-Confirm"


class ConfirmationError(Exception):
    """A change was not yet confirmed; `sentence` names what would happen."""

    def __init__(self, sentence: str, token: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.token = token


def confirm(request: Request, sentence: str) -> None:
    """Returns if the request confirms `sentence`, which names what happens; raises `ConfirmationError` (status 428) otherwise."""
    token = hashlib.sha256(f"{request.method} {request.url.path} {sentence}".encode()).hexdigest()[:32]
    if request.headers.get(HEADER) != token:
        raise ConfirmationError(sentence, token)


def add_confirmation(app: FastAPI) -> None:
    """Lets `app` answer unconfirmed changes with status 428."""

    @app.exception_handler(ConfirmationError)
    async def ask(_: Request, error: ConfirmationError) -> JSONResponse:
        return JSONResponse({"confirm": {"sentence": error.sentence, "token": error.token}}, 428)
