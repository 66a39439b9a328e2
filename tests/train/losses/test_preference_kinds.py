"""IPO, SimPO and ORPO against their papers' formulas on single pairs, and against TRL's own losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apprentice.recipe import ORPO, Training
from apprentice.train.batch import PackedRows
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.preference import AnswerPairs, ORPOLoss, PairwiseLoss
from tests.models.architectures import made
from tests.train.losses.test_preference import ROWS, gradients, pair_rows, same, trl_of
from tests.train.rows import examples_of

BETA, GAMMA = 0.3, 0.2
SETTINGS: dict[str, dict[str, float]] = {
    "ipo": {"beta": BETA},
    "simpo": {"beta": BETA, "gamma": GAMMA},
    "orpo": {"weight": BETA},
}


def created(objective: str, model: Any) -> PairwiseLoss:
    training = Training.model_validate({"objective": objective, objective: SETTINGS[objective], "steps": 1})
    loss = create_loss(model, training)
    assert isinstance(loss, PairwiseLoss)
    return loss


def odds(mean: Tensor) -> Tensor:
    return mean.exp() / (1 - mean.exp())


# The papers' equations, in terms of one pair's summed log-probabilities, those of the reference, and numbers of tokens.
def ipo(own: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    better, worse = (own - reference) / tokens  # Azar et al. 2023, equation 17, a token
    return (better - worse - 1 / (2 * BETA)) ** 2


def simpo(own: Tensor, _: Tensor, tokens: Tensor) -> Tensor:
    better, worse = BETA * own / tokens  # Meng et al. 2024, equation 6
    return -torch.log(1 / (1 + torch.exp(-(better - worse - GAMMA))))


def orpo(own: Tensor, _: Tensor, tokens: Tensor) -> Tensor:
    better, worse = own / tokens  # Hong et al. 2024, equations 3 to 7
    ratio = odds(better) / odds(worse)
    return -better - BETA * torch.log(1 / (1 + 1 / ratio))


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ipo": ipo, "simpo": simpo, "orpo": orpo}


@pytest.mark.parametrize("objective", FORMULAS)
def test_packed_pairs_have_the_papers_loss_of_single_pairs(objective: str) -> None:
    rows, model = pair_rows(), made("llama")
    module = created(objective, model)
    loss = module(rows.micro_batches(ROWS)[0])
    loss.backward()
    ours = gradients(model)
    assert set(module.figures) == {"accuracy", "margin", "chosen_reward", "rejected_reward"}
    parts = torch.stack([module(micro) for micro in rows.micro_batches(1)]).sum()
    torch.testing.assert_close(loss, parts, rtol=1e-6, atol=0)
    reference, texts, total = torch.tensor(np.concatenate(rows.reference or [])), examples_of(rows), torch.zeros(())
    for place in range(0, len(texts), 2):
        own = []
        for ids, mask in texts[place : place + 2]:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            own.append(logits.gather(-1, ids[1:, None])[:, 0][mask[1:]].sum())
        tokens = torch.stack([mask[1:].sum() for _, mask in texts[place : place + 2]])
        total = total + FORMULAS[objective](torch.stack(own), reference[place : place + 2], tokens)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    same(ours, gradients(model))


def test_a_sure_model_has_a_finite_odds_ratio() -> None:
    log_probs = torch.tensor([[0.0, -80.0], [-1e-9, 0.0]], requires_grad=True)
    pairs = AnswerPairs(log_probs, torch.ones(2, 2), torch.zeros(2, 2))
    losses, rewards = ORPOLoss(made("llama"), ORPO(weight=1.0)).compare(pairs)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    torch.testing.assert_close(rewards, log_probs)


def one_token_prompts(rows: PackedRows) -> PackedRows:
    """The rows with every token but an example's first trained on, since TRL's ORPO trains on prompts too."""
    return replace(rows, loss_mask=((rows.segment_ids > 0) & (rows.positions > 0)).astype(np.uint8))


def trl_batch(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """TRL's batch of pairs, from the (ids, target mask) of their answers, the better ones first."""
    padded, batch = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True), {}
    for side, texts in (("chosen", pairs[::2]), ("rejected", pairs[1::2])):
        batch[f"{side}_input_ids"] = padded([ids for ids, _ in texts])
        batch[f"{side}_attention_mask"] = padded([torch.ones_like(ids) for ids, _ in texts])
        batch[f"{side}_labels"] = padded([torch.where(mask, ids, -100) for ids, mask in texts], padding_value=-100)
    return batch


def trl_stand_in(trainer: Any, **settings: Any) -> SimpleNamespace:
    """The parts of TRL's `trainer` that compute its loss, without a trainer's files and loops."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda values: values)
    padding = {"padding_value": 0, "pad_token_id": 0}
    part = SimpleNamespace(is_encoder_decoder=False, aux_loss_enabled=False, accelerator=accelerator, **padding, **settings)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(part, name, getattr(trainer, name))
    for name in ("concatenated_forward", "get_batch_loss_metrics", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer, name):
            setattr(part, name, partial(getattr(trainer, name), part))
    return part


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own
@pytest.mark.parametrize("objective", ["ipo", "simpo", "orpo"])
def test_loss_and_gradients_are_trls(objective: str, tmp_path: Path, tiny_model: Path) -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    rows = one_token_prompts(pair_rows())
    model = made("llama")
    module = created(objective, model)
    loss = module(rows.micro_batches(ROWS)[0])
    loss.backward()
    ours, texts = gradients(model), examples_of(rows)
    margin = float(module.figures["margin"])
    if objective == "ipo":
        theirs, margins = trl_ipo(trl_of(model, tmp_path, tiny_model, "ipo"), rows, texts)
    else:
        trainer = ORPOTrainer if objective == "orpo" else CPOTrainer
        settings = {
            "loss_type": "simpo",
            "beta": BETA,
            "simpo_gamma": GAMMA,
            "alpha": 0.0,
            "label_smoothing": 0.0,
            "cpo_alpha": 0.0,
        }
        part = trl_stand_in(trainer, **settings)
        # One pair a batch: TRL's likelihood is a mean over a batch's tokens, ours over its pairs.
        results = [part.get_batch_loss_metrics(model, trl_batch(texts[at : at + 2])) for at in range(0, len(texts), 2)]
        theirs = torch.stack([value for value, _ in results]).sum()
        margins = sum(metrics["rewards/margins"] for _, metrics in results)
    theirs.backward()
    torch.testing.assert_close(loss, theirs.float(), rtol=1e-5, atol=0)
    same(ours, gradients(model))
    assert margin == pytest.approx(margins, rel=1e-4)


def trl_ipo(trainer: Any, rows: PackedRows, texts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Summed loss of all pairs and their summed margin, by TRL's DPO trainer with loss `ipo`."""
    order, padded = [*range(0, len(texts), 2), *range(1, len(texts), 2)], partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    reference = torch.tensor(np.concatenate(rows.reference or []))
    batch = {
        "input_ids": padded([texts[place][0] for place in order]),
        "attention_mask": padded([torch.ones_like(texts[place][0]) for place in order]),
        "completion_mask": padded([texts[place][1].long() for place in order]),
        "ref_chosen_logps": reference[::2],
        "ref_rejected_logps": reference[1::2],
    }
    pairs = len(texts) // 2
    loss = trainer.compute_loss(trainer.model, batch) * pairs
    return loss, trainer._metrics["eval"]["rewards/margins"][-1] * pairs
