"""The endpoint as a Ray Serve application: checks before the start, then start, readiness and stop.

The routes and the engines are one deployment, so a token goes from the model to the socket through one hop, Serve's proxy, and the
replica that decodes a request notices when its client leaves. Each replica decodes `max_running` requests at once and lets
`max_queued_requests` wait; further requests get status 429.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import ResourcesError, ServingError
from apprentice.model_pool.actors import NO_GPUS, has_gpus, largest_gpu_bytes
from apprentice.model_pool.engine_choice import check_engine, choose_engine
from apprentice.model_pool.host_memory import GIB, memory_to_reserve
from apprentice.model_pool.model import weight_bytes
from apprentice.pretrained.architecture import check_generates_text
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.trust import check_model_folder
from apprentice.ray_cluster.autoscaler import has_autoscaler, request_nodes
from apprentice.ray_cluster.nodes import node_resources
from apprentice.recipe import Replicas, Serving
from apprentice.run.contract import PromptContract, read_contract
from apprentice.serve.api.limits.api_keys import ApiKeys, check_guarded, keys_file_of_environment
from apprentice.serve.api.limits.shared_rate_limits import RateLimiterDeployment
from apprentice.serve.compat import serve_is_running, shut_down_serve
from apprentice.serve.generation.adapters import list_adapters
from apprentice.serve.placement import Placement, place_replica
from apprentice.serve.replica import ModelSpec, Replica, concurrent_requests
from apprentice.storage import Folder
from apprentice.tasks.registry import find_tasks
from apprentice.tasks.schema import Task

APP_NAME = "apprentice"
_OTHER_REQUESTS = 10_000  # requests besides those that run or wait: health, /stats, the pages, and those that are refused
_RESOURCES_TIMEOUT_S = 30.0
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


def _say_nothing(_: str) -> None:
    """Reports nothing; the default of `start`."""


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint; `url` has no slash at its end. As a context manager it stops at the end, as `stop()` does."""

    url: str
    model_name: str
    _stops: list[bool] = field(default_factory=list, repr=False)

    def stop(self) -> None:
        """Stops replicas and proxy and frees the port. A second call does nothing."""
        if not self._stops:
            self._stops.append(True)
            with _quiet():
                shut_down_serve()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def check(
    folder: Path,
    serving: Serving,
    contract: PromptContract | None = None,
    *,
    insecure: bool = False,
    beside: Sequence[ModelSpec] = (),
    trust: bool = False,
    name: str = "",
) -> None:
    """Checks everything that can be known before anything starts. Needs no Ray.

    Raises `ContractError` (no prompt contract, or one that cannot be reproduced), `ModelError` (a folder that must be trusted and
    is not, or a reward model), `ServingError` (host, keys, port, names, engine) or `StorageError` (adapters that cannot be listed).
    `name` is the first model's. All weights are read, and compared with their prompt contracts.
    """
    check_guarded(serving.host, insecure=insecure)
    _check_models([ModelSpec(name, folder, contract, trust), *beside], serving)
    if serving.port:
        _free_port(serving.host, serving.port)


def _check_models(models: Sequence[ModelSpec], serving: Serving) -> None:
    names = [model.name for model in models]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ServingError(f"serving.beside: two models are called {doubles[0]!r}; requests could not tell them apart.")
    for model in models:
        check_model_folder(model.folder, trust=model.trust)
        check_generates_text(model.folder)
        check_engine(serving.engine, model.folder, serving.tensor_parallel)
        layout_beside(model.folder, model.contract)
    if serving.adapters is not None:
        list_adapters(Folder.at(serving.adapters))


