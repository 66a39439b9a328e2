"""Roofline of an optimizer step: FLOPs over the GPU's peak, bytes over the bandwidth of memory, links, network and host.

Each part is divided by the share of the makers' figure that such work reaches; docs/decisions/training.md says where the shares are
from. Collectives of a micro-batch run beside its products, so the longer of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from apprentice.preflight.hardware.devices import GB, Hardware
from apprentice.recipe import Recipe, Training
from apprentice.train.engine.deepspeed_config import rows_per_worker, zero_stage
from apprentice.train.memory.estimate import NF4_BYTES
from apprentice.train.memory.model_size import ModelSize
from apprentice.train.optimizer import moment_bytes

# Shares of the makers' figures that are reached; that of products is in the table of devices.
FUSED_ATTENTION, MASKED_ATTENTION, MEMORY, LINKS = 0.4, 0.25, 0.8, 0.7
# Times that a saved activation is written or read: twice itself, twice its gradient; twice more where it is computed again.
PASSES_OVER_ACTIVATIONS, PASSES_WHEN_COMPUTED_AGAIN = 4, 2
ATTENTION_BACKWARD = 2.5  # times the forward pass, since fused attention computes its scores again
GRADIENT_BYTES = 4  # a number: gradients are added up and reduced in float32
UPDATE_BYTES = (
    14  # a trained number: float32 weight and gradient read, the weight written, and its 16-bit copy; besides its moments
)
STATE_BYTES = 12  # of them float32 weight and moments, which `offload: nvme` reads and writes
HOST_BYTES_PER_CPU = 8 * GB  # bytes/s that one core moves through memory
DISK = 6 * GB  # bytes/s of a node's local disks


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on."""

    products: float
    attention: float
    memory: float  # activations and gradients through the GPU's memory
    collectives: float  # what products do not hide
    optimizer: float
    host: float  # what offloading moves and computes

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of one worker: `rows` rows of `length` tokens, of which none attends over more than `span`.

    `saved` is the number of bytes of its activations without activation checkpointing, `inputs` of those that are layers' inputs.
    """

    rows: int
    length: int
    target_length: int
    span: int
    saved: float
    inputs: float


def estimate_step_time(recipe: Recipe, size: ModelSize, batch: MicroBatch, hardware: Hardware) -> StepTime:
    """Time of one optimizer step of `recipe`, whose workers are the GPUs of `hardware`, in micro-batches of `batch`."""
    training = recipe.training
    workers = training.max_workers
    passes = rows_per_worker(training, workers) // batch.rows
    products, attention, memory = _pass_times(recipe, size, batch, hardware)
    beside, after = _collective_times(recipe, size, hardware)
    exchanged = _exchange_time(recipe, size, batch, hardware)
    hidden = products + attention + memory
    shard = size.trained / workers
    offload = training.deepspeed.offload
    update = 0.0 if offload != "none" else _update_bytes(training) * shard / (hardware.device.bandwidth * MEMORY)
    return StepTime(
        products=passes * products,
        attention=passes * attention,
        memory=passes * memory,
        collectives=passes * (max(0.0, beside - hidden) + exchanged) + after,
        optimizer=update,
        host=_offload_time(recipe, size, hardware, passes) + passes * _inputs_time(training, batch, hardware),
    )


def _update_bytes(training: Training) -> float:
    """Bytes that the update of a trained number moves; moments are read and written."""
    return UPDATE_BYTES + 2 * moment_bytes(training.optimizer)


def model_flops(size: ModelSize, rows: int, length: int, target_length: int) -> float:
    """FLOPs of forward and backward pass for MFU: products with weights alone, nothing computed twice."""
    row = sum(
        tokens * (4.0 * products.weights + 2.0 * products.trained)
        for tokens, products in ((length, size.products), (target_length, size.target_products))
    )
    return rows * row


def _pass_times(recipe: Recipe, size: ModelSize, batch: MicroBatch, hardware: Hardware) -> tuple[float, float, float]:
    """Seconds of products, of attention, and of memory traffic beside them, in one forward and backward pass."""
    device, again = hardware.device, recipe.training.computed_again
    peak = device.bfloat16_peak if size.dtype.itemsize == 2 else device.float32_peak
    bandwidth = device.bandwidth * MEMORY
    flops = model_flops(size, batch.rows, batch.length, batch.target_length)
    if again:
        flops += (
            2.0 * again * batch.rows * (batch.length * size.products.weights + batch.target_length * size.target_products.weights)
        )
    read = (3 + again) * _bytes_of_weights(size)  # once in each forward and twice in the backward pass
    scores = _attention_flops(size, batch) * (1.0 + ATTENTION_BACKWARD + again)
    sharing = recipe.training.sequence_parallel  # workers, of which each computes its part of a row's tokens
    share = MASKED_ATTENTION if size.is_masked or batch.target_length else FUSED_ATTENTION
    moved = (PASSES_OVER_ACTIVATIONS + PASSES_WHEN_COMPUTED_AGAIN * again) * batch.saved
    gradients = (size.weight_bytes + 2 * GRADIENT_BYTES) * size.trained  # each is read, and added to what is there
    products = max(flops / sharing / (peak * device.products_share), read / bandwidth)
    return products, scores / sharing / (peak * share), (moved + gradients) / bandwidth


def _bytes_of_weights(size: ModelSize) -> float:
    """Bytes that move when every weight is used once; one in 4 bits is read, written in 16 bits, and read again."""
    return (size.parameters - size.quantized) * size.weight_bytes + size.quantized * (NF4_BYTES + 2 * size.weight_bytes)


def _attention_flops(size: ModelSize, batch: MicroBatch) -> float:
    """FLOPs of a forward pass for scores and their sums of values, over all layers and rows."""
    a_pair = 4.0 * size.attention_width * size.layers  # for one query and one key
    if batch.target_length:  # encoder-decoder: of whole rows with a mask, else of examples
        both = batch.length**2 + batch.target_length**2 + batch.target_length * batch.length
        return a_pair * batch.rows * both * (1.0 if size.is_masked else batch.span / batch.length)
    causal = float(batch.length) * batch.span / 2  # a token sees those before it
    pairs = float(batch.length) ** 2 if size.is_masked else causal
    return a_pair * batch.rows * pairs


def _collective_times(recipe: Recipe, size: ModelSize, hardware: Hardware) -> tuple[float, float]:
    """Seconds of collectives beside each micro-batch, and after the last one of a step."""
    stage = zero_stage(recipe.training, is_16_bit=size.is_16_bit)
    gradients = _collective_time(GRADIENT_BYTES * size.trained, hardware)
    trained = _collective_time(size.weight_bytes * size.trained, hardware)
    if stage == 3:  # weights are gathered for both passes, gradients scattered
        return 2 * _collective_time(size.weight_bytes * size.parameters, hardware) + gradients, 0.0
    if stage == 2:  # DeepSpeed all-reduces each micro-batch's buckets, and drops what is another worker's
        return 2 * gradients, trained
    return 0.0, 2 * gradients + (trained if stage else 0.0)


def _exchange_time(recipe: Recipe, size: ModelSize, batch: MicroBatch, hardware: Hardware) -> float:
    """Seconds of the all-to-alls around attention in a micro-batch whose rows workers share; products wait for them.

    Each layer swaps queries, keys, values and results, and their gradients (keys as if they had as many heads as queries).
    """
    sharing, again = recipe.training.sequence_parallel, recipe.training.computed_again
    width = size.attention_width * size.dtype.itemsize
    each = 4.0 * (2 + again) * size.layers * width * batch.rows * batch.length / sharing  # bytes that a worker holds
    link = hardware.device.link if sharing <= hardware.gpus else hardware.network / hardware.gpus
    return each * (sharing - 1) / sharing / (link * LINKS)


def _collective_time(size: float, hardware: Hardware) -> float:
    """Seconds in which every GPU gathers `size` bytes of which each has a share, or reduces and scatters them."""
    total, nodes = hardware.total_gpus, hardware.nodes
    inside = size * (total - 1) / total / hardware.device.link
    between = size * (nodes - 1) / nodes / hardware.network  # all GPUs of a node take in what the other nodes have once
    return max(inside, between) / LINKS


def _inputs_time(training: Training, batch: MicroBatch, hardware: Hardware) -> float:
    """Seconds in which the inputs of a micro-batch's layers go to the host and come back."""
    return 2 * batch.inputs / (hardware.device.host_link * LINKS) if training.activation_checkpointing == "offload" else 0.0


