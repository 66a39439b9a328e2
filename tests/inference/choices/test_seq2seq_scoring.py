"""An encoder-decoder's choices in batches are those of one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apprentice.inference.choices.choice_scoring import choice_logprobs

PROMPTS = [[5, 6, 7, 1], [9, 1], [4, 5, 6, 7, 8, 9, 10, 1]]
CHOICES = [[[11, 1], [12, 13, 14, 1]], [[15, 1], [11, 1], [16, 17, 1]], [[20, 1]]]


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "t5":
            return T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
            ).eval()
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=64,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=64,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
            )
        ).eval()


@torch.inference_mode()
def alone(model: Any, prompt: list[int], choice: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([choice])).logits[0].double()
    return float(torch.log_softmax(logits, -1)[range(len(choice)), choice].sum())


@pytest.mark.parametrize("batch_tokens", [8, 4096])
def test_sums_are_those_of_one_choice_at_a_time(model: Any, batch_tokens: int) -> None:
    model.config.pad_token_id = model.config.pad_token_id or 0
    logprobs = choice_logprobs(model, PROMPTS, CHOICES, batch_tokens)
    expected = [[alone(model, prompt, choice) for choice in group] for prompt, group in zip(PROMPTS, CHOICES, strict=True)]
    assert [len(group) for group in logprobs] == [2, 3, 1]
    for ours, theirs in zip(logprobs, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_each_prompt_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = model.get_encoder()
    lines = []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: (lines.append(len(k["input_ids"])), forward(*a, **k))[1])
    choice_logprobs(model, PROMPTS, CHOICES)
    assert sum(lines) == len(PROMPTS)
