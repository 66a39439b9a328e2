"""Replica of the endpoint: a process with an engine for each served model, and the HTTP routes over them.

Runs inside Ray Serve. Each engine runs beside the event loop, in a thread or in processes of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray import serve

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.model_pool.engine_choice import choose_engine
from apprentice.pretrained.architecture import family_of, kv_values_per_token, model_config
from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.process_priority import limit_thread_spinning, raise_priority
from apprentice.recipe import Serving
from apprentice.run.contract import PromptContract, read_contract, weights_sha256
from apprentice.serve.api.application import build_app
from apprentice.serve.api.limits.api_keys import ApiKeys, check_guarded
from apprentice.serve.api.limits.rate_limiter import LocalRateLimits
from apprentice.serve.api.limits.shared_rate_limits import SharedRateLimits
from apprentice.serve.compat import listen_on_loopback, proxies_host
from apprentice.serve.engines.factory import start_engine
from apprentice.serve.generation.adapters import AdapterCache
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.storage import Folder
from apprentice.tasks.registry import library, load_task
from apprentice.tasks.schema import Task

log = logging.getLogger("apprentice.requests")


class ModelSpec(NamedTuple):
    """A model to serve as `name`; `contract` is used for a folder without a prompt contract of its own.

    `trust` allows the folder to bring pickled weights or code.
    """

    name: str
    folder: Path
    contract: PromptContract | None = None
    trust: bool = False


@serve.ingress()
class Replica:
    """Ray Serve's deployment class: loads `models` and answers requests for them.

    The first model takes the adapters of `serving.adapters`. `threads` CPU threads are shared by all engines. `limits` is a handle
    of the rate limiter that all replicas share (None: this replica counts itself). `on_gpu` says whether it has reserved GPUs.
    """

    def __init__(
        self,
        models: Sequence[ModelSpec],
        serving: Serving,
        dtype: str,
        threads: int,
        keys_file: Path | None,
        limits: Any,
        tasks: Sequence[Task],
        insecure: bool = False,
        on_gpu: bool = False,
    ) -> None:
        _log_requests()
        raise_priority()
        listen_on_loopback()
        check_guarded(proxies_host(), insecure=insecure, file=keys_file)
        self._serving = serving
        self._tasks = {task.name: task for task in (*map(load_task, library().values()), *tasks)}  # own ones replace the library's
        self._keys = ApiKeys(keys_file) if keys_file is not None else None
        self._limits = SharedRateLimits(limits) if limits is not None else LocalRateLimits()
        # A folder in another node's model cache is fetched into this node's.
        folders = [
            model.folder if model.folder.is_dir() and not model.trust else local_folder(str(model.folder), trust=model.trust)
            for model in models
        ]
        served = start_models(models, folders, serving, dtype, threads, on_gpu=on_gpu)
        adapters = None
        if serving.adapters is not None:
            contract = read_contract(folders[0])  # its hash was compared with the weights just now
            base_sha256 = contract.weights_sha256 if contract is not None else weights_sha256(folders[0])
            adapters = AdapterCache(
                Folder.at(serving.adapters),
                served[0],
                base_sha256,
                most=serving.max_adapters,
                most_waiting=serving.max_queued_requests,
            )
        self._catalogue = Catalogue(served, adapters)

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(
            self._catalogue,
            serving=self._serving,
            tasks=list(self._tasks.values()),
            keys=self._keys,
            limits=self._limits,
            replica=serve.get_replica_context().replica_id.unique_id,
            behind_proxy=True,
        )

    def check_health(self) -> None:
        """Raises `EngineFailed` if an engine has stopped. Ray Serve calls this, and then replaces the replica."""
        for engine in self._catalogue.engines.values():
            engine.check()


def start_models(
    specs: Sequence[ModelSpec], folders: Sequence[Path], serving: Serving, dtype: str, threads: int, *, on_gpu: bool = False
) -> list[ServedModel]:
    """Starts an engine for each model and returns the models; engines share threads and KV memory in equal parts."""
    limit_thread_spinning(threads)
    models: list[ServedModel] = []
    for spec, folder in zip(specs, folders, strict=True):
        layout = layout_beside(folder, spec.contract)
        choice = choose_engine(serving, folder, on_gpu=on_gpu)
        log.info(json.dumps({"model": spec.name, "engine": choice.name, "reason": choice.reason}))
        engine = start_engine(
            choice.name,
            folder,
            serving,
            dtype=dtype,
            threads=threads,
            trust=spec.trust,
            with_adapters=serving.adapters is not None and not models,
            engines=len(specs),
            on_gpu=on_gpu,
        )
        contract = read_contract(folder) or (spec.contract and spec.contract.for_other_weights())
        models.append(ServedModel(spec.name, engine, layout, contract))
    return models


def concurrent_requests(folder: Path, serving: Serving, dtype: str, *, on_gpu: bool, engines: int = 1) -> int:
    """Number of requests, each half a context long, that one of a replica's `engines` decodes together.

    `max_running`, or fewer where the engine's part of the KV memory does not hold that many.
    """
    numbers = kv_values_per_token(model_config(folder))
    if serving.kv_bytes is None or numbers is None:
        return serving.max_running
    kv_bytes = serving.kv_bytes // engines
    is_vllm = choose_engine(serving, folder, on_gpu=on_gpu).name == "vllm"
    is_halved = dtype != "float32" and (on_gpu or is_vllm)  # our own engine's KV cache is float32 on CPUs
    sides = 2 if family_of(folder) == "seq2seq" else 1  # an encoder-decoder keeps keys and values of its prompt, and of its reply
    bytes_per_token = sides * numbers * (2 if is_halved else 4)
    return max(1, min(serving.max_running, 2 * kv_bytes // (bytes_per_token * serving.context)))


def _log_requests() -> None:
    """Sets up the request log on standard error: a JSON line for each engine, and for each request, without prompts or replies."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False
