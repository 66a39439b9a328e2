"""The load-balancing loss: against transformers' own, however rows are divided, and in split training."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from apprentice.errors import RecipeError
from apprentice.recipe import Training
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.router_balance import balance_loss
from apprentice.train.losses.sft import SupervisedLoss
from tests.models.architectures import EXPERTS, made
from tests.train.losses import sharded_training
from tests.train.losses.test_chunked_cross_entropy import trained
from tests.train.rows import packed_rows

SPLIT: list[dict[str, Any]] = [
    {"model": "mixtral", "objective": "sft", "method": "lora", "checkpointing": False, "router_loss": 0.1},
    {"model": "qwen2_moe", "objective": "sft", "method": "lora", "checkpointing": True, "router_loss": 0.1},
    {"model": "qwen3_moe", "objective": "weighted", "method": "full", "checkpointing": False, "router_loss": 0.1, "stage": 2},
]


def settings(weight: float) -> Training:
    return Training.model_validate({"steps": 1, "router_loss": weight})


def test_a_row_without_padding_has_the_loss_of_transformers() -> None:
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    is_target = torch.zeros(2, 12, dtype=torch.bool)
    is_target[:, -3:] = True
    rows = [load_balancing_loss_func((logits[part],), 4, 2) for part in (slice(0, 12), slice(12, 24))]
    assert float(balance_loss((logits,), is_target, 2)) == pytest.approx(3 * float(sum(rows)))
    layers = balance_loss((logits, logits.flip(0)), is_target, 2)
    assert float(layers) == pytest.approx(sum(float(balance_loss((one,), is_target, 2)) for one in (logits, logits.flip(0))) / 2)


def test_even_experts_have_the_least_loss_and_padding_none() -> None:
    even = torch.eye(4).repeat(3, 1) + torch.eye(4).roll(1, 1).repeat(3, 1)
    is_target = torch.ones(1, 12)
    assert float(balance_loss((even,), is_target, 2)) == pytest.approx(12 * 2)
    assert float(balance_loss((torch.zeros(12, 4) + torch.tensor([9.0, 9, 0, 0]),), is_target, 2)) > 12 * 3.9
    shorter = is_target.clone()
    shorter[0, 8:] = 0
    noise = even.clone()
    noise[8:] = 7.0
    assert torch.equal(balance_loss((noise,), shorter, 2), balance_loss((even,), shorter, 2))


@pytest.mark.parametrize("name", EXPERTS)
def test_gradients_are_the_same_however_rows_are_divided(name: str) -> None:
    rows = packed_rows(4)
    gradients = []
    for micro in (4, 2, 1):
        model = made(name)
        loss = create_loss(model, settings(0.5)).train()
        values = [loss(batch) for batch in rows.micro_batches(micro)]
        torch.stack(values).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert all((other - gradients[0]).norm() < 1e-5 * gradients[0].norm() for other in gradients[1:])
    model = made(name)
    plain = SupervisedLoss(model).train()
    value = plain(rows.micro_batches(4)[0])
    assert torch.stack(values).sum().item() == pytest.approx(value.item(), rel=1e-6)  # what is reported stays the likelihood
    value.backward()
    unbalanced = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (unbalanced - gradients[0]).norm() > 1e-3 * unbalanced.norm()
    assert float(loss.figures["router_loss"]) > 0
    with torch.no_grad():
        assert float(loss.eval()(rows.micro_batches(4)[0])) == pytest.approx(value.item(), rel=1e-6)


def test_a_loss_leaves_nothing_in_the_model() -> None:
    """Trial passes of `micro_batch: auto` make a loss of their own, whose logits must not stay."""
    model = made("mixtral")
    trial = create_loss(model, settings(0.5)).train()
    trial(packed_rows(2).micro_batches(2)[0])
    reference = weakref.ref(trial)
    del trial
    gc.collect()
    assert reference() is None


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"router_loss balances the load of experts, and llama has none; leave it out"):
        create_loss(made("llama"), settings(0.1))
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 2,
    }
    pair = hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**sizes))
    with pytest.raises(RecipeError, match=r"router_loss is for causal models, and switch_transformers is none; leave it out"):
        create_loss(pair, settings(0.1))


@pytest.mark.long
def test_experts_split_up_train_as_in_one_process(tmp_path: Path) -> None:
    """Workers' tokens go to different experts; each worker must call and gather the same all the same."""
    results = trained(2, tmp_path, SPLIT)
    assert len(results) == len(SPLIT), "the processes hung"
    for case, ours in zip(SPLIT, results, strict=True):
        plain = sharded_training.plain(case, 2, tmp_path)
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5), case
        assert ours["norm"] == pytest.approx(plain["norm"], rel=1e-4), case
        assert ours["weights"].keys() == plain["weights"].keys() != set()
        flat, plain_flat = (torch.cat([each["weights"][name].flatten() for name in plain["weights"]]) for each in (ours, plain))
        assert (flat - plain_flat).norm() <= 1e-4 * plain_flat.norm(), case
        assert len(set(ours["calls"])) == 1
