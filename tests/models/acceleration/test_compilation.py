"""Compiled layers give the losses of layers that are not, and there are few graphs whatever the rows' lengths."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from apprentice.errors import ModelError
from apprentice.models.acceleration.compilation import compile_layers
from apprentice.models.attention.segments import register_segments
from apprentice.recipe import Training
from apprentice.train.batch import PackedRows
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from apprentice.train.losses.loss_registry import create_loss
from tests.models.architectures import EXPERTS, SEQ2SEQ, made
from tests.train.rows import packed_rows

pytestmark = [  # of PyTorch about itself: it looks at gradients while it traces, and its compiler imports what it has deprecated
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def results(model: Any, steps: list[PackedRows], lengths: int | None) -> list[torch.Tensor]:
    """Loss and all gradients of each step."""
    loss, values = create_loss(model, Training(steps=1)), []
    for rows in steps:
        model.zero_grad()
        [batch] = rows.micro_batches(2, lengths)
        value = loss(batch)
        value.backward()
        values += [value.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])]
    return values


def check(steps: int, backend: Any, *, checkpointing: Any = False) -> None:
    register_segments()
    rows = [packed_rows(2, seed) for seed in range(steps)]
    plain, compiled = made("llama", "segments").train(), made("llama", "segments").train()
    enable_activation_checkpointing(compiled, checkpointing)
    assert compile_layers(compiled, backend) == 2
    for ours, expected in zip(results(compiled, rows, 4), results(plain, rows, None), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_there_are_few_graphs() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    check(8, backend)
    assert 2 <= len(graphs) <= 2 * 4 * 2  # before and behind attention, for each length and power of two


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_compiled_code_computes_the_same(checkpointing: Any) -> None:
    check(1, "inductor", checkpointing=checkpointing)


@pytest.mark.parametrize(("names", "what"), [(SEQ2SEQ, "an encoder-decoder"), (EXPERTS, "a mixture of experts")])
def test_models_that_are_refused(names: list[str], what: str) -> None:
    for name in names:
        model = made(name)
        message = f"training.compile is for causal models without experts, and {model.config.model_type} is {what}; set false."
        with pytest.raises(ModelError, match=message):
            compile_layers(model)


def test_a_model_that_names_no_layers_is_refused() -> None:
    model = made("llama")
    model._no_split_modules = None
    with pytest.raises(ModelError, match=r"training.compile finds no layers in llama, which names none; set false\."):
        compile_layers(model)


def test_rows_cut_to_few_lengths_give_the_same_loss() -> None:
    """Padding is an example of its own, and empty sequences are none; in each objective's rows, and weighted ones."""
    register_segments()
    model = made("llama", "segments")
    for rows in (packed_rows(2), packed_rows(2, weighted=True), packed_rows(1, 3)):
        loss = create_loss(model, Training(steps=1))
        [short], [long] = rows.micro_batches(2), rows.micro_batches(2, 2)
        assert long.input_ids.shape[1] >= short.input_ids.shape[1]
        assert len(long.bounds.starts) >= len(short.bounds.starts)
        torch.testing.assert_close(loss(long), loss(short), rtol=1e-6, atol=1e-5)
