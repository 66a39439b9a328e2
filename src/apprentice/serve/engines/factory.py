"""Start of the engine that decodes a model. An engine's own packages are imported only when it is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apprentice.model_pool.device import reserved_device
from apprentice.model_pool.engine_choice import EngineName
from apprentice.recipe import Serving
from apprentice.serve.engines.base import Engine


def start_engine(
    name: EngineName,
    folder: Path,
    serving: Serving,
    *,
    dtype: str,
    threads: int,
    trust: bool,
    with_adapters: bool,
    engines: int = 1,
    on_gpu: bool = False,
) -> Engine:
    """Starts the engine `name` over the model in `folder`. Call it in the event loop that will use the engine.

    `engines` is how many engines share the `threads` and the KV memory in equal parts. `with_adapters` makes vLLM reserve room for
    `serving.max_adapters` adapters. `on_gpu` says whether this process has GPUs. Raises `ModelError` where the engine does not
    start, `ResourcesError` where PyTorch does not see the GPUs.
    """
    settings: dict[str, Any] = {
        "device": reserved_device(on_gpu),
        "dtype": dtype,
        "max_running": serving.max_running,
        "max_queued": serving.max_queued_requests,
        "context": serving.context,
        "threads": max(1, threads // engines),
        "kv_bytes": serving.kv_bytes and serving.kv_bytes // engines,
        "trust": trust,
    }
    if name == "vllm":
        from apprentice.serve.engines.vllm import VllmEngine

        adapters = serving.max_adapters if with_adapters else 0
        return VllmEngine(folder, **settings, adapters=adapters, tensor_parallel=serving.tensor_parallel, engines=engines)
    from apprentice.serve.engines.transformers import TransformersEngine

    return TransformersEngine(folder, **settings)
