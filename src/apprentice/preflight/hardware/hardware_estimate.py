"""Estimate of a recipe on hardware that is not here: memory of a GPU and of a host, time of a step and of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from apprentice.errors import RecipeError
from apprentice.models.loading import resolve_dtype
from apprentice.models.weights.safetensors_reader import PIECE_BYTES
from apprentice.preflight.hardware.devices import Hardware
from apprentice.preflight.hardware.roofline import MicroBatch, StepTime, estimate_step_time, model_flops
from apprentice.pretrained.hub import config_folder
from apprentice.recipe import Recipe, Tuning, data_parallel_size
from apprentice.recipe.lanes import Lanes
from apprentice.train.checkpoint.shard_writer import WINDOW_BYTES
from apprentice.train.engine.deepspeed_config import choose_micro_batch, rows_per_worker
from apprentice.train.engine.model_splitter import find_stage_obstacle
from apprentice.train.memory.activations import SavedTensors, measure_saved_tensors
from apprentice.train.memory.batch_size import find_largest_fitting
from apprentice.train.memory.estimate import MemoryEstimate, offloaded_bytes
from apprentice.train.memory.measure import add_to_activations
from apprentice.train.memory.model_size import ModelSize, measure_model_size

USABLE = 0.9  # of a GPU's and a host's memory; the rest is CUDA's, fragmentation, and the system's
GPU_PROCESS_BYTES = 3 * 2**30  # in the host's memory, of a worker that uses a GPU; an assumption
UNKNOWN_STEPS = 1000  # what is counted instead, where only the index can tell how long a run is


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a node's host memory for all of its workers.

    Either they load, or they train; `total` is the larger of the two. At stage 3 what a worker reads goes to its GPU in pieces;
    below it each has the whole model for a while.
    """

    loading: float
    processes: float
    offloaded: float
    checkpoint: float

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.processes + max(self.loading, self.offloaded + self.checkpoint)


@dataclass(frozen=True)
class HardwareEstimate:
    """A recipe on some hardware: what it takes, and how long. `steps` is None where only the index can tell."""

    recipe: Recipe  # with the workers and GPUs of the hardware
    hardware: Hardware
    size: ModelSize
    micro: int
    gpu: MemoryEstimate
    host: HostMemory
    step: StepTime
    steps: int | None

    @property
    def fits(self) -> bool:
        """Whether GPUs and hosts have the memory, a tenth of which is left alone."""
        return self.fits_gpu and self.fits_host

    @property
    def fits_gpu(self) -> bool:
        """Whether a GPU has the memory. False where what activations take is not known."""
        return self.gpu.activations is not None and self.gpu.total <= USABLE * self.hardware.device.memory

    @property
    def fits_host(self) -> bool:
        """Whether a node's host has the memory."""
        return self.host.total <= USABLE * self.hardware.host_memory

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second on all GPUs, in rows that are full."""
        return self.recipe.training.global_batch * self.recipe.data.packing.length / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1, of products with weights alone."""
        rows, device = self.recipe.training.global_batch, self.hardware.device
        flops = model_flops(self.size, rows, self.recipe.data.packing.length, target_length(self.recipe, self.size))
        peak = device.bfloat16_peak if self.size.dtype.itemsize == 2 else device.float32_peak
        return flops / (self.step.total * self.hardware.total_gpus * peak)

    @property
    def hours(self) -> float:
        """Hours of the run, or of `UNKNOWN_STEPS` steps."""
        return (self.steps or UNKNOWN_STEPS) * self.step.total / 3600


def place_recipe(recipe: Recipe, hardware: Hardware) -> Recipe:
    """`recipe` with one worker a GPU of `hardware`, besides the GPUs that write replies, and its model's config.json at hand.

    Raises `RecipeError` if the batch or the lanes cannot be divided among the workers, `ModelError` if there is no such model.
    """
    training = recipe.training
    workers = hardware.total_gpus - (training.grpo.actors if training.aim.rounds else 0)
    if workers < 1:
        raise RecipeError(f"grpo.actors {training.grpo.actors} take all GPUs of {hardware}; lower them, or name more GPUs.")
    resources = training.resources.model_copy(update={"gpus": 1.0})
    placed = training.model_copy(update={"workers": workers, "resources": resources})
    rows = rows_per_worker(placed, workers)
    readers = data_parallel_size(workers, training.sequence_parallel)
    if not Lanes(recipe.data.lanes, training.global_batch, readers).fit(readers):
        raise RecipeError(f"{workers} workers on {hardware} cannot read {recipe.data.lanes} lanes evenly; choose other data.lanes.")
    if isinstance(training.micro_batch, int) and rows % training.micro_batch:
        placed = placed.model_copy(update={"micro_batch": math.gcd(rows, training.micro_batch)})
    model = recipe.model.model_copy(update={"base": str(config_folder(recipe.model.base))})
    return recipe.model_copy(update={"training": placed, "model": model})


