"""The table of GPUs, and the names by which one asks for them."""

from __future__ import annotations

import pytest

from apprentice.errors import ResourcesError
from apprentice.preflight.hardware.devices import DEVICES, parse_hardware
from apprentice.train.metrics.mfu import peak_flops


@pytest.mark.parametrize(
    ("text", "nodes", "gpus"),
    [("H100-80GB", 1, 1), ("8xH100-80GB", 1, 8), ("4x8xH100-80GB", 4, 8), (" 2x1xh100-80gb ", 2, 1), ("2xRTX4090-24GB", 1, 2)],
)
def test_names(text: str, nodes: int, gpus: int) -> None:
    hardware = parse_hardware(text)
    assert (hardware.nodes, hardware.gpus, hardware.total_gpus) == (nodes, gpus, nodes * gpus)
    assert parse_hardware(str(hardware)) == hardware


@pytest.mark.parametrize("text", ["8xH100", "8xH100-90GB", "8", "", "x8xL4-24GB", "-1xL4-24GB"])
def test_unknown_names_are_one_sentence_with_the_known(text: str) -> None:
    with pytest.raises(ResourcesError, match=r"is not known; give GPUs as 8xH100-80GB.*A100-40GB.*RTX4090-24GB\.") as error:
        parse_hardware(text)
    assert "\n" not in str(error.value)


def test_a_typing_error_is_corrected() -> None:
    with pytest.raises(ResourcesError, match=r"Did you mean 'H100-80GB'\?"):
        parse_hardware("8xH100-80G")


@pytest.mark.parametrize("text", ["9xH100-80GB", "0xH100-80GB", "0x8xH100-80GB", "2x16xH100-80GB"])
def test_a_node_has_no_more_gpus_than_are_built(text: str) -> None:
    with pytest.raises(ResourcesError, match=r"a node has 1 to 8 GPUs; name several nodes as 2x8xH100-80GB\."):
        parse_hardware(text)


def test_part_of_a_node_has_part_of_its_host() -> None:
    whole, half = parse_hardware("8xH100-80GB"), parse_hardware("4xH100-80GB")
    assert (half.host_memory, half.network, half.cpus) == (whole.host_memory / 2, whole.network / 2, whole.cpus / 2)


def test_every_device_has_sound_figures_and_a_source() -> None:
    for name, device in DEVICES.items():
        assert name.endswith(f"-{device.memory / 1e9:.0f}GB")
        assert device.source
        assert 0 < device.products_share < 1
        assert device.float32_peak < device.bfloat16_peak
        assert device.host_link <= device.link < device.bandwidth
        kind = name.split("-")[0].replace("RTX", "GeForce RTX ")
        assert device.bfloat16_peak == peak_flops(f"NVIDIA {kind}")
