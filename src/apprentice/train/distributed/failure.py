"""Failures of workers: finds the error that matters inside the exceptions that Ray wraps around it."""

from __future__ import annotations

import re

from apprentice import errors
from apprentice.errors import ApprenticeError, all_causes
from apprentice.train.worker_config import MicroBatchTooLargeError


def is_lost_connection(error: BaseException) -> bool:
    """True for a connection error between workers (gloo, NCCL): what a worker sees when another one is gone."""
    words = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_memory_shortage(error: BaseException) -> bool:
    """True where a worker asked for smaller micro-batches: training starts again with them, and there are only so many halves."""
    return any(isinstance(cause, MicroBatchTooLargeError) for cause in all_causes(error))


def find_apprentice_error(error: BaseException) -> ApprenticeError | None:
    """The `ApprenticeError` that `error` is, was caused by, or quotes in its text; None if there is none."""
    ours = [cause for cause in all_causes(error) if isinstance(cause, ApprenticeError)]
    # Ray may make a class that inherits from its own and ours; the plain error is deeper.
    plain = [cause for cause in ours if type(cause).__module__ == ApprenticeError.__module__]
    return next(iter(plain or ours), None) or _from_text(str(error))


def _from_text(text: str) -> ApprenticeError | None:
    """An `ApprenticeError` from the text of a traceback, which is all that Ray Data keeps of an error in one of its actors."""
    for name, message in re.findall(rf"{re.escape(ApprenticeError.__module__)}\.(\w+): (.+)", text):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, ApprenticeError) and kind is not errors.RowError:
            return kind(message.strip())
    return None