def _offload_time(recipe: Recipe, size: ModelSize, hardware: Hardware, passes: int) -> float:
    """Seconds that offloading adds: bytes to the host and back, the update on the host's CPUs, and its disks."""
    deepspeed, workers = recipe.training.deepspeed, recipe.training.max_workers
    seconds = 0.0
    if deepspeed.offload != "none":
        shard = size.trained / workers
        cpus = min(recipe.training.resources.cpus, hardware.cpus / hardware.gpus)
        # Each pass puts its gradients into the host's buffer, and all but the first fetch what is there to add to it.
        moved = (2 * passes - 1) * GRADIENT_BYTES + size.weight_bytes
        seconds += moved * shard / (hardware.device.host_link * LINKS)
        seconds += _update_bytes(recipe.training) * shard / (cpus * HOST_BYTES_PER_CPU)
        if deepspeed.offload == "nvme":
            seconds += 2 * STATE_BYTES * shard * hardware.gpus / DISK
    if deepspeed.offload_parameters != "none":
        shard = size.weight_bytes * size.parameters / workers
        seconds += passes * 2 * shard / (hardware.device.host_link * LINKS)
        if deepspeed.offload_parameters == "nvme":
            seconds += passes * 2 * shard * hardware.gpus / DISK
    return seconds
