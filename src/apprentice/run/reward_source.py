"""The source of a user's own reward function, found without running any of it."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from apprentice.recipe import PYTHON


def source_sha256(function: str) -> str | None:
    """sha256 of the file of module MODULE in `python:MODULE:FUNCTION`; None for other functions, and for a module not found here.

    The module is looked for where the process that runs it looks: on Python's path, and then in the current folder.
    """
    if not function.startswith(PYTHON):
        return None
    name, _, _ = function.removeprefix(PYTHON).rpartition(":")
    path, origin = [*filter(None, sys.path), os.getcwd()], None
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:number]), path)
        if spec is None:
            return None
        path, origin = list(spec.submodule_search_locations or ()), spec.origin
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest() if origin and Path(origin).is_file() else None
