"""Streams of rows for a worker group, one Ray Dataset a lane, and the workers that read each of them.

    newest checkpoint ─▶ position of each lane ─▶ a Dataset a lane ─▶ LaneConfig: split among the lane's readers ─▶ workers

Ray Train's controller does this anew for each worker group, in its own process. So a lane whose stream fails is started again with
its group, as all of them, where the newest checkpoint says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import ray.data
from ray.data import DataIterator, ExecutionOptions, ExecutionResources
from ray.train import DataConfig

from apprentice.data.corpus import Corpus
from apprentice.data.stream import Start, train_stream
from apprentice.ray_cluster.nodes import is_job, node_resources
from apprentice.recipe import Recipe, data_parallel_size
from apprentice.recipe.lanes import Lanes
from apprentice.run.folder import Run
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.distributed.elastic import find_leaving_nodes
from apprentice.train.lane_position import start_of_lanes

STEPS_AHEAD = 16  # steps of rows that a stream may hold ready,
LEAST_AHEAD_BYTES = 64 * 2**20  # or this much where they are smaller
LEAST_ACTORS = 4  # that make rows, of all lanes together, where there is room for them; or one for each worker


def lane_names(lanes: int) -> list[str]:
    """Names of the lanes' datasets."""
    return ["train"] if lanes == 1 else [f"train-{lane}" for lane in range(lanes)]


class LaneStreams:
    """Builds the lanes' streams for each worker group of a run.

    `corpus` is a reference to the corpus in Ray's object store. `validators` is the number of processes that validate checkpoints
    and reserve a worker's resources. Each group's number of workers comes from `mailbox`.
    """

    def __init__(self, recipe: Recipe, run: Run, mailbox: Any, corpus: ray.ObjectRef[Corpus], validators: int) -> None:
        self._recipe, self._run, self._mailbox, self._corpus = recipe, run, mailbox, corpus
        self._validators = validators
        self._submitted = is_job()  # here, because the controller's process does not know
        self._streams: list[Any] = []  # of the newest group

    def datasets(self) -> dict[str, Callable[[], Any]]:
        """Name → function that makes a lane's stream. Ray Train calls them in order for each group, before its workers run."""
        return {name: partial(self._build, lane) for lane, name in enumerate(lane_names(self._recipe.data.lanes))}

    def _build(self, lane: int) -> Any:
        if lane == 0:
            self._streams = self._begin_attempt()
        return self._streams[lane]

    def _begin_attempt(self) -> list[Any]:
        """The streams of all lanes from the newest checkpoint on."""
        checkpoint = checkpoints.find_newest(self._run.checkpoints)
        workers = ray.get(self._mailbox.begin_attempt.remote(checkpoint))
        corpus, training, lanes = ray.get(self._corpus), self._recipe.training, self._recipe.data.lanes
        places = checkpoint.state.lanes if checkpoint else start_of_lanes(lanes)
        starts = [Start(place.window, place.row) for place in places]
        if training.aim.rounds:
            from apprentice.train.on_policy.rollout_stream import stream_rounds  # imports the models that write replies

            self._mailbox.set_stream_cpus.remote(training.grpo.actors * training.resources.cpus)
            return [stream_rounds(corpus, self._run, start) for start in starts]
        # As many actors as there is room for now, since a node may have been lost after the run began.
        nodes = node_resources(job=self._submitted, without=find_leaving_nodes(ray.nodes()))
        spare = sum(node.get("CPU", 0.0) for node in nodes) - (workers + self._validators) * training.resources.cpus
        actors = actors_of_lane(lanes, workers, int(spare))
        self._mailbox.set_stream_cpus.remote(lanes * actors)
        return [train_stream(corpus, start, None, actors, self._corpus) for start in starts]


def actors_of_lane(lanes: int, workers: int, spare_cpus: int) -> int:
    """Number of actors that make the rows of one lane, if workers leave `spare_cpus` CPUs, one of them for Ray Data's tasks."""
    return max(1, min(-(-max(LEAST_ACTORS, workers) // lanes), (spare_cpus - 1) // lanes))


def stream_options(recipe: Recipe, row_bytes: int) -> ExecutionOptions:
    """Options of a lane's stream: rows in order, and a bounded number ready ahead of training, whose cores the actors may share."""
    ahead = max(LEAST_AHEAD_BYTES, STEPS_AHEAD * recipe.lanes.rows * row_bytes)
    return ExecutionOptions(preserve_order=True, resource_limits=ExecutionResources.for_limits(object_store_memory=ahead))


class LaneConfig(DataConfig):
    """Ray Train's division of datasets among workers: each lane's among its readers alone (see recipe/lanes.py).

    In order and without locality, so that each step is a contiguous stretch of each lane's stream, wherever workers run. Of each
    `sequence_parallel` neighbours, who share rows, only the first one may read.
    """

    def __init__(self, lanes: Lanes, options: ExecutionOptions, sequence_parallel: int = 1) -> None:
        super().__init__(execution_options=options, enable_shard_locality=False)
        self._lanes = lanes
        self._sequence_parallel = sequence_parallel

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, DataIterator]]:
        """For each worker: name → what it reads of that lane, or of a lane that it does not read, the first reader's part.

        Ray Train wants an entry for each worker, and by the first worker's it ends the streams of a group that failed.
        """
        by_worker: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            groups = data_parallel_size(world_size, self._sequence_parallel)
            readers = self._lanes.readers(lane_names(self._lanes.count).index(name), groups)
            parts = super().configure({name: dataset}, len(readers), None, None)
            for rank in range(world_size):
                group = rank // self._sequence_parallel
                by_worker[rank][name] = parts[readers.index(group) if group in readers else 0][name]
        return by_worker
