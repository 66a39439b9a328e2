"""Choice log-probabilities equal those of separate full forward passes, alone and in company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apprentice.inference.choices import choice_scoring as scoring
from apprentice.inference.choices.choice_scoring import choice_logprobs
from tests.models.architectures import CAUSAL, MIXING, made

Question = tuple[list[int], list[list[int]]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=request.param).eval()
    torch.set_num_threads(threads)


def questions(seed: int, count: int) -> list[Question]:
    """Prompts of 1 to 40 tokens with 1 to 6 choices of 1 to 8 tokens."""
    random = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return [int(i) for i in random.integers(3, 512, size=random.integers(1, most + 1))]

    return [(ids(40), [ids(8) for _ in range(random.integers(1, 7))]) for _ in range(count)]


def by_full_forwards(model: Any, prompt: list[int], choices: list[list[int]]) -> list[float]:
    sums = []
    for choice in choices:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + choice])).logits[0].double()
        steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(float(steps[range(len(choice)), choice].sum()))
    return sums


def flat(logprobs: list[list[float]]) -> np.ndarray:
    return np.array([value for group in logprobs for value in group])


def test_sums_are_those_of_full_forward_passes(model: Any) -> None:
    pairs = questions(1, 24)
    prompts, choices = [p for p, _ in pairs], [c for _, c in pairs]
    expected = [by_full_forwards(model, prompt, group) for prompt, group in pairs]
    logprobs = choice_logprobs(model, prompts, choices)
    assert [len(group) for group in logprobs] == [len(group) for group in choices]
    assert flat(logprobs).std() > 5  # the sums differ, so equality says something
    np.testing.assert_allclose(flat(logprobs), flat(expected), atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 16, 50, 300, 100_000])
def test_company_and_batch_size_change_nothing(model: Any, batch_tokens: int) -> None:
    pairs = questions(2, 12)
    alone = [choice_logprobs(model, [prompt], [group])[0] for prompt, group in pairs]
    together = choice_logprobs(model, [p for p, _ in pairs], [c for _, c in pairs], batch_tokens)
    np.testing.assert_allclose(flat(together), flat(alone), atol=1e-4)


def test_one_forward_pass_for_many_choices(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    forward = scoring._forward
    monkeypatch.setattr(scoring, "_forward", lambda model, batch: passes.append(len(batch)) or forward(model, batch))
    choice_logprobs(model, [[5] * 30] * 6, [[[7], [8, 9], [10, 11, 12]]] * 6, batch_tokens=100)
    # A row is 30 tokens of prompt and 0 + 1 + 2 of choices; three such rows fit into 100 tokens.
    assert passes == [3, 3]


def test_the_kept_logits_are_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LOGIT_ROWS", 4)
    passes = []
    forward = scoring._forward
    monkeypatch.setattr(scoring, "_forward", lambda model, batch: passes.append(len(batch)) or forward(model, batch))
    choice_logprobs(model, [[5]] * 3, [[[7, 8], [9]]] * 3)
    assert passes == [2, 1]


def test_repeated_choices_and_prefixes(model: Any) -> None:
    logprobs = choice_logprobs(model, [[4, 5, 6]], [[[9, 10], [9], [9, 10], [9, 10, 11]]])[0]
    assert logprobs[0] == pytest.approx(logprobs[2], abs=1e-6)
    assert logprobs[1] > logprobs[0] > logprobs[3]


@pytest.mark.parametrize(("prompts", "choices"), [([[]], [[[1]]]), ([[1]], [[[1], []]])])
def test_nothing_to_score_is_refused(model: Any, prompts: list[list[int]], choices: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="without tokens"):
        choice_logprobs(model, prompts, choices)


def test_no_prompts() -> None:
    assert choice_logprobs(None, [], []) == []


def strengthened(name: str, attention: str | None = None) -> Any:
    """The model `name` with weights large enough that what it sees far back changes its numbers."""
    model = made(name, attention)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(std=0.1)
    return model


ATTENDING = [
    (name, attention)
    for name in (*CAUSAL, *MIXING)
    for attention in ("sdpa", "eager")
    if attention == "eager" or name not in ("gemma2", "mamba")  # which have no sdpa in transformers
]


@pytest.mark.parametrize(("name", "attention"), ATTENDING)
def test_every_architecture_gives_the_sums_of_full_forward_passes(name: str, attention: str) -> None:
    model = strengthened(name, attention)
    random = np.random.default_rng(4)

    def ids(count: int) -> list[int]:
        return [int(id) for id in random.integers(3, 500, size=count)]

    # Far below the windows of 64 tokens, at their edge with and without the choices, and beyond.
    prompts = [ids(count) for count in (9, 56, 60, 64, 100, 80)]
    choices = [[ids(count) for count in (4, 1, 6, 3)] for _ in prompts]
    expected = [by_full_forwards(model, prompt, group) for prompt, group in zip(prompts, choices, strict=True)]
    np.testing.assert_allclose(flat(choice_logprobs(model, prompts, choices)), flat(expected), atol=2e-4)


def test_choices_share_a_row_up_to_the_window_and_not_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("mistral")
    passes: dict[str, list[list[int]]] = {"_forward": [], "_forward_single_choices": []}
    for name, seen in passes.items():
        forward = getattr(scoring, name)

        def watched(model: Any, batch: Any, forward: Any = forward, seen: Any = seen) -> Any:
            seen.append([len(row.choices) for row in batch])
            return forward(model, batch)

        monkeypatch.setattr(scoring, name, watched)
    choice_logprobs(model, [[5] * 60, [5] * 70], [[[7, 8, 9], [7, 8, 9], [9, 8]]] * 2)
    assert passes == {"_forward": [[2, 1]], "_forward_single_choices": [[1, 1, 1]]}


def test_a_mask_that_flash_attention_cannot_take_is_not_made() -> None:
    model = made("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert scoring._masked_row_limit(model) == 0


def test_the_logits_kept_of_prompts_of_different_lengths_are_bounded() -> None:
    rows = [scoring._Row(number, [5] * length, [(0, [7, 8])]) for number, length in enumerate((900, 890, 100, 90))]
    batches = scoring._batches(rows, 4096, pads_at_end=True)
    assert [[row.number for row in batch] for batch in batches] == [[0, 1], [2, 3]]
