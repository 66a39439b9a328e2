"""Comparison of two models on the same rows, token by token: distributions, the answers' likelihood, and the best tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apprentice.data.encoding.tokenize import Tokenized


class RowComparison(NamedTuple):
    """Sums over the target tokens of a row.

    `divergence` is the Kullback-Leibler divergence of the reference from the other model (nats), `log_likelihood` how much more
    probable the other makes the targets (nats), `hits` how many more of them are its most probable tokens.
    """

    tokens: int
    divergence: float
    log_likelihood: float
    hits: int


@torch.no_grad()
def compare_models(reference: Any, other: Any, rows: Sequence[Tokenized]) -> Iterator[RowComparison]:
    """Compares `other` with `reference`, two models of one family in memory, on `rows`; of a preference pair the better answer."""
    for row in rows:
        start = row.prompt_length if row.prompt_length < len(row.ids) else 1
        is_target = torch.ones(len(row.ids), dtype=torch.bool)
        for first, last in row.untrained:
            is_target[first:last] = False
        places = torch.arange(start, len(row.ids))[is_target[start:]]
        labels = torch.tensor(row.ids)[places]
        scores, others = (_log_probabilities(model, row.ids, start, places) for model in (reference, other))
        hits = [int((values.argmax(dim=-1) == labels).sum()) for values in (scores, others)]
        likelihoods = [float(values.gather(1, labels[:, None]).sum()) for values in (scores, others)]
        divergence = float((scores.exp() * (scores - others)).sum())
        yield RowComparison(len(labels), divergence, likelihoods[1] - likelihoods[0], hits[1] - hits[0])


def _log_probabilities(model: Any, ids: Sequence[int], start: int, places: Tensor) -> Tensor:
    """Log-probabilities of all tokens at `places`, float32 (places, vocabulary)."""
    if model.config.is_encoder_decoder:
        begin = [model.config.decoder_start_token_id, *ids[start:-1]]
        inputs = {"input_ids": torch.tensor([ids[:start]]), "decoder_input_ids": torch.tensor([begin])}
        logits = model(**inputs, use_cache=False).logits[0][places - start]
    else:  # virtual tokens may stand before the row
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) :][places - 1]
    return torch.log_softmax(logits.float(), dim=-1)
