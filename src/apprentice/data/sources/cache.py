"""Lifetime of the cache of converted files (`<storage>/cache`): removed after commands that created it and do not need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apprentice.recipe import Recipe
from apprentice.storage import Folder


@contextmanager
def cache_cleared(recipe: Recipe, *, keep: bool = False) -> Iterator[None]:
    """Removes at the end the cache, and the storage folder if it is empty, provided that they did not exist before.

    With `keep` they stay if the block raised nothing, so that a later command reads the converted files.
    """
    storage = Folder.at(recipe.storage)
    cache = storage / "cache"
    new_folders = [folder for folder in (cache, storage) if not folder.exists()]
    try:
        yield
        new_folders = [] if keep else new_folders
    finally:
        for folder in new_folders:
            if folder == cache or (folder.exists() and not folder.children()):
                folder.delete()