def start(
    folder: Path,
    serving: Serving,
    *,
    model_name: str,
    contract: PromptContract | None = None,
    dtype: str = "auto",
    cpus: int | None = None,
    timeout_s: float = 600.0,
    insecure: bool = False,
    tasks: Sequence[Task] = (),
    beside: Sequence[ModelSpec] = (),
    trust: bool = False,
    is_checked: bool = False,
    gpus: float = 0.0,
    tell: Callable[[str], None] = _say_nothing,
) -> Endpoint:
    """Serves the model in `folder` on the Ray that the caller is connected to, and returns once the endpoint answers.

    `beside` are further models, loaded by the same replicas. `tasks` are added to the library's tasks at `/v1/tasks`. Port 0 takes
    a free one. `insecure` allows an address other than loopback without keys. Each replica reserves GPUs if a node has one,
    memory, and CPUs, as `place_replica` says. It decodes with `serving.threads` threads; if unset, with `cpus`; then with
    OMP_NUM_THREADS; then with all CPUs that it reserves. `is_checked` says that `check` was just called, which reads all weights.
    `gpus` are those that the recipe asks for: an autoscaler is asked for them, and where there are none, `tell` is called with a
    sentence that says so, as it is with the engine that is taken, and the reason.

    Raises what `check` raises before anything starts; `ResourcesError` where the cluster has too few free CPUs (or GPUs), or
    a model fits no GPU or node; `ServingError` where it serves something already, or the endpoint does not answer within
    `timeout_s` seconds. Nothing is left running after an error.
    """
    models = [ModelSpec(model_name, folder, contract, trust), *beside]
    if not is_checked:
        check(folder, serving, contract, insecure=insecure, beside=beside, trust=trust, name=model_name)
    if serve_is_running():
        raise ServingError("this Ray cluster serves something already; stop that endpoint first, or use another cluster.")
    port = serving.port or _free_port(serving.host, 0)
    serving = serving.model_copy(update={"threads": serving.threads or cpus or _threads_of_environment()})
    placement = _place_on_cluster(models, serving, dtype, cpus, gpus, tell)
    _wait_for_resources(placement, serving.replicas.min, min(timeout_s, _RESOURCES_TIMEOUT_S))
    endpoint = Endpoint(f"http://{_host_in_url(serving.host)}:{port}", model_name)
    try:
        with _quiet():
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=serving.host, port=port), logging_config=_LOGGING)
            application = _application(models, serving, dtype, placement, tasks, insecure=insecure)
            serve.run_many(
                [serve.RunTarget(application, name=APP_NAME, logging_config=_LOGGING)], wait_for_applications_running=False
            )
        _wait_until_running(timeout_s)
    except BaseException:
        endpoint.stop()
        raise
    return endpoint


