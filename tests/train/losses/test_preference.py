"""DPO's loss and gradients against TRL's on the same pairs, packed against one by one, and whole steps of the engine's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apprentice.errors import ModelError
from apprentice.models.loading import load_model
from apprentice.models.reward import choice_rewards
from apprentice.recipe import DPO
from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses.preference import PreferenceLoss, RewardLoss, answer_log_probabilities
from apprentice.train.losses.sft import SupervisedLoss
from tests.models.architectures import made
from tests.train.preference_rows import ROWS, pair_rows
from tests.train.rows import examples_of


def gradients(model: Any) -> dict[str, torch.Tensor]:
    of_parameters = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return of_parameters


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """No number of a gradient is off by more than 1e-5 of the largest of its tensor."""
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")


def trl_of(model: Any, folder: Path, tokenizer: Path, loss_type: str = "sigmoid") -> Any:
    """TRL's trainer over `model` with beta 0.3, with the reference's log-probabilities given."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder),
        beta=0.3,
        loss_type=[loss_type],
        precompute_ref_log_probs=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return DPOTrainer(
        model=model, args=config, train_dataset=rows, processing_class=PreTrainedTokenizerFast.from_pretrained(tokenizer)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own
def test_loss_and_gradients_are_trls(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    rows = pair_rows()
    micro = rows.micro_batches(ROWS)[0]
    reference = micro.reference
    texts = examples_of(rows)
    assert len(texts) == len(reference) >= 6
    model = made("llama")
    trainer = trl_of(model, tmp_path, tiny_model)
    order = [*range(0, len(texts), 2), *range(1, len(texts), 2)]  # TRL's batch: the better answers, then the worse
    padded = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": padded([texts[place][0] for place in order], batch_first=True),
        "attention_mask": padded([torch.ones_like(texts[place][0]) for place in order], batch_first=True),
        "completion_mask": padded([texts[place][1].long() for place in order], batch_first=True),
        "ref_chosen_logps": reference[::2],
        "ref_rejected_logps": reference[1::2],
    }
    model.zero_grad()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    expected = gradients(trainer.model)
    fresh = made("llama")
    pairs = len(reference) // 2
    loss = PreferenceLoss(fresh, DPO(beta=0.3))
    ours = loss(micro) / pairs
    ours.backward()
    assert pairs == rows.loss_denominator
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=0)
    same(gradients(fresh), expected)
    means = {name: float(value) / pairs for name, value in loss.figures.items()}
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    assert means["margin"] == pytest.approx(metrics["rewards/margins"], rel=1e-4)
    assert means["accuracy"] == pytest.approx(metrics["rewards/accuracies"])
    assert means["chosen_reward"] == pytest.approx(metrics["rewards/chosen"], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_pairs_are_single_pairs(smoothing: float) -> None:
    rows, dpo = pair_rows(), DPO(beta=0.2, label_smoothing=smoothing)
    model = made("llama")
    micro = rows.micro_batches(ROWS)[0]
    loss = PreferenceLoss(model, dpo)(micro)
    loss.backward()
    ours = gradients(model)
    total = torch.zeros(())
    reference = np.concatenate(rows.reference or [])
    texts = examples_of(rows)
    for place in range(0, len(texts), 2):
        own = []
        for ids, mask in texts[place : place + 2]:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            own.append(logits.gather(-1, ids[1:, None])[:, 0][mask[1:]].sum())
        margin = dpo.beta * ((own[0] - reference[place]) - (own[1] - reference[place + 1]))
        total = total - (1 - smoothing) * margin.sigmoid().log() - smoothing * (-margin).sigmoid().log()
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    same(ours, gradients(model))


def test_micro_batches_add_up() -> None:
    rows, model = pair_rows(), made("llama")
    loss = PreferenceLoss(model, DPO())
    whole = loss(rows.micro_batches(ROWS)[0])
    parts = torch.stack([loss(micro) for micro in rows.micro_batches(1)]).sum()
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


def test_a_model_against_itself_prefers_nothing() -> None:
    """With its own log-probabilities as the reference every pair costs log 2, and no answer has a reward."""
    rows, model = pair_rows(), made("llama")
    loss = PreferenceLoss(model, DPO())
    micro = rows.micro_batches(ROWS)[0]
    with torch.no_grad():
        own = answer_log_probabilities(loss.targets, micro)
        value = loss(micro._replace(reference=own))
        nll = SupervisedLoss(model)(SupervisedBatch(micro.input_ids, micro.positions, micro.is_target))
    assert float(value) == pytest.approx(rows.loss_denominator * np.log(2), rel=1e-6)
    assert float(loss.figures["margin"]) == pytest.approx(0.0, abs=1e-5)
    assert float(own.sum()) == pytest.approx(-float(nll), rel=1e-6)


def reward_model(folder: Path) -> Any:
    """A tiny Llama whose last layer is a new one."""
    made("llama").save_pretrained(folder)
    return load_model(folder, torch.float32, head=3)


def test_rewards_of_packed_answers_are_those_of_single_ones(tmp_path: Path) -> None:
    rows, model = pair_rows(), reward_model(tmp_path)
    micro = rows.micro_batches(ROWS)[0]
    module = RewardLoss(model)
    loss = module(micro)
    loss.backward()
    ours = gradients(model)
    chosen_reward = float(module.figures["chosen_reward"])
    alone = torch.stack([model(input_ids=ids[None]).logits[0, 0] for ids, _ in examples_of(rows)]).view(-1, 2)
    expected = -torch.nn.functional.logsigmoid(alone[:, 0] - alone[:, 1]).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    same(ours, gradients(model))
    assert "score.weight" in ours
    alone = alone.detach()
    assert chosen_reward == pytest.approx(float(alone[:, 0].sum()), rel=1e-4)
    ids = [text.tolist() for text, _ in examples_of(rows)]
    pairs = [[ids[place][3:], ids[place + 1][3:]] for place in range(0, len(ids), 2)]
    prompts = [ids[place][:3] for place in range(0, len(ids), 2)]
    same_prompt = [(prompt, [pair[0]]) for prompt, pair in zip(prompts, pairs, strict=True)]
    rewards = choice_rewards(model, [prompt for prompt, _ in same_prompt], [group for _, group in same_prompt], batch_tokens=30)
    assert [value for [value] in rewards] == pytest.approx(alone[:, 0].tolist(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own
def test_reward_loss_and_gradients_are_trls(tmp_path: Path, tiny_model: Path) -> None:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    rows, model = pair_rows(), reward_model(tmp_path / "model")
    micro = rows.micro_batches(ROWS)[0]
    loss = RewardLoss(model)(micro) / rows.loss_denominator
    loss.backward()
    ours = gradients(model)
    config = RewardConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tiny_model),
    )
    texts = examples_of(rows)
    order = [*range(0, len(texts), 2), *range(1, len(texts), 2)]
    padded = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": padded([texts[place][0] for place in order], batch_first=True),
        "attention_mask": padded([torch.ones_like(texts[place][0]) for place in order], batch_first=True),
    }
    theirs = trainer.compute_loss(trainer.model.eval(), batch)
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    same(ours, gradients(trainer.model))
    figures = trainer._metrics["eval"]
    assert float(figures["accuracy"][-1]) >= 0
    assert figures["margin"]


def test_a_reward_model_is_asked_to_write(tmp_path: Path) -> None:
    reward_model(tmp_path / "base").save_pretrained(tmp_path / "reward")
    with pytest.raises(ModelError, match="is a reward model: it gives answers a number and writes none"):
        load_model(tmp_path / "reward", torch.float32)
    again = load_model(tmp_path / "reward", torch.float32, head=9)
    torch.testing.assert_close(again.score.weight, load_model(tmp_path / "base", torch.float32, head=3).score.weight)
    assert not torch.equal(again.score.weight, load_model(tmp_path / "base", torch.float32, head=4).score.weight)
