"""Replies to fixed instructions: as many passes whatever is said, and cut where the model ends them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from apprentice.data.encoding.prompt_format import Layout
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Training, Tuning
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.metrics.samples import MOST_TOKENS, SampleReplies
from tests.models.architectures import made


def test_a_reply_ends_where_the_model_ends_it_and_takes_no_fewer_passes(tiny_model: Path) -> None:
    layout = Layout("plain", Tokenizer(tiny_model))
    answer_ids = layout.encode_answers(["a red kite"])[0]
    calls: list[tuple[list[int], list[int]]] = []

    def next_token(prompt: Sequence[int], reply: Sequence[int]) -> int:
        calls.append((list(prompt), list(reply)))
        return answer_ids[len(reply)] if len(reply) < len(answer_ids) else layout.stop_ids[0]

    replies = SampleReplies(layout, ["Name a thing.", "And another."]).generate(next_token)
    assert replies == [{"instruction": text, "reply": "a red kite"} for text in ("Name a thing.", "And another.")]
    assert len(calls) == 2 * MOST_TOKENS
    assert calls[0] == (layout.encode_prompt(layout.prompt("Name a thing.")), [])
    assert calls[MOST_TOKENS - 1][1][: len(answer_ids)] == answer_ids


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT's, of prompt tuning
@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "full"), ("llama", "prompt"), ("llama", "prefix"), ("t5", "full"), ("t5", "lora"), ("bart", "full")],
)
def test_every_kind_of_model_is_asked_as_it_generates_itself(name: str, method: Any) -> None:
    model = TUNING_METHODS[method].wrap(made(name), Tuning(method=method, rank=4, virtual_tokens=3), 3).eval()
    loss = create_loss(model, Training(steps=1))
    prompt, reply = [40, 41, 7, 300], []
    with torch.no_grad():
        for _ in range(4):
            texts = (torch.tensor([ids], dtype=torch.long) for ids in (prompt, reply))
            reply.append(int(loss.targets.logits_after(*texts)[0, -1].argmax()))
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        free: dict[str, Any] = dict.fromkeys(("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"))
        own = model.generate(**inputs, max_new_tokens=4, do_sample=False, **free)[0].tolist()
    assert own[-4:] == reply


def test_a_reward_model_is_not_asked_for_replies() -> None:
    with pytest.raises(ValidationError, match="`sample_every_steps` shows replies, and a reward model writes none; leave it out"):
        Training(objective="reward", steps=2, sample_every_steps=1)