def target_length(recipe: Recipe, size: ModelSize) -> int:
    """Tokens of the decoder's side of a row; 0 for a causal model."""
    if not size.target_products.weights:
        return 0
    return recipe.data.packing.target_length or max(1, recipe.data.packing.length // 4)


class HardwareEstimator:
    """Estimates variants of one recipe on `hardware`; models and activations that variants share are counted once."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._sizes: dict[tuple[str, Tuning, str], ModelSize] = {}
        self._saved: dict[tuple[Tuning, str, int], SavedTensors | None] = {}  # by one row

    def estimate(self, recipe: Recipe) -> HardwareEstimate:
        """The estimate of `recipe`, which `place_recipe` made."""
        size = self.size(recipe)
        micro = self._micro_batch(recipe, size)
        gpu = self.worker_memory(recipe, micro)
        length, targets = recipe.data.packing.length, target_length(recipe, size)
        span = min(length, recipe.data.max_length)
        saved = self._saved_by_row(recipe)
        tensors = saved.times(micro) if saved else None
        batch = MicroBatch(micro, length, targets, span, *((tensors.saved, tensors.inputs) if tensors else (0.0, 0.0)))
        step = estimate_step_time(recipe, size, batch, self.hardware)
        return HardwareEstimate(recipe, self.hardware, size, micro, gpu, self._host(recipe, size, batch), step, _steps(recipe))

    def size(self, recipe: Recipe) -> ModelSize:
        """Size of the recipe's model with its tuning method."""
        key = (recipe.model.base, recipe.tuning, recipe.training.optimizer.name)  # which decides on the weights' format
        if key not in self._sizes:
            on = "cuda" if recipe.training.resources.gpus else "cpu"
            self._sizes[key] = measure_model_size(recipe, resolve_dtype(recipe.model.dtype, on))
        return self._sizes[key]

    def _saved_by_row(self, recipe: Recipe) -> SavedTensors | None:
        """What the forward pass of one row saves; None if not known."""
        length = recipe.data.packing.length
        key = (recipe.tuning, recipe.training.optimizer.name, length)
        if key not in self._saved:
            size = self.size(recipe)
            self._saved[key] = measure_saved_tensors(recipe, size.dtype, 1, length)
        return self._saved[key]

    def worker_memory(self, recipe: Recipe, micro: int) -> MemoryEstimate:
        """Memory of the first worker with micro-batches of `micro` rows."""
        size, workers = self.size(recipe), recipe.training.max_workers
        row = self._saved_by_row(recipe)
        saved = row.times(micro).peak_bytes(recipe.training) if row else None
        sizes = (size.parameters, size.trained, size.dtype)
        return add_to_activations(saved, recipe, *sizes, workers=workers, quantized=size.quantized)

    def _micro_batch(self, recipe: Recipe, size: ModelSize) -> int:
        """The recipe's micro-batch; for `auto` the largest that fits, where training tries it, else what training takes."""
        training, length = recipe.training, recipe.data.packing.length
        if training.micro_batch == "auto" and training.objective == "sft" and not size.target_products.weights:
            limit = USABLE * self.hardware.device.memory

            def fits(rows: int) -> bool:
                return self.worker_memory(recipe, rows).total <= limit

            return find_largest_fitting(rows_per_worker(training, training.max_workers), fits)
        return choose_micro_batch(training, workers=training.max_workers, length=length, on_gpu=True)

    def _host(self, recipe: Recipe, size: ModelSize, batch: MicroBatch) -> HostMemory:
        workers, here = recipe.training.max_workers, self.hardware.gpus
        offloaded = offloaded_bytes(recipe, size.parameters, size.trained, size.dtype, workers) * here
        if recipe.training.activation_checkpointing == "offload":
            offloaded += batch.inputs * here
        processes = float(GPU_PROCESS_BYTES * here)
        copy = 12.0 * size.trained
        checkpoint = (copy / workers + min(copy / workers, WINDOW_BYTES)) * here
        if checkpoint > (self.hardware.host_memory - processes - offloaded) / 2:
            checkpoint = 0.0  # written while training waits, without a copy
        splits = recipe.training.deepspeed.stage == 3 and not size.quantized and find_stage_obstacle(recipe.training) is None
        loading = float(here * (PIECE_BYTES if splits else size.weight_bytes * size.parameters))
        return HostMemory(loading, processes, offloaded, checkpoint)


def _steps(recipe: Recipe) -> int | None:
    """Steps of the run, with rows that are full where the recipe counts tokens; None where only the index can tell."""
    training = recipe.training
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.global_batch * recipe.data.packing.length))
    return training.steps


def parts_of(estimate: MemoryEstimate | HostMemory | StepTime) -> dict[str, float | None]:
    """The parts of an estimate by their names; those that are 0 are left out."""
    values = {part.name: getattr(estimate, part.name) for part in fields(estimate)}
    return {name: value for name, value in values.items() if value is None or value > 0}
