"""T5's packed pass without biases over whole rows: the losses of masks, and no tensor as large as a row's length squared."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from apprentice.errors import ModelError
from apprentice.models.attention import t5_segments
from apprentice.models.attention.t5_segments import register_t5_segments
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.recipe import Training, Tuning
from apprentice.train.batch import PackedRows, Seq2SeqBatch
from apprentice.train.compat import storage_id
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.target_losses import TargetLosses
from apprentice.train.sequence_bounds import ExampleSizes
from tests.models.architectures import made
from tests.train import encoder_decoder_rows
from tests.train.losses.test_flat_rows import NoDeviceGuards, SquareTensors
from tests.train.rows import packed_rows

T5 = ("t5", "t5_v1.1", "mt5")
LENGTH, EXAMPLE = 384, 96  # tokens of a row and of an example, on both sides
SIZES = ExampleSizes(((EXAMPLE,) * 4 + (0,),) * 2, ((EXAMPLE,) * 3 + (50, LENGTH - 3 * EXAMPLE - 50),) * 2)


@pytest.fixture(autouse=True)
def known() -> None:
    register_t5_segments()


def set_attention(model: Any, name: str) -> None:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = name


def compare(model: Any, rows: PackedRows) -> None:
    results = []
    for attention in ("sdpa", "t5_segments"):
        set_attention(model, attention)
        model.zero_grad()
        loss = create_loss(model, Training(steps=1))(rows.micro_batches(2)[0])
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]))
    (masked, gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, masked, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", T5)
def test_the_loss_and_gradients_are_those_of_masks(name: str) -> None:
    compare(made(name), encoder_decoder_rows.paired_rows(2))
    compare(made(name), encoder_decoder_rows.joined(encoder_decoder_rows.unpacked(encoder_decoder_rows.paired_rows(2))))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_long_examples_are_computed_in_blocks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5_segments, "BLOCK", 3)
    model = TUNING_METHODS[method].wrap(made("t5"), Tuning.model_validate({"method": method, "rank": 4}), 1)
    compare(model, encoder_decoder_rows.paired_rows(2))
    compare(model, encoder_decoder_rows.joined(encoder_decoder_rows.unpacked(encoder_decoder_rows.paired_rows(2))))


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_nothing_of_length_times_length_is_kept_for_a_long_example(
    is_decoder: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as one tensor nor in parts, where one row is one example."""
    monkeypatch.setattr(t5_segments, "BLOCK", block)
    length, heads, kept = 4 * 64, 2, dict[int, int]()
    module = SimpleNamespace(is_decoder=is_decoder, is_causal=is_decoder)
    states = [torch.randn(1, heads, length, 4, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, heads, 1, 2 * length - 1, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    sizes: Any = ((length, 0),)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, _ = t5_segments.t5_segment_attention(
            module, *states, None, scaling=1.0, position_bias=bias, prompt_sizes=sizes, answer_sizes=sizes
        )
    assert (sum(kept.values()) < heads * length * length) is (block < length)  # a quarter of its bytes
    out.sum().backward()
    assert bias.grad is not None


def test_long_padding_on_either_side_changes_nothing() -> None:
    rows = encoder_decoder_rows.paired_rows(2)
    rows.target_segment_ids[1, 4:], rows.loss_mask[1, 4:] = 0, 0  # type: ignore[index]
    rows.segment_ids[1, 7:] = 0
    compare(made("t5"), rows)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["full", "lora", "adapter"])
def test_sizes_go_through_a_tuning_method_and_activation_checkpointing(method: str) -> None:
    model = TUNING_METHODS[method].wrap(made("t5"), Tuning.model_validate({"method": method, "rank": 4, "width": 8}), 1)
    enable_activation_checkpointing(model, True)
    compare(model.train(), encoder_decoder_rows.paired_rows(2))


def test_weighted_targets_and_samples_too() -> None:
    rows = replace(encoder_decoder_rows.paired_rows(2), weights=packed_rows(2, weighted=True).weights)
    model = made("t5")
    compare(model, rows)
    logits = []
    for attention in ("sdpa", "t5_segments"):
        set_attention(model, attention)
        ids = torch.arange(3, 12)[None]
        logits.append(TargetLosses(model).logits_after(ids[:, :5], ids[:, 5:]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_batch_without_sizes_is_measured() -> None:
    model = made("t5", "t5_segments")
    loss, [batch] = create_loss(model, Training(steps=1)), encoder_decoder_rows.paired_rows(2).micro_batches(2)
    assert isinstance(batch, Seq2SeqBatch)
    assert loss(batch._replace(sizes=None, places=None)) == loss(batch)


def test_without_sizes_it_refuses() -> None:
    ids = torch.arange(3, 9)[None]
    with pytest.raises(ModelError, match=r"T5Attention is not told where the examples of a row begin"):
        made("t5", "t5_segments")(input_ids=ids, decoder_input_ids=ids)


def narrow(name: str, attention: str) -> Any:
    """The model `name` with fewer logits than a row has tokens."""
    config = made(name).config
    config.vocab_size = 128
    model = type(made(name))(config)
    model.set_attn_implementation(attention)
    return model.eval()


def arguments_of(device: str) -> dict[str, Any]:
    ids = torch.zeros(2, LENGTH, dtype=torch.long, device=device)
    return {"input_ids": ids, "decoder_input_ids": ids, **SIZES.keywords(), "use_cache": False}


def shapes_only(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """A stand-in for fused attention, which gives gradients to all that it is given."""
    bias = 0 if attn_mask is None else attn_mask.sum()
    return query + (key.sum() + value.sum() + bias)


@pytest.mark.parametrize("name", T5)
@pytest.mark.parametrize("sizes", [SIZES, ExampleSizes(((LENGTH, 0),) * 2, ((LENGTH, 0),) * 2)], ids=["packed", "single"])
@pytest.mark.parametrize(("attention", "has_squares"), [("t5_segments", False), ("sdpa", True)])
def test_no_pass_has_a_square_tensor(
    name: str, attention: str, has_squares: bool, sizes: ExampleSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", shapes_only)
    model = narrow(name, attention).to("meta").train()
    TargetLosses(model)  # gives the layers their hooks
    arguments = arguments_of("meta") | sizes.keywords()
    arguments = {name: value for name, value in arguments.items() if not (has_squares and name.endswith("sizes"))}
    with SquareTensors(LENGTH) as squares:
        model(**arguments).logits.sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without <= {"shared.weight"}  # on the meta device the sides' embeddings are their own
    assert squares.calls > 60
    assert bool(squares.shapes) is has_squares


@pytest.mark.parametrize("name", T5)
def test_a_forward_pass_on_a_gpu_has_no_square_tensor(name: str) -> None:
    model = narrow(name, "t5_segments")
    TargetLosses(model)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=torch.bfloat16, device="cuda")
                    module._parameters[key] = nn.Parameter(fake, requires_grad=False)
        arguments = arguments_of("cuda")
        with NoDeviceGuards(), SquareTensors(LENGTH) as squares:
            logits = model(**arguments).logits
        assert (logits.device.type, logits.dtype) == ("cuda", torch.bfloat16)
    assert squares.calls > 20
    assert not squares.shapes
