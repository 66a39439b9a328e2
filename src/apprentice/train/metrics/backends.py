"""Metrics backends: Ray's Prometheus gauges, and MLflow and Weights & Biases where the recipe names them (each a pip extra).

Each runs in a thread of its own (writer.py), so that training waits for none.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from apprentice.errors import RecipeError
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.run.identity import flatten
from apprentice.train.metrics.writer import BackendWriter, MetricsBackend

PROJECT = "apprentice"


class RayMetrics:
    """Ray gauges `ray_apprentice_train_loss` and so on, tagged with the run's name, beside Ray's own in Prometheus."""

    def __init__(self, run: Run) -> None:
        self._tags = {"run": run.name}
        self._gauges: dict[str, Any] = {}

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Sets the gauges, that of `train/step` among them."""
        from ray.util.metrics import Gauge

        for name, value in {**values, "train/step": float(step)}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(gauge_name(name), description=f"Of a run: {name}.", tag_keys=("run",))
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        """Does nothing: Ray drops the gauges when the process ends."""


class MLflow:
    """An MLflow run in the experiment `apprentice` (or MLFLOW_EXPERIMENT_NAME) at MLFLOW_TRACKING_URI.

    A resumed run continues its MLflow run.
    """

    def __init__(self, run: Run, recipe: Recipe) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known_experiment = self._client.get_experiment_by_name(name)
        experiment = known_experiment.experiment_id if known_experiment is not None else self._client.create_experiment(name)
        key = key_of(run)
        earlier_runs = self._client.search_runs([experiment], f"tags.apprentice = '{key}'", max_results=1)
        if earlier_runs:
            self._id = earlier_runs[0].info.run_id
            return
        self._id = self._client.create_run(experiment, run_name=run.name, tags={"apprentice": key}).info.run_id
        params = [
            Param(name, str(value)[:500]) for name, value in flatten(recipe.model_dump(mode="json", exclude_defaults=True)).items()
        ]
        for first in range(0, len(params), 100):  # the most that one call takes
            self._client.log_batch(self._id, params=params[first : first + 100])

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Logs the figures as metrics at `step`."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id)


class WeightsAndBiases:
    """A W&B run in the project `apprentice` (or WANDB_PROJECT). A resumed run continues its W&B run."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=key_of(run),
            name=run.name,
            resume="allow",
            config=flatten(recipe.model_dump(mode="json", exclude_defaults=True)),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Logs the figures, `step` among them."""
        self._run.log({**values, "step": step})  # as a value: W&B's own step may only grow, and a restarted run goes back

    def close(self) -> None:
        """Uploads what is left and finishes the run."""
        self._run.finish()


def check_backends_installed(recipe: Recipe) -> None:
    """Raises `RecipeError` for a service whose package is not installed."""
    for name in recipe.training.tracking:
        if find_spec(name) is None:
            raise RecipeError(
                f"training.tracking names {name}, which is not installed here; `pip install 'apprentice[{name}]'`, or leave it out."
            )


def open_backends(recipe: Recipe, run: Run) -> list[BackendWriter]:
    """Starts the feed of Ray's metrics, and of each service that the recipe names. Raises as `check_backends_installed` does."""
    check_backends_installed(recipe)
    factories: dict[str, Callable[[], MetricsBackend]] = {
        "mlflow": lambda: MLflow(run, recipe),
        "wandb": lambda: WeightsAndBiases(run, recipe),
    }
    return [
        BackendWriter("Ray's metrics", lambda: RayMetrics(run)),
        *(BackendWriter(name, factories[name]) for name in recipe.training.tracking),
    ]


def gauge_name(name: str) -> str:
    """A Prometheus name: `train/loss` gives `apprentice_train_loss`."""
    return re.sub(r"\W", "_", f"apprentice_{name}")


def key_of(run: Run) -> str:
    """Id of a run for the services, 16 hex digits made from its folder, so that a resumed run keeps it."""
    return hashlib.sha256(str(run.folder).encode()).hexdigest()[:16]
