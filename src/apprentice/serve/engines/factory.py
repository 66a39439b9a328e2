"""Engines by name: checks of what each can decode, and the start of one.

An engine's own packages are imported only when it is started.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from apprentice.errors import ServingError
from apprentice.pretrained.architecture import family_of
from apprentice.recipe import Serving
from apprentice.run.identity import ADAPTER
from apprentice.serve.engines.base import Engine


def check_decodes(name: str, folder: Path) -> None:
    """Raises `ServingError` where the engine `name`, installed here or not, cannot decode the model in `folder`."""
    if name == "vllm" and family_of(folder) == "seq2seq":
        raise ServingError(
            f"serving.engine vllm decodes causal models only, and {folder} is a sequence-to-sequence model; use transformers."
        )


def check_engine(name: str, folder: Path) -> None:
    """Raises `ServingError` where the engine `name` is not installed, or cannot decode the model in `folder`."""
    check_decodes(name, folder)
    if name != "vllm":
        return
    if (folder / ADAPTER).is_dir():
        raise ServingError(
            f"{folder} has an adapter beside its weights that cannot be merged into them, and vLLM would leave it out; use"
            " serving.engine transformers."
        )
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            "serving.engine vllm needs the package vllm, which is not installed; pip install 'apprentice[vllm]', or use"
            " serving.engine transformers."
        )


def start_engine(
    folder: Path, serving: Serving, *, dtype: str, threads: int, trust: bool, with_adapters: bool, engines: int = 1
) -> Engine:
    """Starts the engine that `serving` names over the model in `folder`. Call it in the event loop that will use the engine.

    `engines` is how many engines share the `threads` and the KV memory in equal parts. `with_adapters` makes vLLM reserve room for
    `serving.max_adapters` adapters. Raises `ServingError` as `check_engine` does, `ModelError` where the engine does not start.
    """
    check_engine(serving.engine, folder)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_running": serving.max_running,
        "max_queued": serving.max_queued_requests,
        "context": serving.context,
        "threads": max(1, threads // engines),
        "kv_bytes": serving.kv_bytes and serving.kv_bytes // engines,
        "trust": trust,
    }
    if serving.engine == "vllm":
        from apprentice.serve.engines.vllm import VllmEngine

        return VllmEngine(folder, **settings, adapters=serving.max_adapters if with_adapters else 0)
    from apprentice.serve.engines.transformers import TransformersEngine

    return TransformersEngine(folder, **settings)
