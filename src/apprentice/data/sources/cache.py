"""The cache of converted files beside the runs: when what lies in it stays, and when it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apprentice.recipe import Recipe
from apprentice.storage import Folder


@contextmanager
def cache_cleared(recipe: Recipe, *, keep: bool = False) -> Iterator[None]:
    """Removes, at the end, the cache of converted files and the storage around it if they were not there before.

    With `keep` they stay where all went well: what comes next reads what was converted.
    """
    storage = Folder.at(recipe.storage)
    cache = storage / "cache"
    made = [folder for folder in (cache, storage) if not folder.exists()]
    try:
        yield
        made = [] if keep else made
    finally:
        for folder in made:
            if folder == cache or (folder.exists() and not folder.children()):
                folder.delete()