class AppArguments(BaseModel):
    """The `args` of an application in a Serve config file; host and port are that file's `http_options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(description="Model folder that every node reaches, or its URI: a run's `model/`.")
    name: str = Field("", description="The name clients use; empty: the run's or the folder's.")
    contract: str = Field("", description="Folder whose apprentice.json holds for a bare model.")
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    replicas: Replicas = Replicas()
    max_running: int = Field(32, ge=1)
    max_queued_requests: int = Field(64, ge=1)
    context: int = Field(2048, ge=1)
    threads: int | None = Field(None, ge=1, description="CPU threads that each replica decodes with; left out: as many as `cpus`.")
    kv_memory_gb: float | None = Field(None, gt=0.0, description="For keys and values of one replica, in 10**9 bytes.")
    adapters: str | None = Field(None, description="Folder or URI of LoRA adapters of the model, on every node.")
    max_adapters: int = Field(8, ge=1)
    beside: tuple[str, ...] = Field((), description="Folders, URIs or hub ids of further models at the same endpoint.")
    request_timeout_s: float = Field(600.0, gt=0.0)
    max_body_bytes: int = Field(4_000_000, ge=1)
    drain_timeout_s: float = Field(60.0, ge=0.0)
    tasks: tuple[str, ...] = Field((), description="Task files, besides the library's tasks, that can be asked by their fields.")
    keys_file: str = Field("", description="The keys file on every node; empty: the one that APPRENTICE_API_KEYS_FILE names.")
    insecure: bool = Field(False, description="Whoever reaches the proxies' address may ask, though there are no keys.")
    cpus: float = Field(1.0, gt=0.0, description="CPUs that each replica reserves, and decodes with.")
    gpus: float = Field(0.0, ge=0.0, description="GPUs that each replica reserves, all on one node.")
    memory_gb: float = Field(0.0, ge=0.0, description="Host memory that each replica reserves, in 10**9 bytes; 0: none.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that vLLM splits each model over: as many as `gpus`.")


def application(args: dict[str, Any]) -> serve.Application:
    """Builds the Serve application of `serve/app.py` from the `args` of a config file.

    Raises `ServingError` for wrong arguments or keys, `ModelError` for a place without a model, `ContractError` as `check` does,
    `TaskError` for a task file.
    """
    try:
        arguments = AppArguments.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        raise ServingError(f"args of the Serve application: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    contract = read_contract(Path(arguments.contract).expanduser().absolute()) if arguments.contract else None
    models = [_model_spec(arguments.model, arguments.name, contract)]
    models += [_model_spec(place, "", contract or read_contract(models[0].folder)) for place in arguments.beside]
    serving = Serving.model_validate(arguments.model_dump(include=set(Serving.model_fields)))
    _check_models(models, serving)
    placement = _placement_of(arguments, models, serving)
    if 0 < arguments.gpus < 1 and serving.engine == "auto":
        # Others have the rest of that GPU, and vLLM takes nearly all of its memory.
        serving = serving.model_copy(update={"engine": "transformers"})
    keys_file = Path(arguments.keys_file).expanduser().absolute() if arguments.keys_file else None
    if keys_file is not None:
        ApiKeys(keys_file)  # checks the file; replicas check the host: only they know which one Serve listens on
    tasks = [task for file in arguments.tasks for task in find_tasks(file, Path.cwd())]
    return _application(models, serving, arguments.dtype, placement, tasks, keys_file, insecure=arguments.insecure)


def _placement_of(arguments: AppArguments, models: Sequence[ModelSpec], serving: Serving) -> Placement:
    """The placement that a config file's arguments name. Raises `ServingError` for fewer GPUs than the models are split over."""
    split = serving.tensor_parallel
    if arguments.gpus and split > 1 and arguments.gpus != split:
        raise ServingError(
            f"args of the Serve application: gpus {arguments.gpus:g} are not the {split} of tensor_parallel; give both one number."
        )
    for model in models:
        choose_engine(serving, model.folder, on_gpu=arguments.gpus > 0)
    return Placement(arguments.cpus, arguments.gpus, int(arguments.memory_gb * 1e9))


def _model_spec(place: str, name: str, contract: PromptContract | None) -> ModelSpec:
    folder = local_folder(place)
    layout_beside(folder, contract)
    contract_of_folder = read_contract(folder)
    return ModelSpec(name or (contract_of_folder.run if contract_of_folder else "") or Path(place).name, folder, contract)


