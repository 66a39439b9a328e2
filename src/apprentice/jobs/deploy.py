"""A trained model as an application of the Ray Serve that runs on the cluster, beside whatever else is served there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from apprentice.errors import RunError, ServingError
from apprentice.recipe import Recipe
from apprentice.run.folder import find_run

POLL_S = 1.0
_APP = "apprentice.serve.app:app"
# What the recipe may say besides, if it says it.
_DEPLOYED = {
    "engine",
    "threads",
    "kv_memory_gb",
    "adapters",
    "max_adapters",
    "request_timeout_s",
    "max_body_bytes",
    "drain_timeout_s",
}


class Deployed(NamedTuple):
    """An application that answers: its name, and where on every node."""

    name: str
    port: int
    path: str


def deploy_run(run: str, recipe: Recipe, *, timeout_s: float = 600.0) -> Deployed:
    """Deploys the run's model on the Ray that this process is connected to, as an application of the recipe's name.

    Replaces what that application served before, replica by replica; other applications stay as they are. Raises `ServingError`
    where it does not come up.
    """
    import ray
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    url = ray.init(ignore_reinit_error=True).dashboard_url
    if not url:
        raise ServingError("this Ray has no dashboard, through which the endpoint is deployed; start the head with one.")
    return deploy(ServeSubmissionClient(f"http://{url}"), serve_config(f"{run}/model", recipe), timeout_s=timeout_s)


def deploy(client: Any, config: dict[str, Any], *, timeout_s: float) -> Deployed:
    """Deploys the one application of `config` through `client`, Ray's, and waits for it."""
    [application] = config["applications"]
    name, deadline, message = application["name"], time.monotonic() + timeout_s, ""
    asked: dict[str, Any] | None = None
    while True:
        there = client.get_serve_details()
        found = there["applications"].get(name, {})
        # Serve replaces the whole list: somebody who deployed at the same time may have left ours out.
        if asked is None or not found:
            asked = beside_others(config, there)
            client.deploy_applications(asked)
            continue
        message = str(found.get("message", "")).strip()
        if found.get("status") == "RUNNING":
            port = (there.get("http_options") or config["http_options"])["port"]  # Serve's own, if it ran already
            return Deployed(name, port, found.get("route_prefix") or asked["applications"][-1]["route_prefix"])
        if found.get("status") == "DEPLOY_FAILED" or time.monotonic() > deadline:
            lines = message.splitlines()
            raise ServingError(f"the endpoint does not come up: {lines[-1] if lines else 'no reason was given'}")
        time.sleep(POLL_S)


def beside_others(config: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the applications that were deployed to the Serve of which `there` are the details, exactly as they were.

    Ours is the last, under `/`, or where another application has that, under `/<name>`. An application of an earlier version, which
    had one name for all recipes, is replaced where it is this recipe's.
    """
    [application] = config["applications"]
    name = application["name"]
    others = [
        found["deployed_app_config"]
        for other, found in there["applications"].items()
        if other != name and found.get("deployed_app_config") and not _is_earlier(found["deployed_app_config"], application)
    ]
    taken = {found.get("route_prefix") for other, found in there["applications"].items() if other != name}
    taken -= {
        found.get("route_prefix")
        for found in there["applications"].values()
        if found.get("deployed_app_config") and _is_earlier(found["deployed_app_config"], application)
    }
    ours = dict(application)
    if ours["route_prefix"] in taken:
        ours["route_prefix"] = f"/{name}"
    whole = dict(config)
    if others:  # a logging configuration of all would become theirs
        ours["logging_config"] = whole.pop("logging_config")
    return whole | {"applications": [*others, ours]}


def _is_earlier(deployed: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether an application is what an earlier version deployed of this recipe."""
    named = (deployed.get("args") or {}).get("name")
    return deployed["name"] == "apprentice" and deployed.get("import_path") == _APP and named == ours["args"]["name"]


def serve_config(model: str, recipe: Recipe) -> dict[str, Any]:
    """`serve/config.yaml` for the model folder `model`, with the recipe's serving keys and the keys file that guards the endpoint.

    Raises `ServingError` for a host that others reach without keys (every node would answer everybody), and `RunError` for a run
    beside it that has no model.
    """
    from apprentice.serve.api.keys import check_guarded

    serving = recipe.serving
    keys_file = check_guarded(serving.host)
    beside = [_place(name, recipe) for name in serving.beside]
    arguments = {
        "model": model,
        "name": recipe.name,
        "replicas": serving.replicas.model_dump(),
        "max_running": serving.max_running,
        "max_queued_requests": serving.max_queued_requests,
        "context": serving.context,
        **serving.model_dump(include=_DEPLOYED, exclude_defaults=True),
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
    """Where a model lies that `serving.beside` names: of a run of the same storage, its model; of all else, the name says it."""
    run = find_run(name, recipe.storage)
    if run is None:
        return name
    if not run.is_trained:
        raise RunError(f"run {run.name!r}, which serving.beside names, has no trained model yet; train it first.")
    return str(run.model)
