"""Sequence packing: assigns examples to rows of fixed length and builds the arrays of those rows.

Examples are never split. Inside a row every example is a segment of its own whose positions restart at 0, so that a
causal model keeps them apart. Examples of 3 and 2 tokens, with prompts of 2 and 1, in a row of 6:

    input_ids     11 12 13 21 22  0      0 is the padding id here
    positions      0  1  2  0  1  0
    segment_ids    1  1  1  2  2  0
    loss_mask      0  0  1  0  1  0      only answers are trained on

For an encoder-decoder a row has two sides, and an example has the same segment number on both.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = dict[str, NDArray[Any]]
Strategy = Literal["best_fit", "greedy", "none"]


def pack(lengths: Sequence[int], row_length: int, strategy: Strategy = "best_fit") -> list[list[int]]:
    """Assigns examples of these lengths (tokens) to rows of at most `row_length` tokens; each row is a list of indices.

    best_fit   best fit decreasing: longest first, each into the fullest row that still has room
    greedy     in order; a row is closed by the first example that it has no room for
    none       one example a row, in order

    Lengths [3, 5, 2] in rows of 5 give [[1], [0, 2]] by `best_fit`, and [[0], [1], [2]] by `greedy`. Raises `ValueError` for a
    length below 1 or above `row_length`.
    """
    _refuse_unfit(lengths, row_length)
    if strategy == "best_fit":
        return _best_fit(lengths, row_length)
    return _in_order(list(zip(lengths, strict=True)), (row_length if strategy == "greedy" else 0,))


def pack_two_sided(
    lengths: Sequence[tuple[int, int]], row_lengths: tuple[int, int], strategy: Strategy = "best_fit"
) -> list[list[int]]:
    """`pack` for examples of (encoder, decoder) lengths: an example goes into a row only if it fits on both sides.

    `best_fit` begins with the examples that take the largest part of a row on either side. Each goes into the row with the
    least room left, both sides added up as parts of a whole row. Raises `ValueError` as `pack` does.
    """
    for side, row_length in enumerate(row_lengths):
        _refuse_unfit([pair[side] for pair in lengths], row_length)
    if strategy == "best_fit":
        return _best_fit_two_sided(lengths, row_lengths)
    return _in_order(lengths, row_lengths if strategy == "greedy" else (0, 0))


def _refuse_unfit(lengths: Sequence[int], row_length: int) -> None:
    if any(not 0 < length <= row_length for length in lengths):
        raise ValueError(f"lengths must lie between 1 and {row_length}: {sorted(set(lengths))[-3:]}")


def _in_order(lengths: Sequence[tuple[int, ...]], row_lengths: tuple[int, ...]) -> list[list[int]]:
    rows: list[list[int]] = []
    room: tuple[int, ...] = (-1,)
    for index, sides in enumerate(lengths):
        room = tuple(left - length for left, length in zip(room, sides, strict=False))
        if min(room) < 0:
            room = tuple(whole - length for whole, length in zip(row_lengths, sides, strict=True))
            rows.append([])
        rows[-1].append(index)
    return rows


def _best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[int] = []  # distinct free lengths of open rows, ascending: at most `row_length` of them
    rows_with: dict[int, list[int]] = {}  # free length → the rows that have exactly this much
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place]
        rows[row].append(index)
        if room > length:
            left = rows_with.setdefault(room - length, [])
            if not left:
                insort(rooms, room - length)
            left.append(row)
    return rows


def _best_fit_two_sided(lengths: Sequence[tuple[int, int]], row_lengths: tuple[int, int]) -> list[list[int]]:
    sizes = np.array(lengths, np.int64).reshape(-1, 2)
    whole = np.array(row_lengths, np.int64)
    # Parts of a row are compared in units of 1 / (row_lengths[0] · row_lengths[1]): integers, so sums are exact.
    weights = whole[::-1]
    order = np.argsort(-(sizes * weights).max(axis=1), kind="stable")
    rooms = np.empty((len(lengths), 2), np.int64)
    rows: list[list[int]] = []
    for index in order.tolist():
        open_rooms = rooms[: len(rows)]
        fitting = np.flatnonzero((open_rooms >= sizes[index]).all(axis=1))
        if fitting.size:
            row = int(fitting[np.argmin((open_rooms[fitting] * weights).sum(axis=1))])
        else:
            row = len(rows)
            rows.append([])
            rooms[row] = whole
        rows[row].append(index)
        rooms[row] -= sizes[index]
    return rows


def build_rows(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int64],
    prompt_lengths: NDArray[np.int64],
    rows: Sequence[Sequence[int]],
    row_length: int,
    pad_id: int,
    untrained: NDArray[np.int64] | None = None,
) -> Rows:
    """Builds the arrays of packed rows.

    `ids` is the concatenation of all examples, (tokens,) int32; `lengths` and `prompt_lengths` are (examples,), in tokens; `rows`
    comes from `pack`, and a row in it may be empty. All tokens after an example's prompt are trained on, except those at the
    offsets `untrained` into `ids`. The result has four arrays of shape (rows, row_length):

    input_ids     int32, `pad_id` behind the last example
    positions     int32, restarting at 0 with every example and with the padding
    segment_ids   int32, 1, 2, … and 0 for padding: lengths [3, 2] in a row of 6 give [1, 1, 1, 2, 2, 0]
    loss_mask     uint8, 1 on the tokens that are trained on, by position: a padding or end id in an answer counts
    """
    side = _side(ids, np.cumsum(lengths) - lengths, lengths, rows, row_length, pad_id)
    in_prompt = np.zeros(side.ids.shape, np.int64)
    in_prompt.reshape(-1)[side.places] = prompt_lengths[side.examples]
    loss_mask = ((side.segments > 0) & (side.positions >= in_prompt)).astype(np.uint8)
    if untrained is not None and len(untrained):
        is_untrained = np.zeros(len(ids), np.int32)
        is_untrained[untrained] = 1
        loss_mask &= _side(is_untrained, np.cumsum(lengths) - lengths, lengths, rows, row_length, 0).ids == 0
    return {"input_ids": side.ids, "positions": side.positions, "segment_ids": side.segments, "loss_mask": loss_mask}


def build_encoder_decoder_rows(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int64],
    prompt_lengths: NDArray[np.int64],
    rows: Sequence[Sequence[int]],
    row_lengths: tuple[int, int],
    pad_id: int,
) -> Rows:
    """Builds the arrays of packed rows of an encoder-decoder; arguments and dtypes as for `build_rows`.

    `input_ids`, `positions` and `segment_ids` of shape (rows, row_lengths[0]) hold the prompts. `target_ids`, `target_positions`,
    `target_segment_ids` and `loss_mask` of shape (rows, row_lengths[1]) hold the answers.
    """
    starts = np.cumsum(lengths) - lengths
    prompts = _side(ids, starts, prompt_lengths, rows, row_lengths[0], pad_id)
    answers = _side(ids, starts + prompt_lengths, lengths - prompt_lengths, rows, row_lengths[1], pad_id)
    columns = {"input_ids": prompts.ids, "positions": prompts.positions, "segment_ids": prompts.segments}
    columns |= {"target_ids": answers.ids, "target_positions": answers.positions, "target_segment_ids": answers.segments}
    return columns | {"loss_mask": (answers.segments > 0).astype(np.uint8)}


def select_answers(tables: Rows, side: int) -> Rows:
    """The first (`side` 0) or the second (1) answer of every pair in packed rows, moved to the left of each row.

    `tables` are those of `build_rows`, where segments 1 and 2 of a row are the first pair: segments [1, 1, 2, 3, 4, 0] become
    [1, 1, 2, 0, 0, 0] on side 0 and [1, 2, 0, 0, 0, 0] on side 1. Padding has id 0.
    """
    segments = tables["segment_ids"]
    keep = (segments > 0) & ((segments - 1) % 2 == side)
    order = np.argsort(~keep, axis=1, kind="stable")
    moved = {name: np.take_along_axis(table, order, axis=1) for name, table in tables.items()}
    kept = np.take_along_axis(keep, order, axis=1)
    of_padding = np.arange(keep.shape[1]) - kept.sum(axis=1, keepdims=True)
    moved["segment_ids"] = (moved["segment_ids"] + 1) // 2
    return {name: np.where(kept, table, of_padding if name == "positions" else 0) for name, table in moved.items()}


def used_columns(segments: NDArray[Any], lengths: int | None = None) -> slice:
    """Columns up to the last one that is not padding in every row; at least one. With `lengths`, so many parts of all columns."""
    columns = np.flatnonzero((segments > 0).any(axis=0))
    used = int(columns[-1]) + 1 if len(columns) else 1
    if lengths is None:
        return slice(0, used)
    part = math.ceil(segments.shape[1] / lengths)
    return slice(0, min(segments.shape[1], math.ceil(used / part) * part))


class _Side(NamedTuple):
    """One side of packed rows; `ids`, `positions` and `segments` are (rows, row_length), the other two (tokens,)."""

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]
    places: NDArray[np.int64]  # offset of every real token in the flattened arrays
    examples: NDArray[np.int64]  # index of that token's example


def _side(
    ids: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    rows: Sequence[Sequence[int]],
    row_length: int,
    pad_id: int,
) -> _Side:
    """Copies `ids[start : start + length]` of every example into its place in `rows`."""
    order = np.fromiter((index for row in rows for index in row), np.int64)
    counts = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    packed = lengths[order]
    row_of = np.repeat(np.arange(len(rows)), counts)
    first_of_row = np.cumsum(counts) - counts
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(packed)])  # ends[k]: tokens of the first k examples in packed order
    before, before_row = ends[:-1], ends[first_of_row]
    used = ends[first_of_row + counts] - before_row  # tokens of each row; 0 for a row without examples
    place_in_row = before - np.repeat(before_row, counts)
    segment = np.arange(len(order)) - np.repeat(first_of_row, counts) + 1

    within = np.arange(int(packed.sum())) - np.repeat(before, packed)  # each token's offset in its example
    source = np.repeat(starts[order], packed) + within
    places = np.repeat(row_of * row_length + place_in_row, packed) + within

    shape = (len(rows), row_length)
    laid = np.full(shape, pad_id, np.int32)
    positions = np.maximum(np.arange(row_length, dtype=np.int32) - used[:, None].astype(np.int32), 0)
    segments = np.zeros(shape, np.int32)
    laid.reshape(-1)[places] = ids[source]
    positions.reshape(-1)[places] = within
    segments.reshape(-1)[places] = np.repeat(segment, packed)
    return _Side(laid, positions, segments, places, np.repeat(order, packed))


def decoder_inputs(target_ids: NDArray[Any], target_positions: NDArray[Any], start_id: int) -> NDArray[Any]:
    """The decoder's input ids for the labels `target_ids`: shifted right by one within each example, led by `start_id`.

    Target ids [7, 8, 2, 9, 2] at positions [0, 1, 2, 0, 1] give [start, 7, 8, start, 9]. All arrays are (rows, target_length).
    """
    shifted = np.roll(target_ids, 1, axis=-1)
    shifted[target_positions == 0] = start_id
    return shifted
