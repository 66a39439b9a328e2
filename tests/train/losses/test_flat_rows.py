"""Packed rows as one flat sequence: the losses of masks, and no tensor as large as a row's length squared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from apprentice.models.attention import varlen
from apprentice.models.attention.segments import register_segments
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Training, Tuning
from apprentice.train.batch import PackedRows
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.target_losses import TargetLosses
from apprentice.train.sequence_bounds import SequenceBounds
from tests.models.architectures import CAUSAL, made
from tests.models.attention.varlen_stand_in import varlen_attn
from tests.train import encoder_decoder_rows
from tests.train.preference_rows import pair_rows
from tests.train.rows import packed_rows, reply_rows

LENGTH, EXAMPLE = 384, 96  # tokens of a row and of an example in it
SMALL = {"vocab_size": 128, "max_position_embeddings": 128}  # below a row's length
FLAT = [name for name in CAUSAL if name != "gemma2"]  # whose soft cap no varlen kernel of PyTorch has


class SquareTensors(TorchDispatchMode):
    """Keeps the shapes of all results in which two dimensions are at least `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.shapes, self.calls = length, list[tuple[int, ...]](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.shapes += [tuple(tensor.shape) for tensor in tensors if sum(size >= self.length for size in tensor.shape) > 1]
        return result


class NoDeviceGuards(TorchFunctionMode):
    """Does by single operators what PyTorch does with the tensor's device made the current one, which fails without CUDA."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            return _index(*args)
        if function is Tensor.contiguous:
            return torch.ops.aten.clone(*args, memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))


def _index(tensor: Tensor, index: Any) -> Tensor:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) for part in parts):
        return torch.ops.aten.index(tensor, list(parts))
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        own = tensor.dim() - sum(part is not None for part in parts) + 1
        parts = (*parts[:place], *([slice(None)] * own), *parts[place + 1 :])
    dim = 0
    for part in parts:
        if isinstance(part, int):
            tensor = torch.ops.aten.select(tensor, dim, part)
            continue
        if part is None:
            tensor = torch.ops.aten.unsqueeze(tensor, dim)
        elif part != slice(None):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return tensor


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen.register_varlen()
    register_segments()
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def built(name: str, **changes: Any) -> Any:
    """The architecture `name` with `changes` to its configuration and random weights."""
    model = made(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return type(model)(model.config).eval()


def arguments_of(model: Any, device: str) -> dict[str, Any]:
    """Arguments of `model` for two packed rows of four examples each, on `device`."""
    bounds = SequenceBounds(torch.empty(2 * LENGTH // EXAMPLE + 1, dtype=torch.int32, device=device), EXAMPLE)
    ids = torch.zeros(2, LENGTH, dtype=torch.long, device=device)
    return TargetLosses(model).model_arguments(ids, torch.zeros_like(ids), bounds)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("attention", ["varlen", "segments"])
@pytest.mark.parametrize("name", FLAT)
def test_the_loss_and_gradients_are_those_of_masks(name: str, attention: str) -> None:
    compare(made(name), Training(steps=1), packed_rows(2), attention)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("attention", ["varlen", "segments"])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_windows_are_kept(name: str, attention: str) -> None:
    layers = {} if name == "mistral" else {"layer_types": ["sliding_attention", "full_attention"]}
    narrow, wide = (built(name, sliding_window=window, **layers) for window in (3, 64))
    compare(narrow, Training(steps=1), packed_rows(2), attention)
    compare(wide, Training(steps=1), packed_rows(2), attention)
    batch = packed_rows(2).micro_batches(2)[0]
    with torch.no_grad():
        assert create_loss(narrow, Training(steps=1))(batch) != create_loss(wide, Training(steps=1))(batch)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("objective", "rows"), [("sft", packed_rows(2, weighted=True)), ("dpo", pair_rows(2)), ("grpo", reply_rows(2))]
)
def test_every_objective_runs_flat(objective: str, rows: PackedRows) -> None:
    block = {"grpo": {"reward": "judge"}} if objective == "grpo" else {}
    for attention in ("varlen", "segments"):
        compare(made("llama"), Training.model_validate({"steps": 1, "objective": objective} | block), rows, attention)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_bounds_go_through_a_tuning_method_and_activation_checkpointing(method: str) -> None:
    model = TUNING_METHODS[method].wrap(made("llama"), Tuning.model_validate({"method": method, "rank": 4, "width": 8}), 1)
    enable_activation_checkpointing(model, True)
    compare(model.train(), Training(steps=1), packed_rows(2))
    compare(model.train(), Training(steps=1), packed_rows(2), "segments")


@pytest.mark.usefixtures("stand_in")
def test_rewards_are_those_of_masks() -> None:
    config = made("llama").config
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(config)
    compare(model, Training.model_validate({"steps": 1, "objective": "reward"}), pair_rows(2))


@pytest.mark.usefixtures("stand_in")
def test_rows_of_one_example_and_samples_run_flat_too() -> None:
    model = made("llama")
    compare(model, Training(steps=1), encoder_decoder_rows.joined(encoder_decoder_rows.unpacked(packed_rows(2))))
    logits = []
    for attention in ("eager", "varlen"):
        model.config._attn_implementation = attention
        ids = torch.arange(3, 12)[None]
        logits.append(TargetLosses(model).logits_after(ids[:, :5], ids[:, 5:]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def compare(model: Any, training: Training, rows: PackedRows, flat: str = "varlen") -> None:
    results = []
    for attention in ("eager", flat):
        model.config._attn_implementation = attention
        model.zero_grad()
        loss = create_loss(model, training)(rows.micro_batches(2)[0])
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]))
    (masked, gradients), (flat_loss, flat_gradients) = results
    torch.testing.assert_close(flat_loss, masked, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(flat_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("attention", "has_squares"), [("varlen", False), ("sdpa", True)])
@pytest.mark.parametrize("name", FLAT)
def test_a_forward_pass_on_a_gpu_has_no_square_tensor(name: str, attention: str, has_squares: bool) -> None:
    varlen.register_varlen()
    model = built(name, **SMALL)
    model.config._attn_implementation = attention
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {key: _on_fake_gpu(tensor) for key, tensor in tensors.items() if tensor is not None}
        arguments = arguments_of(model, "cuda")
        with NoDeviceGuards(), SquareTensors(LENGTH) as squares:
            logits = model(**arguments, use_cache=False).logits
        assert (logits.device.type, logits.dtype) == ("cuda", torch.bfloat16)
    assert squares.calls > 20
    assert bool(squares.shapes) is has_squares


def _on_fake_gpu(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=torch.bfloat16 if isinstance(tensor, nn.Parameter) else tensor.dtype, device="cuda")
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


@pytest.mark.parametrize("name", FLAT)
def test_a_backward_pass_has_no_square_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shapes_only(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        return query + key.repeat_interleave(groups, 1) + value.repeat_interleave(groups, 1)

    varlen.register_varlen()
    monkeypatch.setattr(varlen, "varlen_attn", shapes_only)
    model = built(name, **SMALL).to("meta").train()
    model.config._attn_implementation = "varlen"
    with SquareTensors(LENGTH) as squares:
        model(**arguments_of(model, "meta"), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert squares.calls > 60
    assert not squares.shapes
