"""What went wrong inside a worker, out of the layers that Ray wraps around it. Knows nothing of Ray's classes."""

from __future__ import annotations

import re

from apprentice import errors
from apprentice.errors import ApprenticeError, causes


def lost_peer(error: BaseException) -> bool:
    """True for what a worker sees when another one is gone: an error of the connection between them."""
    words = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def mendable(error: BaseException) -> ApprenticeError | None:
    """The error of ours that `error` carries, if there is one."""
    found = [cause for cause in causes(error) if isinstance(cause, ApprenticeError)]
    # Ray may make a class that is both its own and ours; the plain one is deeper.
    plain = [cause for cause in found if type(cause).__module__ == ApprenticeError.__module__]
    return next(iter(plain or found), None) or _from_text(str(error))


def _from_text(text: str) -> ApprenticeError | None:
    """Ray Data brings only the traceback's text of what was raised in one of its actors; ours is one line of it."""
    for name, message in re.findall(rf"{re.escape(ApprenticeError.__module__)}\.(\w+): (.+)", text):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, ApprenticeError) and kind is not errors.RowError:
            return kind(message.strip())
    return None
