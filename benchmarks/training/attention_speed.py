"""Attention of packed rows on CPUs: each example by itself against a mask over the row, in interleaved passes forward and back.

A causal model (SmolLM2-135M's shape) and T5 (Flan-T5-small's), random weights, full tuning, one thread; examples of lengths around
`--example` tokens fill the rows. Everything but the attention is the same on both sides.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
import transformers as hf

from apprentice.models.attention.segments import SEGMENTS, register_segments
from apprentice.models.attention.t5_segments import T5_SEGMENTS, register_t5_segments
from apprentice.models.loading import resolve_dtype
from apprentice.recipe import Training
from apprentice.train.batch import PackedRows, RowFacts
from apprentice.train.losses.loss_registry import create_loss
from benchmarks.figures import claim_stdout, compare

GOAL = 1.0


def causal_model() -> Any:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **sizes, **heads))


def t5_model() -> Any:
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=4096, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )


def segments_of(rows: int, length: int, example: int) -> Any:
    """Segment numbers and positions of full rows, each (rows, length)."""
    rng, tables = np.random.default_rng(0), np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        at, number = 0, 0
        while at < length:
            size = min(length - at, max(2, int(rng.lognormal(np.log(example), 0.4))))
            number += 1
            tables[0, row, at : at + size], tables[1, row, at : at + size] = number, np.arange(size)
            at += size
    return tables


def packed(rows: int, length: int, example: int, *, pair: bool) -> PackedRows:
    """Rows whose last quarter of tokens are targets; of pairs, answers of half an example."""
    segments, positions = segments_of(rows, length, example)
    ids = np.random.default_rng(1).integers(3, 4096, (rows, length)).astype(np.int32)
    facts = [RowFacts(0, row, [], [], [], {}) for row in range(rows)]
    if not pair:
        return PackedRows(ids, positions, segments, (np.arange(length) % 4 == 0)[None].repeat(rows, 0).astype(np.uint8), facts)
    halves = slice(None, None, 2)
    targets = {"target_ids": ids[:, halves], "target_segment_ids": segments[:, halves]}
    places = np.zeros_like(targets["target_segment_ids"])
    for row, numbers in enumerate(targets["target_segment_ids"]):
        starts = np.flatnonzero(np.diff(numbers, prepend=0))
        places[row] = np.arange(len(numbers)) - np.repeat(starts, np.diff(np.append(starts, len(numbers))))
    return PackedRows(ids, positions, segments, np.ones_like(places, np.uint8), facts, target_positions=places, **targets)


def speed(model: Any, attention: str, rows: PackedRows, passes: int) -> float:
    """Tokens in a second of the CPU's time, in passes forward and back; other processes hardly change it."""
    for module in model.modules():
        if isinstance(module, hf.PreTrainedModel):
            module.config._attn_implementation = attention
    loss, [batch] = create_loss(model, Training(steps=1)), rows.micro_batches(len(rows))
    loss(batch).backward()
    begin = time.process_time()
    for _ in range(passes):
        loss(batch).backward()
    return passes * rows.tokens / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--example", type=int, default=60)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register_segments()
    register_t5_segments()
    dtype = resolve_dtype("auto", "cpu")
    for kind, make, name in (("causal", causal_model, SEGMENTS), ("t5", t5_model, T5_SEGMENTS)):
        model = make().to(dtype).train()
        for length in arguments.lengths:
            rows = packed(arguments.rows, length, arguments.example, pair=kind == "t5")
            compare(
                f"training.{kind}_attention_vs_masks_{length}",
                lambda model=model, name=name, rows=rows: speed(model, name, rows, arguments.passes),
                "masks over whole rows",
                lambda model=model, rows=rows: speed(model, "sdpa", rows, arguments.passes),
                runs=arguments.runs,
                goal=GOAL,
            )


if __name__ == "__main__":
    claim_stdout()
    main()
