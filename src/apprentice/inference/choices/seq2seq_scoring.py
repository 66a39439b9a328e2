"""Log-probabilities of answer choices under an encoder-decoder, in batches: each prompt is encoded once for all its choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

_LOGIT_ROWS = 1024  # positions whose logits one pass of the decoder keeps


@torch.inference_mode()
def seq2seq_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], batch_tokens: int
) -> list[list[float]]:
    """Natural log-probability of every choice (token ids) after its prompt: the sum over its tokens, in the order of the arguments.

    `batch_tokens` bounds the tokens, padding included, of one pass of the encoder; a longer prompt runs alone.
    """
    logprobs: list[list[float]] = [[0.0] * len(group) for group in choices]
    for batch in _batches([len(prompt) for prompt in prompts], batch_tokens):
        states, mask = _encode(model, [prompts[number] for number in batch])
        items = [(line, number, place) for line, number in enumerate(batch) for place in range(len(choices[number]))]
        items.sort(key=lambda item: len(choices[item[1]][item[2]]))
        for part in _group_by_logits([len(choices[number][place]) for _, number, place in items]):
            lines, numbers, places = zip(*(items[at] for at in part), strict=True)
            texts = [choices[number][place] for number, place in zip(numbers, places, strict=True)]
            rows = torch.tensor(lines, device=states.device)
            for number, place, value in zip(numbers, places, _sums(model, states[rows], mask[rows], texts), strict=True):
                logprobs[number][place] = value
    return logprobs


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups prompts (their indices) of similar length, longest first, within `batch_tokens` including padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def _group_by_logits(lengths: Sequence[int]) -> list[list[int]]:
    """Groups choices (indices, in ascending order of length) so that each group has at most `_LOGIT_ROWS` rows of logits."""
    runs: list[list[int]] = []
    for place, length in enumerate(lengths):
        if not runs or (len(runs[-1]) + 1) * length > _LOGIT_ROWS:
            runs.append([])
        runs[-1].append(place)
    return runs


def _pad(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask (1: a token, 0: padding), int64 (prompts, longest) each."""
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for line, prompt in enumerate(prompts):
        ids[line, : len(prompt)] = torch.tensor(list(prompt))
        mask[line, : len(prompt)] = 1
    return ids.to(device), mask.to(device)


def _encode(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Encoder states (prompts, longest, hidden) and their attention mask (prompts, longest)."""
    ids, mask = _pad(model, prompts)
    states: Tensor = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    return states, mask


def _sums(model: Any, states: Tensor, mask: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of each text (ids) given the encoder states (texts, longest, hidden) of the same row."""
    width = max(map(len, texts))
    labels = torch.zeros(len(texts), width, dtype=torch.long, device=states.device)
    is_token = torch.zeros(len(texts), width, device=states.device)
    for line, text in enumerate(texts):
        labels[line, : len(text)] = torch.tensor(list(text), device=states.device)
        is_token[line, : len(text)] = 1.0
    inputs = torch.cat([torch.full_like(labels[:, :1], model.config.decoder_start_token_id), labels[:, :-1]], dim=1)
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, decoder_input_ids=inputs, use_cache=False
    ).logits.float()  # (texts, width, vocabulary)
    logprobs = logits.gather(2, labels[..., None])[..., 0] - logits.logsumexp(dim=-1)
    return [float(value) for value in (logprobs.double() * is_token).sum(dim=1)]
