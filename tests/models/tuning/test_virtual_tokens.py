"""Virtual tokens begin as words: the wrapped model first says what its base says after those words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.models.tuning.virtual_tokens import COMMON
from apprentice.recipe import Tuning
from tests.models.architectures import made

VIRTUAL = 5
TEXT = torch.tensor([[7, 3, 11, 2, 19, 23]])


def wrapped_of(model: Any, method: str, seed: int = 4) -> Any:
    tuning = Tuning(method=method, virtual_tokens=VIRTUAL)
    return TUNING_METHODS[method].wrap(model, tuning, seed).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_first_replies_are_those_after_the_words(kind: str, method: str) -> None:
    base = made(kind).eval()
    words = torch.randint(
        min(COMMON, base.get_input_embeddings().num_embeddings), (VIRTUAL,), generator=torch.Generator().manual_seed(4)
    )
    with torch.no_grad():
        expected = base(input_ids=torch.cat([words[None], TEXT], dim=1)).logits[:, VIRTUAL:]
        alone = base(input_ids=TEXT).logits
        logits = wrapped_of(base, method)(input_ids=TEXT).logits[:, -TEXT.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert float((expected - alone).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_seed_gives_the_same_beginning(method: str) -> None:
    first, same, other = (wrapped_of(made("llama"), method, seed).prompt_encoder["default"].embedding.weight for seed in (4, 4, 5))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_encoder_decoder_begins_as_words_where_they_are_read() -> None:
    model = made("t5_v1.1")
    table = model.get_input_embeddings().weight.detach()
    embeddings = wrapped_of(model, "prompt").prompt_encoder["default"].embedding.weight
    assert all(bool((table == row).all(dim=1).any()) for row in embeddings)
    assert wrapped_of(made("t5_v1.1"), "prefix").prompt_encoder["default"].embedding.weight.std() > 0
