"""Deployment of a trained model as a Ray Serve application on the cluster, beside the applications already served there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from apprentice.errors import RunError, ServingError
from apprentice.ray_cluster.compat import make_serve_client
from apprentice.recipe import Recipe
from apprentice.run.folder import find_run

POLL_S = 1.0
_APP = "apprentice.serve.app:app"
# Keys of the recipe's `serving` section that are passed on only where they differ from their defaults.
_DEPLOYED = {
    "engine",
    "threads",
    "tensor_parallel",
    "kv_memory_gb",
    "adapters",
    "max_adapters",
    "request_timeout_s",
    "max_body_bytes",
    "drain_timeout_s",
}


class Deployed(NamedTuple):
    """A running Serve application: its name, and the port and path under which every node answers."""

    name: str
    port: int
    path: str


def deploy_run(run: str, recipe: Recipe, *, timeout_s: float = 600.0) -> Deployed:
    """Deploys the model of the run folder `run` on the Ray cluster that this process is connected to.

    The application has the recipe's name. One that has the name already is replaced, replica by replica; other applications
    stay as they are. Raises `ServingError` if Ray has no dashboard, or the application does not run within `timeout_s`
    seconds.
    """
    import ray

    url = ray.init(ignore_reinit_error=True).dashboard_url
    if not url:
        raise ServingError("this Ray has no dashboard, through which the endpoint is deployed; start the head with one.")
    return deploy(make_serve_client(f"http://{url}"), serve_config(f"{run}/model", recipe), timeout_s=timeout_s)


def deploy(client: Any, config: dict[str, Any], *, timeout_s: float) -> Deployed:
    """Deploys the one application of `config` and polls until it runs.

    `client` is Ray's `ServeSubmissionClient`. Raises `ServingError` if the deployment fails or takes more than `timeout_s`
    seconds.
    """
    [application] = config["applications"]
    name, deadline, message = application["name"], time.monotonic() + timeout_s, ""
    deployed: dict[str, Any] | None = None
    while True:
        details = client.get_serve_details()
        application_details = details["applications"].get(name, {})
        # Serve replaces its whole list of applications: another client that deployed at the same time may have dropped ours.
        if deployed is None or not application_details:
            deployed = beside_others(config, details)
            client.deploy_applications(deployed)
            continue
        message = str(application_details.get("message", "")).strip()
        if application_details.get("status") == "RUNNING":
            port = (details.get("http_options") or config["http_options"])["port"]  # the port of a Serve that ran already stays
            return Deployed(name, port, application_details.get("route_prefix") or deployed["applications"][-1]["route_prefix"])
        if application_details.get("status") == "DEPLOY_FAILED" or time.monotonic() > deadline:
            lines = message.splitlines()
            raise ServingError(f"the endpoint does not come up: {lines[-1] if lines else 'no reason was given'}")
        time.sleep(POLL_S)


def beside_others(config: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """`config` plus the applications that Serve runs already, unchanged, because a deployment replaces Serve's whole list.

    `there` is the result of Ray's `get_serve_details`. Ours comes last, under the route `/`, or under `/<name>` if another
    application has `/`. An application that an earlier version of apprentice deployed for this recipe, under the name
    `apprentice`, is left out and so replaced.
    """
    [application] = config["applications"]
    name = application["name"]
    others = [
        application_details["deployed_app_config"]
        for other, application_details in details["applications"].items()
        if other != name
        and application_details.get("deployed_app_config")
        and not _is_earlier(application_details["deployed_app_config"], application)
    ]
    taken = {
        application_details.get("route_prefix") for other, application_details in details["applications"].items() if other != name
    }
    taken -= {
        application_details.get("route_prefix")
        for application_details in details["applications"].values()
        if application_details.get("deployed_app_config") and _is_earlier(application_details["deployed_app_config"], application)
    }
    ours = dict(application)
    if ours["route_prefix"] in taken:
        ours["route_prefix"] = f"/{name}"
    whole = dict(config)
    if others:  # a logging configuration for all applications would change theirs
        ours["logging_config"] = whole.pop("logging_config")
    return whole | {"applications": [*others, ours]}


def _is_earlier(deployed: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether an application was deployed for this recipe by an earlier version, which named all applications `apprentice`."""
    named = (deployed.get("args") or {}).get("name")
    return deployed["name"] == "apprentice" and deployed.get("import_path") == _APP and named == ours["args"]["name"]


def serve_config(model: str, recipe: Recipe) -> dict[str, Any]:
    """The Serve configuration of the model folder `model`, in the form of `serve/config.yaml`.

    It holds the recipe's serving keys, a GPU (or as many as the model is split over) for each replica where training asks for GPUs,
    and the path of the keys file that guards the endpoint. Raises `ServingError` for a host
    that is reachable from outside without keys (every node would answer anybody), and `RunError` for a run in `serving.beside`
    without a trained model.
    """
    from apprentice.serve.api.limits.api_keys import check_guarded

    serving = recipe.serving
    keys_file = check_guarded(serving.host)
    beside = [_place(name, recipe) for name in serving.beside]
    # A named vLLM may split a model over processes on CPUs; else only GPUs can.
    on_gpu = recipe.training.resources.gpus > 0 or (serving.tensor_parallel > 1 and serving.engine == "auto")
    arguments = {
        "model": model,
        "name": recipe.name,
        "replicas": serving.replicas.model_dump(),
        "max_running": serving.max_running,
        "max_queued_requests": serving.max_queued_requests,
        "context": serving.context,
        **serving.model_dump(include=_DEPLOYED, exclude_defaults=True),
        **({"gpus": serving.tensor_parallel} if on_gpu else {}),
        **({"beside": beside} if beside else {}),
    }
    if keys_file is not None:
        arguments["keys_file"] = str(keys_file)
    application = {"name": recipe.name, "route_prefix": "/", "import_path": _APP, "args": arguments}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": serving.host, "port": serving.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [application],
    }


def _place(name: str, recipe: Recipe) -> str:
    """Path of a model in `serving.beside`: the model folder of a run in the same storage, else the name itself."""
    run = find_run(name, recipe.storage)
    if run is None:
        return name
    if not run.is_trained:
        raise RunError(f"run {run.name!r}, which serving.beside names, has no trained model yet; train it first.")
    return str(run.model)
