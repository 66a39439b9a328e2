"""Memory and time on hardware that is not here: against what is known, and in which direction they go."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import RecipeError
from apprentice.models.weights.safetensors_reader import PIECE_BYTES
from apprentice.preflight.hardware.devices import Hardware, parse_hardware
from apprentice.preflight.hardware.hardware_estimate import HardwareEstimate, HardwareEstimator, place_recipe
from apprentice.recipe import Recipe, load_recipe
from apprentice.train.memory.estimate import NF4_BYTES
from tests.conftest import ROOT
from tests.models.architectures import made
from tests.support.big_models import big_llama, mpt_like, smollm2
from tests.support.recipes import gpu_recipe, tiny_recipe


def recipe(folder: Path, model: Path, method: str = "full", **changes: Any) -> Recipe:
    return load_recipe(gpu_recipe(folder, model, method, **changes))


def estimate(chosen: Recipe, hardware: str | Hardware) -> HardwareEstimate:
    machines = parse_hardware(hardware) if isinstance(hardware, str) else hardware
    return HardwareEstimator(machines).estimate(place_recipe(chosen, machines))


def test_8b_full_on_8_gpus_fits_with_stage_3_and_not_with_stage_0(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "8b")
    sharded = estimate(recipe(tmp_path, model), "8xH100-80GB")
    assert sharded.fits
    assert not estimate(recipe(tmp_path, model, training__deepspeed={"stage": 0}), "8xH100-80GB").fits
    assert sharded.gpu.optimizer == pytest.approx(12 * 8_030_261_248 / 8)
    assert (sharded.recipe.training.max_workers, sharded.recipe.training.resources.gpus, sharded.steps) == (8, 1.0, 4)


def test_8b_lora_on_one_gpu_fits_and_full_does_not(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "8b")
    assert estimate(recipe(tmp_path, model, "lora"), "1xH100-80GB").fits
    assert not estimate(recipe(tmp_path, model), "1xH100-80GB").fits


def test_70b_on_4_nodes(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "70b")
    made = estimate(recipe(tmp_path, model, training__activation_checkpointing=True), "4x8xH100-80GB")
    assert made.fits
    assert made.gpu.gradients + made.gpu.optimizer == pytest.approx(16 * made.size.trained / 32)
    assert made.host.loading == 8 * PIECE_BYTES  # each worker reads its share to its GPU
    for whole in ({"stage": 2}, {"stage": 3, "extra": {"zero_optimization": {"zero_hpz_partition_size": 8}}}):
        each_reads_all = estimate(recipe(tmp_path, model, training__deepspeed=whole, training__micro_batch=1), "4x8xH100-80GB")
        assert each_reads_all.host.loading == pytest.approx(8 * 2 * made.size.parameters)
    assert 0.2 < made.mfu < 0.6


# Tokens/s a GPU that MosaicML's llm-foundry reached (scripts/train/benchmarking): fully sharded, bfloat16, fused attention.
@pytest.mark.parametrize(
    ("sizes", "length", "rows", "again", "hardware", "measured"),
    [
        ((2048, 24), 2048, 14, False, "8xH100-80GB", 45455),
        ((4096, 32), 2048, 6, False, "8xH100-80GB", 10643),
        ((4096, 32), 8192, 8, True, "8xH100-80GB", 6935),
        ((5120, 40), 2048, 2, False, "8xH100-80GB", 4792),
        ((8192, 80), 2048, 2, True, "4x8xH100-80GB", 882),
        ((2048, 24), 2048, 14, False, "8xA100-80GB", 20513),
        ((4096, 32), 8192, 8, True, "8xA100-80GB", 3206),
        ((4096, 32), 2048, 12, True, "8xA100-40GB", 3679),
    ],
)
def test_step_time_is_near_published_runs(
    sizes: tuple[int, int], length: int, rows: int, again: bool, hardware: str, measured: int, tmp_path: Path
) -> None:
    machines = parse_hardware(hardware)
    changes: dict[str, Any] = {
        "data__packing": {"length": length},
        "data__max_length": length,
        "training__global_batch": rows * machines.total_gpus,
        "training__micro_batch": rows,
        "training__workers": 1,
        "training__activation_checkpointing": again,
    }
    made = estimate(recipe(tmp_path, mpt_like(tmp_path, *sizes), **changes), machines)
    assert made.tokens_per_s / machines.total_gpus == pytest.approx(measured, rel=0.2)
    assert made.gpu.total < machines.device.memory  # these runs fitted


MEASURED_ON_CPUS = [
    (int(row[1]), method, float(row[column].replace(",", "")))
    for row in re.finditer(
        r"^\| (\d)[^|]*\| [\d,]+ MiB \| ([\d,]+) MiB \| [\d,]+ MiB \| ([\d,]+) MiB \|$",
        (ROOT / "docs" / "guides" / "memory.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    for method, column in (("full", 2), ("lora", 3))
]


def test_the_runs_measured_on_cpus_are_there() -> None:
    assert len(MEASURED_ON_CPUS) == 8


@pytest.mark.parametrize(("stage", "method", "mebibytes"), MEASURED_ON_CPUS)
def test_the_same_arithmetic_gives_the_memory_measured_on_cpus(stage: int, method: str, mebibytes: float, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model__attention": "sdpa",  # with masks, as they were measured
        "data__packing": {"length": 512},
        "data__max_length": 512,
        "training__workers": 2,
        "training__deepspeed": {"stage": stage},
    }
    chosen = recipe(tmp_path, smollm2(tmp_path), method, **changes)
    memory = HardwareEstimator(parse_hardware("1xL4-24GB")).worker_memory(chosen, 2)  # without GPUs nothing of the L4 counts
    assert memory.total / 2**20 == pytest.approx(mebibytes, rel=0.2)


def test_more_gpus_take_no_more_memory_each_and_no_more_time(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "1b")
    runs = [
        estimate(recipe(tmp_path, model, training__micro_batch=1), name)
        for name in ("1xH100-80GB", "2xH100-80GB", "8xH100-80GB", "2x8xH100-80GB", "8x8xH100-80GB")
    ]
    for fewer, more in pairwise(runs):
        assert more.gpu.total <= fewer.gpu.total
        assert more.step.total < fewer.step.total


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_faster_network_is_not_slower(stage: int, tmp_path: Path) -> None:
    chosen = recipe(tmp_path, big_llama(tmp_path, "1b"), training__deepspeed={"stage": stage})
    fast = parse_hardware("2x8xL4-24GB")
    times = [
        estimate(chosen, replace(fast, device=replace(fast.device, node_network=part * fast.device.node_network))).step
        for part in (0.01, 0.5, 1.0, 100.0)
    ]
    assert all(faster.total <= slower.total for slower, faster in pairwise(times))
    assert times[-1].total < times[0].total
    assert times[-1].collectives < times[0].collectives
    assert estimate(chosen, "1xL4-24GB").step.collectives == 0


def test_levers_move_memory_where_they_should(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "1b")

    def with_(**changes: Any) -> HardwareEstimate:
        return estimate(recipe(tmp_path, model, training__micro_batch=1, **changes), "8xA100-80GB")

    plain = with_()
    again = with_(training__activation_checkpointing=True)
    assert again.gpu.total < plain.gpu.total
    assert again.step.products == pytest.approx(plain.step.products * 4 / 3)
    offloaded = with_(training__deepspeed={"stage": 3, "offload": "cpu"})
    assert offloaded.gpu.optimizer == offloaded.step.optimizer == 0
    assert offloaded.gpu.gradients == 0
    assert offloaded.host.offloaded == pytest.approx(20 * plain.size.trained)
    assert offloaded.step.host > plain.step.optimizer
    parameters = with_(training__deepspeed={"stage": 3, "offload_parameters": "cpu"})
    assert parameters.host.offloaded == pytest.approx(2 * plain.size.parameters)
    assert parameters.gpu.weights == pytest.approx(plain.gpu.weights - 2 * plain.size.parameters / 8)
    disk = with_(training__deepspeed={"stage": 3, "offload": "nvme", "offload_parameters": "nvme", "nvme_path": "/fast"})
    assert disk.host.offloaded == pytest.approx(20 * plain.size.trained + 8 * 5 * 2e8)  # the buffers that tensors pass through
    assert disk.step.host > offloaded.step.host + parameters.step.host


def test_attention_over_whole_rows_does_more_and_keeps_a_mask(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "1b")
    by_example, whole = (
        estimate(recipe(tmp_path, model, training__micro_batch=1, model__attention=name), "8xH100-80GB")
        for name in ("auto", "sdpa")
    )
    # Each of 4,096 tokens against 4,096 in place of half of 2,048, at 0.25 of the peak in place of 0.4.
    assert whole.step.attention == pytest.approx(4 * 0.4 / 0.25 * by_example.step.attention)
    # A mask in each of 16 layers; and with a mask transformers copies the 8 heads of keys and values for 32 heads of queries.
    mask, copies = 4096**2 * 2, 2 * 4096 * (32 - 8) * 64 * 2
    assert whole.gpu.activations - by_example.gpu.activations == pytest.approx(16 * (mask + copies), rel=0.01)


def test_an_encoder_decoder_and_float32(tmp_path: Path) -> None:
    made("t5").save_pretrained(tmp_path / "t5")
    chosen = recipe(tmp_path, tmp_path / "t5", model__dtype="float32", data__packing={"length": 96}, data__max_length=96)
    machines = parse_hardware("1xH100-80GB")
    slow = estimate(chosen, machines)
    half = replace(machines, device=replace(machines.device, float32_peak=machines.device.float32_peak / 2))
    assert slow.size.weight_bytes == 4
    assert estimate(chosen, half).step.attention == pytest.approx(2 * slow.step.attention)


def test_length_of_the_run(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "1b")

    def with_(**end: Any) -> HardwareEstimate:
        file = tiny_recipe(tmp_path, model, tuning={"method": "full"}, training__global_batch=8)
        text = file.read_text(encoding="utf-8").replace(
            "  steps: 4\n", "".join(f"  {key}: {value}\n" for key, value in end.items())
        )
        file.write_text(text, encoding="utf-8")
        return estimate(load_recipe(file), "1xH100-80GB")

    by_tokens = with_(tokens=8 * 256 * 10 + 1)
    assert by_tokens.steps == 11
    assert by_tokens.hours == pytest.approx(11 * by_tokens.step.total / 3600)
    by_epochs = with_(epochs=2)
    assert by_epochs.steps is None
    assert by_epochs.hours == pytest.approx(1000 * by_epochs.step.total / 3600)


def test_gpus_that_write_replies_train_nothing(tmp_path: Path) -> None:
    chosen = recipe(tmp_path, big_llama(tmp_path, "1b"), training__global_batch=60)
    grpo = chosen.training.grpo.model_copy(update={"actors": 2})
    training = chosen.training.model_copy(update={"objective": "grpo", "grpo": grpo})
    on_policy = chosen.model_copy(update={"training": training})
    assert place_recipe(on_policy, parse_hardware("8xH100-80GB")).training.max_workers == 6
    with pytest.raises(RecipeError, match=r"grpo.actors 2 take all GPUs of 2xH100-80GB"):
        place_recipe(on_policy, parse_hardware("2xH100-80GB"))


def test_batches_that_cannot_be_divided(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "1b")
    with pytest.raises(RecipeError, match=r"global_batch 60 cannot be divided among 8 workers"):
        place_recipe(recipe(tmp_path, model, training__global_batch=60), parse_hardware("8xH100-80GB"))
    with pytest.raises(RecipeError, match=r"8 workers on 8xH100-80GB cannot read 6 lanes evenly; choose other data.lanes"):
        place_recipe(recipe(tmp_path, model, data__lanes=6, training__global_batch=48), parse_hardware("8xH100-80GB"))
    fewer = place_recipe(recipe(tmp_path, model, training__micro_batch=32), parse_hardware("8xH100-80GB"))
    assert fewer.training.micro_batch == 8


def test_4_bit_weights_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    model, stage = big_llama(tmp_path, "1b"), {"training__deepspeed": {"stage": 2}, "training__micro_batch": 1}
    wide, narrow = (estimate(recipe(tmp_path, model, method, **stage), "1xH100-80GB") for method in ("lora", "qlora"))
    quantized = 1_235_814_400 - 128256 * 2048 - 33 * 2048  # the embedding, which is the output layer too, and norms keep 16 bits
    assert narrow.size.quantized == quantized
    assert wide.gpu.weights - narrow.gpu.weights == pytest.approx(quantized * (2 - NF4_BYTES))
    assert narrow.gpu.activations == pytest.approx(wide.gpu.activations)
    assert narrow.step.total >= wide.step.total
    with pytest.raises(RecipeError, match=r"4 bits, which training.deepspeed.stage 3 cannot split up; use stage 2 or lower"):
        recipe(tmp_path, model, "qlora", training__deepspeed={"stage": 3})


def test_workers_that_share_rows_hold_a_part_of_the_activations_and_exchange_heads(tmp_path: Path) -> None:
    model = big_llama(tmp_path, "8b")
    long: dict[str, Any] = {
        "data__packing": {"length": 262144},
        "data__max_length": 262144,
        "training__global_batch": 8,
        "training__micro_batch": 1,
        "training__activation_checkpointing": True,
        "training__workers": 8,
    }
    alone = estimate(recipe(tmp_path, model, **long), "8xH100-80GB")
    shared = estimate(recipe(tmp_path, model, **long, training__sequence_parallel=8), "8xH100-80GB")
    assert alone.gpu.activations is not None
    assert shared.gpu.activations is not None
    assert shared.gpu.activations == pytest.approx(alone.gpu.activations / 8, rel=0.1)
    assert not alone.fits
    assert shared.fits
    # Eight times as many passes, each with an eighth of the products; the exchange comes on top.
    assert shared.step.products == pytest.approx(alone.step.products)
    assert shared.step.attention == pytest.approx(alone.step.attention)
    width = shared.size.attention_width * 2
    moved = 4 * 3 * shared.size.layers * width * 262144 / 8 * 7 / 8  # bytes of a worker: four tensors, three times, seven eighths
    assert shared.step.collectives >= 8 * moved / (450e9 * 0.7)
    assert not shared.size.is_masked