def _application(
    models: Sequence[ModelSpec],
    serving: Serving,
    dtype: str,
    placement: Placement,
    tasks: Sequence[Task],
    keys_file: Path | None = None,
    *,
    insecure: bool = False,
) -> serve.Application:
    least, most = serving.replicas.min, max(serving.replicas.min, serving.replicas.max)
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        # Less than a replica decodes at once, so that another one starts before requests wait long.
        running = concurrent_requests(models[0].folder, serving, dtype, on_gpu=placement.gpus > 0, engines=len(models))
        ongoing = max(1, running * 3 // 4)
        target = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": ongoing}
        scaling = {"autoscaling_config": target}
    deployment = serve.deployment(
        name="apprentice",
        ray_actor_options=placement.actor_options,
        **placement.group_options,
        # The replica itself answers requests beyond its queue, with 429, so Serve must let them in.
        max_ongoing_requests=serving.max_running + serving.max_queued_requests + _OTHER_REQUESTS,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=serving.drain_timeout_s,
        **scaling,
    )(Replica)
    keys_file = keys_file or keys_file_of_environment()
    shared = keys_file is not None and most > 1
    limits = serve.deployment(name="limits", ray_actor_options={"num_cpus": 0})(RateLimiterDeployment).bind() if shared else None
    threads = serving.threads or max(1, int(placement.cpus))
    return deployment.bind(models, serving, dtype, threads, keys_file, limits, tasks, insecure, placement.gpus > 0)


def _place_on_cluster(
    models: Sequence[ModelSpec], serving: Serving, dtype: str, cpus: int | None, gpus: float, tell: Callable[[str], None]
) -> Placement:
    """Placement of a replica on this cluster. `tell` is called with each model's engine, and where GPUs are missing."""
    split = serving.tensor_parallel
    if gpus or split > 1:
        least = serving.replicas.min
        request_nodes([{"CPU": 1.0, "GPU": float(split)}] * least, has_gpus(split, least), tell)
    nodes = node_resources()
    on_gpu = has_gpus(1)(nodes)
    if gpus and not on_gpu:
        tell(NO_GPUS.format(gpus=gpus))
    engines = []
    for model in models:
        choice = choose_engine(serving, model.folder, on_gpu=on_gpu)
        engines.append(choice.name)
        tell(f"{model.name}: {choice}")
    weights = sum(weight_bytes(model.folder, dtype, gpu=on_gpu) for model in models)
    placement = place_replica(serving, nodes, cpus, weights, engines=engines, gpu_bytes=largest_gpu_bytes() if on_gpu else None)
    reserved = {"cpus": placement.cpus, "gpus": placement.gpus}
    return replace(placement, memory=memory_to_reserve(placement.memory, nodes, "a replica", has_autoscaler, **reserved) or 0)


def _threads_of_environment() -> int | None:
    """The user's OMP_NUM_THREADS, or None; read here because Ray sets another one in its workers."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(threads) if threads.isdecimal() and int(threads) > 0 else None


def _wait_for_resources(placement: Placement, replicas: int, timeout_s: float) -> None:
    """Waits until the cluster has the replicas' CPUs, GPUs and memory free: an earlier program may still be releasing its own.

    Raises `ResourcesError` after `timeout_s` seconds.
    """
    needed = {"GPUs" if placement.gpus else "CPUs": (placement.gpus or placement.cpus) * replicas}
    needed["GiB of memory"] = placement.memory * replicas / GIB
    deadline = time.monotonic() + timeout_s
    while True:
        resources = ray.available_resources()
        free = {"CPUs": resources.get("CPU", 0.0), "GPUs": resources.get("GPU", 0.0)}
        free["GiB of memory"] = resources.get("memory", 0.0) / GIB
        few = next((kind for kind, amount in needed.items() if free[kind] < amount), None)
        if few is None:
            return
        if time.monotonic() > deadline:
            raise ResourcesError(
                f"{replicas} replica(s) need {needed[few]:.3g} {few} and the cluster has {free[few]:.3g} free; end what runs there,"
                " or lower serving.replicas."
            )
        time.sleep(0.2)


def _wait_until_running(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while (state := serve.status().applications[APP_NAME]).status is not ApplicationStatus.RUNNING:
        if state.status is ApplicationStatus.DEPLOY_FAILED:
            raise ServingError(f"the engine does not start: {_reason(state)}")
        if time.monotonic() > deadline:
            raise ServingError(f"the endpoint was not ready after {timeout_s:g} s: {_reason(state)}")
        time.sleep(0.1)


def _reason(state: Any) -> str:
    """The last error, or else the last line, in what Serve reports about an application."""
    messages: list[str] = [deployment.message for deployment in state.deployments.values()] + [state.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["no reason was given"])[-1].rstrip(".") + "."


def _host_in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _free_port(host: str, port: int) -> int:
    """Returns `port` if it is free on `host`, or a free port for 0. Raises `ServingError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that an earlier endpoint's connections in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another with serving.port, or 0 for any free one."
            ) from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides Ray Serve's log messages below warnings on the driver."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
