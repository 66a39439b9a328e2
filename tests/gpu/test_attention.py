"""Attention on a GPU through the recipe's word for it: implementations agree, windows slide, and no tensor has length × length."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from apprentice.train.batch import SupervisedBatch, target_places
from apprentice.train.compat import attention_name
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.losses.target_losses import TargetLosses
from tests.gpu.on_devices import (
    BOTH_DTYPES,
    GPU,
    check_same_direction,
    gradients,
    llama,
    loaded,
    on_devices,
    only_batch,
    working_bytes,
)
from tests.train.rows import packed_rows

WINDOW, LAYERS = 8, 2
REACH = LAYERS * (WINDOW - 1)  # tokens before the present one that can matter
SLIDING: dict[str, Any] = {"mistral": hf.MistralConfig, "gemma2": hf.Gemma2Config, "gemma3": hf.Gemma3TextConfig}


@on_devices()
@BOTH_DTYPES
@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_implementations_agree(attention: str, dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    check_agrees_with_eager(attention, dtype, device, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash", "flex"])
def test_implementations_of_gpus_agree(attention: str, tmp_path: Path) -> None:
    if attention == "flash" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    check_agrees_with_eager(attention, torch.bfloat16, GPU, tmp_path)


def check_agrees_with_eager(attention: str, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    """The loss of packed rows and its gradients are those of eager attention in float32 on the CPU."""
    rows, results = packed_rows(3), []
    for word, kind, where in ((attention, dtype, device), ("eager", torch.float32, torch.device("cpu"))):
        model = loaded(llama(hidden=128), folder, kind, where, word)
        loss = SupervisedLoss(model)(only_batch(rows, where))
        loss.backward()
        results.append((loss.detach().cpu(), gradients(model)))
    (loss, ours), (expected, reference) = results
    is_exact = dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5 if is_exact else 5e-3, atol=0)
    check_same_direction(ours, reference, 0.9999 if is_exact else 0.98)


@on_devices()
def test_auto_is_not_the_slowest(device: torch.device, tmp_path: Path) -> None:
    name = attention_name(loaded(llama(), tmp_path, torch.bfloat16, device))
    print(f"attention auto on {device.type}: {name}")
    assert name != "eager"


@on_devices()
@BOTH_DTYPES
@pytest.mark.parametrize("name", list(SLIDING))
def test_windows_slide_in_packed_rows(name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """Another first word changes the losses within the window's reach, and none behind it or in the next example."""
    model = loaded(_with_windows(name), tmp_path, dtype, device)
    ids = torch.randint(3, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None]
    before = _losses(model, ids, positions, device)
    ids[0, 0] = (ids[0, 0] + 200) % 500
    change = (_losses(model, ids, positions, device) - before).abs()  # of the tokens 1 to 63
    assert (change[: WINDOW - 1] > 0).all()
    if dtype == torch.float32:
        assert change[REACH] > 0
    assert change[REACH + 1 :].max() < (1e-6 if dtype == torch.float32 else 1e-3)


def _with_windows(name: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "sliding_window": WINDOW,
        "initializer_range": 0.2,
    }
    if name != "mistral":
        sizes |= {"layer_types": ["sliding_attention"] * LAYERS, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = hf.AutoModelForCausalLM.from_config(SLIDING[name](**sizes))
    return model


def _losses(model: Any, ids: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    batch = SupervisedBatch(ids.to(device), positions.to(device), torch.ones_like(ids, dtype=torch.bool).to(device))
    with torch.no_grad():
        return TargetLosses(model).causal(batch.input_ids, batch.positions, target_places(batch), "none").cpu()


@on_devices()
def test_one_example_makes_no_tensor_of_length_by_length(device: torch.device, tmp_path: Path) -> None:
    check_no_square(device, tmp_path, examples=1)


@on_devices()
def test_a_packed_row_makes_no_tensor_of_length_by_length(device: torch.device, tmp_path: Path) -> None:
    check_no_square(device, tmp_path, examples=8)


def check_no_square(device: torch.device, folder: Path, *, examples: int) -> None:
    """A pass forward and back over a row takes less memory than a mask of a byte for each pair of tokens."""
    length = 32_768 if device.type == "cuda" else 2_048
    model = loaded(llama(hidden=128, inner=128), folder, torch.bfloat16, device)
    ids = torch.randint(3, 500, (1, length), device=device)
    positions = torch.arange(length, device=device).remainder(length // examples)[None] if examples > 1 else None
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    is_target[:, 1::128] = True
    loss, batch = SupervisedLoss(model), SupervisedBatch(ids, positions, is_target)
    loss(SupervisedBatch(*(None if part is None else part[:, : length // examples] for part in batch))).backward()  # gradients
    assert working_bytes(lambda: loss(batch).backward(), device) < length * length
