"""Rows for encoder-decoders made by hand, and a plain reference that trains on the same examples one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from apprentice.train.batch import PackedRows
from tests.train.rows import examples_of, packed_rows

TARGET_LENGTH = 20


def paired_rows(count: int) -> PackedRows:
    """The rows of `packed_rows`, with the answers moved to a side of their own; padding in both."""
    one_sided = packed_rows(count)
    prompts, answers = (np.zeros((3, count, size), np.int32) for size in (one_sided.input_ids.shape[1], TARGET_LENGTH))
    for row in range(count):
        at, answer_start = 0, 0
        for segment in range(1, int(one_sided.segment_ids[row].max()) + 1):
            here = one_sided.segment_ids[row] == segment
            prompt_mask = here & (one_sided.loss_mask[row] == 0)
            answer_mask = here & (one_sided.loss_mask[row] == 1)
            for side, mask, start in ((prompts, prompt_mask, at), (answers, answer_mask, answer_start)):
                part = slice(start, start + int(mask.sum()))
                side[0, row, part] = one_sided.input_ids[row][mask]
                side[1, row, part] = np.arange(mask.sum())
                side[2, row, part] = segment
            at, answer_start = at + int(prompt_mask.sum()), answer_start + int(answer_mask.sum())
    return replace(
        one_sided,
        input_ids=prompts[0],
        positions=prompts[1],
        segment_ids=prompts[2],
        loss_mask=(answers[2] > 0).astype(np.uint8),
        target_ids=answers[0],
        target_positions=answers[1],
        target_segment_ids=answers[2],
    )


def unpacked(rows: PackedRows) -> list[PackedRows]:
    """Every example in a row of its own, one-sided rows cut to its tokens."""
    rows_of_sides = []
    for row in range(len(rows)):
        for segment in range(1, int(rows.segment_ids[row].max()) + 1):
            here = rows.segment_ids[row] == segment
            target_here = here if rows.target_segment_ids is None else rows.target_segment_ids[row] == segment
            cut: dict[str, Any] = {name: getattr(rows, name)[row][here][None] for name in ("input_ids", "positions")}
            cut["segment_ids"] = np.ones_like(cut["input_ids"])
            cut["loss_mask"] = rows.loss_mask[row][target_here][None]
            if rows.target_ids is not None and rows.target_positions is not None:
                cut["target_ids"] = rows.target_ids[row][target_here][None]
                cut["target_positions"] = rows.target_positions[row][target_here][None]
                cut["target_segment_ids"] = np.ones_like(cut["target_ids"])
            rows_of_sides.append(PackedRows(**cut, facts=[rows.facts[row]]))
    return rows_of_sides


def reference_nll(model: Any, rows: PackedRows) -> torch.Tensor:
    """The sum over target tokens, each example in transformers' own forward pass with labels."""
    total = torch.zeros(())
    for ids, mask in examples_of(packed_rows(len(rows))):
        prompt, answer = ids[~mask][None], ids[mask][None]
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        decoder = torch.cat([start, answer[:, :-1]], dim=1)
        logits = model(input_ids=prompt, decoder_input_ids=decoder, use_cache=False).logits[0]
        total = total + F.cross_entropy(logits.float(), answer[0], reduction="sum")
    return total


def joined(rows: list[PackedRows]) -> PackedRows:
    """Rows of different lengths as one table, padded behind."""
    names = [name for name, value in vars(rows[0]).items() if name != "facts" and value is not None]
    tables = {}
    for name in names:
        parts = [getattr(part, name)[0] for part in rows]
        table = np.zeros((len(parts), max(map(len, parts))), parts[0].dtype)
        for place, part in enumerate(parts):
            table[place, : len(part)] = part
        tables[name] = table
    return PackedRows(**tables, facts=[fact for part in rows for fact in part.facts])
