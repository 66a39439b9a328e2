"""FLOPs of a training step by what attention multiplies in packed rows: all pairs of a row's tokens, or those inside an example.

Counted by PyTorch on the meta device, where nothing is computed, so a CPU counts a model of any size in a few seconds:

    dense         length × length products in every row, masked afterwards: SDPA or eager attention with a mask
    per segment   an example's length × its length: one call of attention for each example, without a mask
    causal        half of that, the pairs that the model uses: varlen and flash kernels, which skip the others in blocks

`python -m benchmarks.training.flop_counts` prints the table of docs/results.md in JSON lines.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import claim_stdout, report

SHORTEST = 32  # tokens of an example
TERA = 1e12


class LlamaShape(NamedTuple):
    """Shape of a Llama model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def config(self) -> Any:
        """The model's configuration, with SDPA."""
        from transformers import LlamaConfig

        return LlamaConfig(**self._asdict(), tie_word_embeddings=False, attn_implementation="sdpa")


SHAPES = {"1.2B": LlamaShape(2048, 5632, 22, 32, 8, 49152), "8B": LlamaShape(4096, 14336, 32, 32, 8, 128256)}


class StepFlops(NamedTuple):
    """FLOPs of one pass forward and back: of the linear layers, and of attention in three ways."""

    linear: int
    dense: int
    per_segment: int
    causal: int


def example_lengths(rows: int, length: int, mean: int, seed: int = 0) -> list[list[int]]:
    """Lengths of the examples of full packed rows: log-normal around `mean` (σ = 0.8), at least `SHORTEST`; the last one fills up.

    With `mean` equal to `length`, each row is one example.
    """
    rng, packed = np.random.default_rng(seed), []
    for _ in range(rows):
        row: list[int] = []
        while (left := length - sum(row)) > 0:
            drawn = left if mean >= length else max(SHORTEST, int(rng.lognormal(np.log(mean) - 0.32, 0.8)))
            row.append(left if left - drawn < SHORTEST else drawn)
        packed.append(row)
    return packed


def causal_pairs(rows: Sequence[Sequence[int]]) -> int:
    """Pairs of a query and a key that it may see: 1 + 2 + … + n in an example of n tokens."""
    return sum(size * (size + 1) // 2 for row in rows for size in row)


def attention_flops(shape: LlamaShape, pairs: int) -> int:
    """FLOPs of attention, forward and back, over `pairs` of query and key: two products forward, four back; nothing made again."""
    return 3 * 2 * 2 * pairs * shape.hidden_size * shape.num_hidden_layers


def count_flops(shape: LlamaShape, rows: Sequence[Sequence[int]]) -> StepFlops:
    """FLOPs of one pass of full tuning over packed rows, given as their examples' lengths; all rows have the same length."""
    linear, dense = _counted(shape, rows, F.scaled_dot_product_attention)
    of_others, per_segment = _counted(shape, rows, _SegmentAttention(rows))
    assert linear == of_others
    return StepFlops(linear, dense, per_segment, attention_flops(shape, causal_pairs(rows)))


def _counted(shape: LlamaShape, rows: Sequence[Sequence[int]], attention: Any) -> tuple[int, int]:
    """FLOPs of matrix products outside and inside `attention`, which takes the place of SDPA; the latter are batched products."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        ids = torch.empty((len(rows), sum(rows[0])), dtype=torch.long)
        mask = torch.empty((len(rows), 1, ids.shape[1], ids.shape[1]), dtype=torch.bool)
        with patch.object(F, "scaled_dot_product_attention", attention), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    inside = sum(flops for operator, flops in counts.items() if operator in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    return counter.get_total_flops() - inside, inside


class _SegmentAttention:
    """Attention by one call for each example of each row."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._attention = F.scaled_dot_product_attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        outputs = []
        for number, row in enumerate(self._rows):
            parts = zip(*(tensor[number : number + 1].split(list(row), dim=2) for tensor in (query, key, value)), strict=True)
            outputs.append(torch.cat([self._attention(*part, **rest) for part in parts], dim=2))
        return torch.cat(outputs)


def main() -> None:
    for name, length in (("1.2B", 4096), ("8B", 8192), ("8B", 32768)):
        for mean in (length, 1024, 256):
            rows = example_lengths(1, length, mean)
            flops = count_flops(SHAPES[name], rows)
            report(
                "flops.dense_vs_causal",
                (flops.linear + flops.dense) / (flops.linear + flops.causal),
                unit="ratio",
                model=name,
                row=length,
                examples=len(rows[0]),
                linear_tflop=round(flops.linear / TERA, 2),
                dense_tflop=round(flops.dense / TERA, 2),
                per_segment_tflop=round(flops.per_segment / TERA, 3),
                causal_tflop=round(flops.causal / TERA, 3),
            )


if __name__ == "__main__":
    claim_stdout()
    main()
