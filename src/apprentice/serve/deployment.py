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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import ResourcesError, ServingError
from apprentice.pretrained.architecture import check_generates_text
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.trust import check_model_folder
from apprentice.recipe import Replicas, Serving
from apprentice.run.contract import PromptContract, read_contract
from apprentice.serve.api.limits.api_keys import ApiKeys, check_guarded, keys_file_of_environment
from apprentice.serve.api.limits.shared_rate_limits import RateLimiterDeployment
from apprentice.serve.compat import serve_is_running, shut_down_serve
from apprentice.serve.engines.factory import check_engine
from apprentice.serve.generation.adapters import list_adapters
from apprentice.serve.replica import ModelSpec, Replica, concurrent_requests
from apprentice.storage import Folder
from apprentice.tasks.registry import find_tasks
from apprentice.tasks.schema import Task

APP_NAME = "apprentice"
_OTHER_REQUESTS = 10_000  # requests besides those that run or wait: health, /stats, the pages, and those that are refused
_RESOURCES_TIMEOUT_S = 30.0
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


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
) -> None:
    """Checks everything that can be known before anything starts. Needs no Ray.

    Raises `ContractError` (no prompt contract, or one that cannot be reproduced), `ModelError` (a folder that must be trusted and
    is not, or a reward model), `ServingError` (host, keys, port, names, engine) or `StorageError` (adapters that cannot be listed).
    """
    check_guarded(serving.host, insecure=insecure)
    _check_models([ModelSpec("", folder, contract, trust), *beside], serving)
    if serving.port:
        _free_port(serving.host, serving.port)


def _check_models(models: Sequence[ModelSpec], serving: Serving) -> None:
    names = [model.name for model in models]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ServingError(f"serving.beside: two models are called {doubles[0]!r}; requests could not tell them apart.")
    for model in models:
        check_model_folder(model.folder, trust=model.trust)
        check_generates_text(model.folder)
        check_engine(serving.engine, model.folder)
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
) -> Endpoint:
    """Serves the model in `folder` on the Ray that the caller is connected to, and returns once the endpoint answers.

    `beside` are further models, loaded by the same replicas. `tasks` are added to the library's tasks at `/v1/tasks`. Port 0 takes
    a free one. `insecure` allows an address other than loopback without keys. Each replica reserves a GPU if a node has one, and
    `cpus` CPUs (None: 1 beside a GPU; else the largest node's, divided by the largest number of replicas, but not more than its
    threads). It decodes with `serving.threads` threads; if unset, with `cpus`; then with OMP_NUM_THREADS; then with all CPUs that
    it reserves.

    Raises what `check` raises before anything starts; `ResourcesError` where the cluster has too few free CPUs (or GPUs);
    `ServingError` where it serves something already, or the endpoint does not answer within `timeout_s` seconds. Nothing is left
    running after an error.
    """
    models = [ModelSpec(model_name, folder, contract, trust), *beside]
    check(folder, serving, contract, insecure=insecure, beside=beside, trust=trust)
    _check_models(models, serving)
    if serve_is_running():
        raise ServingError("this Ray cluster serves something already; stop that endpoint first, or use another cluster.")
    port = serving.port or _free_port(serving.host, 0)
    serving = serving.model_copy(update={"threads": serving.threads or cpus or _threads_of_environment()})
    resources = _replica_resources(serving, cpus)
    _wait_for_resources(resources, serving.replicas.min, min(timeout_s, _RESOURCES_TIMEOUT_S))
    endpoint = Endpoint(f"http://{_host_in_url(serving.host)}:{port}", model_name)
    try:
        with _quiet():
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=serving.host, port=port), logging_config=_LOGGING)
            application = _application(models, serving, dtype, resources, tasks, insecure=insecure)
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
    gpus: float = Field(0.0, ge=0.0)


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
    resources = {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus}
    keys_file = Path(arguments.keys_file).expanduser().absolute() if arguments.keys_file else None
    if keys_file is not None:
        ApiKeys(keys_file)  # checks the file; replicas check the host: only they know which one Serve listens on
    tasks = [task for file in arguments.tasks for task in find_tasks(file, Path.cwd())]
    return _application(models, serving, arguments.dtype, resources, tasks, keys_file, insecure=arguments.insecure)


def _model_spec(place: str, name: str, contract: PromptContract | None) -> ModelSpec:
    folder = local_folder(place)
    layout_beside(folder, contract)
    contract_of_folder = read_contract(folder)
    return ModelSpec(name or (contract_of_folder.run if contract_of_folder else "") or Path(place).name, folder, contract)


def _application(
    models: Sequence[ModelSpec],
    serving: Serving,
    dtype: str,
    resources: dict[str, float],
    tasks: Sequence[Task],
    keys_file: Path | None = None,
    *,
    insecure: bool = False,
) -> serve.Application:
    least, most = serving.replicas.min, max(serving.replicas.min, serving.replicas.max)
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        # Less than a replica decodes at once, so that another one starts before requests wait long.
        on_gpu = resources.get("num_gpus", 0) > 0
        ongoing = max(1, concurrent_requests(models[0].folder, serving, dtype, on_gpu=on_gpu, engines=len(models)) * 3 // 4)
        target = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": ongoing}
        scaling = {"autoscaling_config": target}
    deployment = serve.deployment(
        name="apprentice",
        ray_actor_options=resources,
        # The replica itself answers requests beyond its queue, with 429, so Serve must let them in.
        max_ongoing_requests=serving.max_running + serving.max_queued_requests + _OTHER_REQUESTS,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=serving.drain_timeout_s,
        **scaling,
    )(Replica)
    keys_file = keys_file or keys_file_of_environment()
    shared = keys_file is not None and most > 1
    limits = serve.deployment(name="limits", ray_actor_options={"num_cpus": 0})(RateLimiterDeployment).bind() if shared else None
    threads = serving.threads or max(1, int(resources["num_cpus"]))
    return deployment.bind(models, serving, dtype, threads, keys_file, limits, tasks, insecure)


def _replica_resources(serving: Serving, cpus: int | None) -> dict[str, float]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU", 0) >= 1 for node in nodes):
        return {"num_cpus": cpus or 1, "num_gpus": 1}
    share = max(1, int(max(node.get("CPU", 0) for node in nodes) // max(serving.replicas.min, serving.replicas.max)))
    return {"num_cpus": cpus or min(share, serving.threads or share)}


def _threads_of_environment() -> int | None:
    """The user's OMP_NUM_THREADS, or None; read here because Ray sets another one in its workers."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(threads) if threads.isdecimal() and int(threads) > 0 else None


def _wait_for_resources(resources: dict[str, float], replicas: int, timeout_s: float) -> None:
    """Waits until the cluster has the replicas' CPUs (or GPUs) free: an earlier program may still be releasing its own.

    Raises `ResourcesError` after `timeout_s` seconds.
    """
    kind = "GPU" if resources.get("num_gpus") else "CPU"
    needed = resources[f"num_{kind.lower()}s"] * replicas
    deadline = time.monotonic() + timeout_s
    while (free := ray.available_resources().get(kind, 0.0)) < needed:
        if time.monotonic() > deadline:
            raise ResourcesError(
                f"{replicas} replica(s) need {needed:g} {kind}s and the cluster has {free:g} free; end what runs there,"
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
