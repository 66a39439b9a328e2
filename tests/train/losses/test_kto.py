"""KTO's loss and gradients against the paper's formula on single answers and against TRL's, and its baseline over a whole step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apprentice.recipe import KTO
from apprentice.train.batch import LabelledBatch, MicroBatch, PackedRows, PreferenceBatch
from apprentice.train.engine.collectives import Collectives
from apprentice.train.loop import compute_validation_loss
from apprentice.train.losses.kto import KTOLoss, measure_baseline, with_baseline
from tests.models.architectures import made
from tests.train.losses.test_preference import gradients, same
from tests.train.preference_rows import ROWS, pair_rows
from tests.train.rows import examples_of

SETTINGS = KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)


@dataclass(frozen=True)
class Forward:
    """An engine that only computes losses."""

    loss: KTOLoss

    def validation_nll(self, batch: MicroBatch) -> float:
        with torch.no_grad():
            return float(self.loss(batch))


def near_rows(model: Any, count: int = ROWS, seed: int = 0) -> PackedRows:
    """Labelled rows whose reference is a little below the model, so that the baseline is above 0."""
    rows = pair_rows(count, seed, labelled=True)
    with torch.no_grad():
        own = [float(log_prob_of(model, ids, mask)) for ids, mask in examples_of(rows)]
    offsets = np.random.default_rng(seed).normal(-0.4, 0.5, len(own))
    parts = np.split(np.array(own) + offsets, np.cumsum([len(part) for part in rows.reference or []])[:-1])
    return replace(rows, reference=[part.astype(np.float32) for part in parts])


def log_prob_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, ids[1:, None])[:, 0][mask[1:]].sum()


def sides(rows: PackedRows) -> tuple[list[Any], Tensor, Tensor]:
    """(ids, mask) of all texts, each answer and then the mismatched one, with their reference; and the answers' labels."""
    reference = torch.tensor(np.concatenate(rows.reference or []))
    return examples_of(rows), reference, torch.tensor(np.concatenate(rows.desirable or [])) > 0


def papers(model: Any, rows: PackedRows) -> tuple[Tensor, float]:
    """The summed loss by the paper's equations 7 and 8, and the baseline, each text in a pass of its own."""
    texts, reference, labels = sides(rows)
    ratios = torch.stack([log_prob_of(model, *text) for text in texts]) - reference
    baseline = max(0.0, float(ratios[1::2].detach().mean()))
    value = torch.where(labels, torch.sigmoid(0.3 * (ratios[::2] - baseline)), torch.sigmoid(0.3 * (baseline - ratios[::2])))
    weight = torch.where(labels, 1.2, 0.7)
    return (weight * (1 - value)).sum(), baseline


def test_packed_answers_have_the_papers_loss_of_single_ones() -> None:
    model = made("llama")
    rows, module = near_rows(model), KTOLoss(model, SETTINGS)
    baseline = measure_baseline(Forward(module), rows, ROWS, Collectives())
    loss = sum(module(batch) for batch in with_baseline(rows.micro_batches(ROWS), baseline))
    loss.backward()
    ours = gradients(model)
    expected, reference_point = papers(model, rows)
    assert baseline == pytest.approx(reference_point, rel=1e-5)
    assert baseline > 0.05
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    same(ours, gradients(model))
    answers = rows.loss_denominator
    figures = {name: float(value) / answers for name, value in module.figures.items()}
    assert figures.keys() == {"accuracy", "margin", "kl"}
    assert figures["kl"] == pytest.approx(baseline, rel=1e-6)
    assert 0 < figures["accuracy"] < 1


@pytest.mark.parametrize("micro", [1, 2])
def test_the_baseline_is_the_whole_steps(micro: int) -> None:
    """Neither micro-batches nor who has which rows changes it; validation has one over all of its rows."""
    model = made("llama")
    rows, engine = near_rows(model, 4), Forward(KTOLoss(model, SETTINGS))
    whole = measure_baseline(engine, rows, 4, Collectives())
    assert measure_baseline(engine, rows, micro, Collectives()) == pytest.approx(whole, rel=1e-6)
    parts = [rows.share(rank, 2) for rank in range(2)]
    sums = [sum(engine.validation_nll(batch) for batch in part.mismatched_batches(micro)) for part in parts]
    assert sum(sums) / rows.loss_denominator == pytest.approx(whole, rel=1e-5)
    expected, _ = papers(model, rows)
    loss = compute_validation_loss(engine, rows, micro, Collectives())
    assert loss == pytest.approx(float(expected.detach()) / rows.loss_denominator, rel=1e-5)


def test_each_pass_has_one_of_the_two_answers() -> None:
    rows = pair_rows(labelled=True)
    [own], [other] = rows.micro_batches(ROWS), rows.mismatched_batches(ROWS)
    assert isinstance(own, LabelledBatch)
    assert isinstance(other, PreferenceBatch)
    texts, reference, labels = sides(rows)
    assert own.reference.tolist() == reference[::2].tolist()
    assert other.reference.tolist() == reference[1::2].tolist()
    assert own.desirable.tolist() == labels.tolist()
    for batch, mine in ((own, texts[::2]), (other, texts[1::2])):
        assert batch.places is not None
        assert batch.places.tolist() == batch.is_target.flatten().nonzero()[:, 0].tolist()
        for number, (ids, mask) in enumerate(mine):
            # Numbers of padding mean nothing, and padding is no target.
            here = (batch.answers == number) & (batch.input_ids != 0)
            assert batch.input_ids[here].tolist() == ids.tolist()
            assert batch.is_target[here].tolist() == mask.tolist()
            assert batch.positions[here].tolist() == list(range(len(ids)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own
def test_loss_and_gradients_are_trls(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import KTOConfig, KTOTrainer

    monkeypatch.setenv("TQDM_DISABLE", "1")
    model = made("llama")
    rows, module = near_rows(model), KTOLoss(model, SETTINGS)
    baseline = measure_baseline(Forward(module), rows, ROWS, Collectives())
    loss = sum(module(batch) for batch in with_baseline(rows.micro_batches(ROWS), baseline)) / rows.loss_denominator
    loss.backward()
    ours = gradients(model)
    config = KTOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        precompute_ref_log_probs=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    trainer = KTOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tiny_model),
    )
    texts, reference, labels = sides(rows)
    batch: dict[str, Tensor] = {"label": labels, "ref_logps": reference[::2], "ref_KL_logps": reference[1::2]}
    for prefix, mine in (("", texts[::2]), ("KL_", texts[1::2])):
        batch[f"{prefix}input_ids"] = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in mine], batch_first=True)
        for name, values in (
            ("attention_mask", [torch.ones_like(ids) for ids, _ in mine]),
            ("completion_mask", [m for _, m in mine]),
        ):
            batch[f"{prefix}{name}"] = torch.nn.utils.rnn.pad_sequence([one.long() for one in values], batch_first=True)
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    torch.testing.assert_close(loss, theirs.float(), rtol=1e-5, atol=0)
    same(ours, gradients(trainer.model))
    assert baseline == pytest.approx(trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1], rel=1e-4)
