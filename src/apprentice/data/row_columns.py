"""Packed rows of a corpus: assigns tokenized examples to rows, and builds the rows' columns.

The columns of packed rows are NumPy arrays with one entry a row. A causal model (`Corpus.family`) reads prompt and answer
as one sequence:

    input_ids        int32 (length,)    padded with the tokenizer's padding id
    positions        int32 (length,)    restarting at 0 with every example and with the padding
    segment_ids      int32 (length,)    1, 2, … and 0 for padding
    loss_mask        uint8 (length,)    1 on the tokens that are trained on: answer and end

For an encoder-decoder the same three columns hold the prompts (with the end tokens that its tokenizer adds), and the answers
have columns of their own. `length` is `Corpus.row_length` and `target_length` is `Corpus.target_length`:

    input_ids, positions, segment_ids       int32 (length,)         the encoder's side
    target_ids                              int32 (target_length,)  answers and ends: the labels, not shifted, padded as above
    target_positions, target_segment_ids    int32 (target_length,)  an example has the same segment number on both sides
    loss_mask                               uint8 (target_length,)  1 on answers and ends; a target is never an input of itself

The decoder's input ids are `packing.decoder_inputs(target_ids, target_positions, start_id)`. Attention stays inside equal
segment numbers: encoder to encoder, decoder to earlier decoder, decoder to encoder; 0 is padding.

A preference pair is two segments of a causal model in one row, the better answer before the worse one: segments 1 and 2 are
the first pair, 3 and 4 the second. Such rows have one column more:

    reference        float32 (any,)     log-probabilities of the answers by the reference model, two a pair; zeros without one

A labelled answer (`kto`) is such a pair too, whose second answer is another row's, and has a column more:

    desirable        uint8 (any,)       1 for a desirable answer, one an example

A conversation whose prompts change between its turns is several segments in one row, one behind another.

With a teacher (`distill`) rows have what it makes of each of their target tokens, in order:

    teacher_ids        int32 (any,)     the likeliest k tokens, k numbers a target
    teacher_log_probs  float32 (any,)   their log-probabilities and that of all other tokens together, k + 1 numbers a target

Where the recipe names classes of mixed-quality data (`data.qualities`), there is one more column:

    example_weights  float32 (any,)     weight in the loss of each segment's target tokens

All rows have these columns, in which a pair counts as one example:

    window, row      int64, int32       number of the window, and of the row in it
    window_rows      int32              number of rows of the window
    examples         int64 (any,)       plan positions of the row's examples, in row order
    example_tasks    int32 (any,)       number of each example's task in `Corpus.tasks`
    example_targets  int32 (any,)       number of each example's tokens that are trained on
    dropped          str                on row 0 of a window, JSON: task → reason → number of examples dropped or cut; else empty
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.tokenize import Tokenized
from apprentice.data.example_reader import DropCounts, TokenizedDraw
from apprentice.data.packing import Rows, build_encoder_decoder_rows, build_rows, pack, pack_two_sided
from apprentice.data.reference import TeacherLogProbs
from apprentice.errors import DataError


def assign_rows(corpus: Corpus, examples: Sequence[TokenizedDraw]) -> list[list[int]]:
    """Indices of `examples` for each packed row, by the packing strategy of the corpus."""
    if corpus.target_length is None:
        return pack([example.tokens.size for example in examples], corpus.row_length, corpus.strategy)
    sizes = [(example.tokens.prompt_length, len(example.tokens.ids) - example.tokens.prompt_length) for example in examples]
    return pack_two_sided(sizes, (corpus.row_length, corpus.target_length), corpus.strategy)


def row_share(corpus: Corpus, example: TokenizedDraw) -> int:
    """Tokens of a row's `row_length` that an example takes; of two sides, the one that takes the larger part of its side."""
    if corpus.strategy == "none":
        return corpus.row_length
    if corpus.target_length is None:
        return example.tokens.size
    targets = len(example.tokens.ids) - example.tokens.prompt_length
    return max(example.tokens.prompt_length, -(-targets * corpus.row_length // corpus.target_length))


def build_columns(
    corpus: Corpus,
    examples: Sequence[TokenizedDraw],
    rows: Sequence[Sequence[int]],
    window: int = 0,
    counts: DropCounts | None = None,
) -> Rows:
    """The columns (see above) of the packed rows `rows` of `examples`; `counts` are the drops of their window."""
    columns = _token_columns(corpus, examples, rows) | _example_columns(corpus, examples, rows)
    if corpus.teacher is not None:
        columns |= _teacher_columns(corpus, corpus.teacher, examples, rows)
    columns["window"] = np.full(len(rows), window, np.int64)
    columns["row"] = np.arange(len(rows), dtype=np.int32)
    columns["window_rows"] = np.full(len(rows), len(rows), np.int32)
    columns["dropped"] = np.full(len(rows), "", object)
    if counts and rows:
        columns["dropped"][0] = json.dumps({task: dict(counts[task]) for task in sorted(counts)})
    return columns


def _token_columns(corpus: Corpus, examples: Sequence[TokenizedDraw], rows: Sequence[Sequence[int]]) -> Rows:
    """The columns with an entry for each token. Raises `DataError` for a conversation whose parts would see each other."""
    if corpus.strategy == "none" or corpus.target_length is not None:
        for example in examples:
            if example.tokens.others:
                raise DataError(
                    f"row {example.row} of {corpus.tasks[example.task].name} is a conversation whose prompts change between turns,"
                    " and its parts would see each other in a row that is not packed; use a causal model that packs, with"
                    " tuning.method full, lora, qlora or adapter, and leave data.packing.strategy at `auto`."
                )
    texts = [answer for example in examples for answer in example.tokens.answers]
    lengths = _int64(len(text.ids) for text in texts)
    prompts = _int64(text.prompt_length for text in texts)
    ids = np.fromiter(chain.from_iterable(text.ids for text in texts), np.int32, int(lengths.sum()))
    pad_id = corpus.layout.tokenizer.pad_id
    if corpus.target_length is not None:
        return build_encoder_decoder_rows(ids, lengths, prompts, rows, (corpus.row_length, corpus.target_length), pad_id)
    firsts = [0, *accumulate(len(example.tokens.answers) for example in examples)]
    segments = [[segment for place in row for segment in range(firsts[place], firsts[place + 1])] for row in rows]
    return build_rows(ids, lengths, prompts, segments, corpus.row_length, pad_id, _untrained_offsets(texts, lengths))


def _example_columns(corpus: Corpus, examples: Sequence[TokenizedDraw], rows: Sequence[Sequence[int]]) -> Rows:
    """The columns with an entry for each example."""
    order = _int64(chain.from_iterable(rows))
    values: dict[str, NDArray[Any]] = {
        "examples": _int64(example.number for example in examples)[order],
        "example_tasks": _int64(example.task for example in examples)[order].astype(np.int32),
        "example_targets": _int64(example.tokens.target_tokens for example in examples)[order].astype(np.int32),
    }
    if corpus.has_pairs:
        pairs = np.array([_reference_log_probs(corpus, example) for example in examples], np.float32)
        values["reference"] = pairs.reshape(-1, 2)[order]
    if corpus.recipe.training.aim.labels:
        values["desirable"] = np.array([example.tokens.is_desirable for example in examples], np.uint8)[order]
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    parts = {name: np.split(column, ends[:-1]) if rows else [] for name, column in values.items()}
    columns = {name: _ragged([part.reshape(-1) for part in column]) for name, column in parts.items()}
    if corpus.qualities:
        weights = [[_loss_weight(corpus, one)] * len(one.tokens.answers) for one in examples]
        by_row = [chain.from_iterable(weights[place] for place in row) for row in rows]
        columns["example_weights"] = _ragged([np.fromiter(row, np.float32) for row in by_row])
    return columns


def _teacher_columns(
    corpus: Corpus, teacher: Mapping[str, TeacherLogProbs], examples: Sequence[TokenizedDraw], rows: Sequence[Sequence[int]]
) -> Rows:
    """The teacher's columns. Raises `DataError` where it has read other targets than the rows have."""
    known = [teacher[corpus.tasks[example.task].name].of(example.row) for example in examples]
    for example, (ids, _) in zip(examples, known, strict=True):
        if len(ids) != example.tokens.target_tokens:
            raise DataError(f"the run's folder `reference` has other targets of row {example.row}; delete it, and train again.")
    by_row = [[np.concatenate([known[place][part].ravel() for place in row]) for row in rows] for part in (0, 1)]
    return {"teacher_ids": _ragged(by_row[0]), "teacher_log_probs": _ragged(by_row[1])}


def _loss_weight(corpus: Corpus, example: TokenizedDraw) -> float:
    """The loss weight of the quality class that the example's task belongs to."""
    qualities = corpus.recipe.data.qualities or {}
    return qualities[corpus.qualities[corpus.tasks[example.task].name]].weight


def _reference_log_probs(corpus: Corpus, example: TokenizedDraw) -> tuple[float, float]:
    """Log-probabilities of a pair's better and worse answer by the reference model; zeros without one."""
    if corpus.reference is None:
        return 0.0, 0.0
    return corpus.reference[corpus.tasks[example.task].name].of(example.row)


def _untrained_offsets(texts: Sequence[Tokenized], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets, in the concatenation of all examples, of a conversation's later questions: tokens that are not trained on."""
    starts = np.cumsum(lengths) - lengths
    parts = [
        np.arange(start + first, start + last)
        for start, text in zip(starts.tolist(), texts, strict=True)
        for first, last in text.untrained
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _int64(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _ragged(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """An object array with one array a row; `np.array` would build a 2-D array where all are equally long."""
    column = np.empty(len(parts), object)
    column[:] = parts
    return column
