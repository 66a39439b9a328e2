"""A window of packed rows: every position once, independent of other windows, counted where something is dropped or cut."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.render import Renderer
from apprentice.data.encoding.tokenize import encode
from apprentice.data.packing import Rows
from apprentice.data.row_columns import build_columns
from apprentice.data.stream import empty_window_drops
from apprentice.data.window import WindowRenderer
from apprentice.errors import DataError
from tests.data.small import CorpusOf

SHAPES = {"input_ids": "int32", "positions": "int32", "segment_ids": "int32", "loss_mask": "uint8"}


def same(one: Rows, other: Rows) -> bool:
    assert one.keys() == other.keys()
    return all(len(one[name]) == len(other[name]) and all(map(np.array_equal, one[name], other[name])) for name in one)


def examples_in(rows: Rows) -> dict[int, tuple[list[int], list[int], int, int]]:
    """Position → (ids, mask, task, targets) as the rows hold them."""
    examples = {}
    for number in range(len(rows["row"])):
        labels = zip(rows["examples"][number], rows["example_tasks"][number], rows["example_targets"][number], strict=True)
        for segment, (position, task, targets) in enumerate(labels, start=1):
            here = rows["segment_ids"][number] == segment
            ids, mask = rows["input_ids"][number, here], rows["loss_mask"][number, here]
            examples[int(position)] = (ids.tolist(), mask.tolist(), int(task), int(targets))
    return examples


def test_every_position_of_the_plan_once_and_whole(corpus: Corpus) -> None:
    draws = corpus.plan.draws(64, 96)
    expected = encode(corpus.layout, [Renderer(corpus.tasks, corpus.indices).render_draw(draw) for draw in draws], 200)
    rows = WindowRenderer(corpus).window(2)
    examples = examples_in(rows)
    assert sorted(examples) == list(range(64, 96))
    numbers = {task.name: number for number, task in enumerate(corpus.tasks)}
    for draw, tokens in zip(draws, expected, strict=True):
        assert tokens is not None
        targets = len(tokens.ids) - tokens.prompt_length
        mask = [0] * tokens.prompt_length + [1] * targets
        assert examples[draw.position] == (tokens.ids, mask, numbers[draw.task], targets)
    assert len(rows["row"]) < 32
    assert rows["window"].tolist() == [2] * len(rows["row"])
    assert rows["row"].tolist() == list(range(len(rows["row"])))
    assert {name: (rows[name].dtype.name, rows[name].shape) for name in SHAPES} == {
        name: (kind, (len(rows["row"]), 256)) for name, kind in SHAPES.items()
    }


def test_a_window_does_not_depend_on_what_came_before(corpus: Corpus) -> None:
    used = WindowRenderer(corpus)
    in_turn = [used.window(number) for number in range(4)]
    for number in (3, 1, 0):
        assert same(WindowRenderer(corpus).window(number), in_turn[number])
    assert not same(in_turn[0], in_turn[1])


def test_the_end_of_every_answer_is_trained_on_even_if_it_pads(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    end = corpus.layout.tokenizer.end_id
    monkeypatch.setattr(type(corpus.layout.tokenizer), "pad_id", end)
    rows = WindowRenderer(corpus).window(0)
    padding = rows["segment_ids"] == 0
    assert padding.any()
    assert (rows["input_ids"][padding] == end).all()
    assert not rows["loss_mask"][padding].any()
    ends = [(ids[-1], mask[-1]) for ids, mask, _, _ in examples_in(rows).values()]
    assert ends == [(end, 1)] * 32


def test_rows_are_not_sorted_by_the_length_of_their_examples(corpus_of: CorpusOf) -> None:
    rows = WindowRenderer(corpus_of(window=128)).window(0)
    longest = [int(np.bincount(row[row > 0]).max()) for row in rows["segment_ids"]]
    assert len(longest) > 20
    assert longest != sorted(longest, reverse=True)


def test_without_packing_a_row_is_an_example(corpus_of: CorpusOf) -> None:
    rows = WindowRenderer(corpus_of(packing={"length": 256, "strategy": "none"})).window(0)
    assert rows["input_ids"].shape == (32, 200)
    assert sorted(int(examples[0]) for examples in rows["examples"]) == list(range(32))
    assert rows["segment_ids"].max() == 1
    lengths = (rows["segment_ids"] > 0).sum(axis=1).tolist()
    groups = [lengths[start : start + 4] for start in range(0, 32, 4)]  # of a global batch
    assert [length for group in sorted(groups) for length in group] == sorted(lengths)  # like lengths come together
    assert groups != sorted(groups)  # and the groups in no order of length


@pytest.mark.parametrize("strategy", ["best_fit", "greedy", "none"])
def test_an_encoder_decoder_has_prompts_and_answers_apart(pairs_of: CorpusOf, strategy: str) -> None:
    corpus = pairs_of(packing={"length": 256, "target_length": 40, "strategy": strategy})
    assert (corpus.family, corpus.strategy, corpus.target_length) == ("seq2seq", strategy, 40)
    draws = corpus.plan.draws(32, 64)
    rendered = [Renderer(corpus.tasks, corpus.indices).render_draw(draw) for draw in draws]
    encoded = zip(draws, encode(corpus.layout, rendered, 200, 40), strict=True)
    expected = {draw.position: tokens for draw, tokens in encoded if tokens is not None}
    rows = WindowRenderer(corpus).window(1)
    length = 200 if strategy == "none" else 256
    assert rows["input_ids"].shape == rows["positions"].shape == rows["segment_ids"].shape == (len(rows["row"]), length)
    assert rows["target_ids"].shape == rows["target_segment_ids"].shape == rows["loss_mask"].shape == (len(rows["row"]), 40)
    segment_of = {}
    for number in range(len(rows["row"])):
        for segment, position in enumerate(rows["examples"][number].tolist(), start=1):
            prompt = rows["input_ids"][number, rows["segment_ids"][number] == segment].tolist()
            answer = rows["target_ids"][number, rows["target_segment_ids"][number] == segment].tolist()
            tokens = expected[position]
            assert (prompt, answer) == (tokens.ids[: tokens.prompt_length], tokens.ids[tokens.prompt_length :])
            assert prompt[-1] == answer[-1] == 2  # both sides end as texts do
            assert rows["example_targets"][number][segment - 1] == len(answer)
            segment_of[position] = segment
    assert sorted(segment_of) == sorted(expected)
    assert len(segment_of) > 25
    assert np.array_equal(rows["loss_mask"] > 0, rows["target_segment_ids"] > 0)
    assert (max(segment_of.values()) > 1) == (strategy != "none")


def test_an_answer_that_its_side_cannot_hold_is_dropped(pairs_of: CorpusOf) -> None:
    rows = WindowRenderer(pairs_of(packing={"length": 256, "target_length": 4})).window(0)
    kept = sum(len(examples) for examples in rows["examples"])
    assert 0 < kept < 32
    assert sum(counts["too_long"] for counts in json.loads(rows["dropped"][0]).values()) == 32 - kept
    assert max(targets.max() for targets in rows["example_targets"]) <= 4


def test_validation_rows_of_an_encoder_decoder(pairs_of: CorpusOf) -> None:
    renderer = WindowRenderer(pairs_of(packing={"length": 256, "target_length": 40}))
    assert 0 < len(renderer.validation(1)["row"]) <= 1
    whole = renderer.validation(1000)
    assert sum(len(examples) for examples in whole["examples"]) == sum(
        len(index.validation) for index in renderer.corpus.indices.values()
    )


def test_what_is_cut_and_dropped_is_counted_on_the_first_row(corpus_of: CorpusOf) -> None:
    corpus = corpus_of(max_length=60, window=128)
    rows = WindowRenderer(corpus).window(0)
    counted: dict[str, dict[str, int]] = json.loads(rows["dropped"][0])
    assert set(rows["dropped"][1:]) == {""}
    draws = corpus.plan.draws(0, 128)
    expected: dict[str, dict[str, int]] = {}
    renderer = Renderer(corpus.tasks, corpus.indices)
    for draw, tokens in zip(draws, encode(corpus.layout, [renderer.render_draw(draw) for draw in draws], 60), strict=True):
        if reason := "too_long" if tokens is None else tokens.truncated:
            counts = expected.setdefault(draw.task, {})
            counts[reason] = counts.get(reason, 0) + 1
    assert counted == expected
    assert set(counted["sums"]) == {"truncated_input", "truncated_exemplars", "too_long"}
    missing = sum(reasons.get("too_long", 0) for reasons in counted.values())
    assert sum(len(examples) for examples in rows["examples"]) == 128 - missing


def test_what_a_window_without_rows_dropped_is_counted(corpus: Corpus, corpus_of: CorpusOf) -> None:
    short = corpus_of(max_length=10)
    counts = WindowRenderer(short).empty_window_drops(1)
    tasks = [draw.task for draw in short.plan.draws(32, 64)]
    assert counts == {task: {"too_long": tasks.count(task)} for task in set(tasks)}
    assert empty_window_drops(short, 1) == counts
    assert empty_window_drops(corpus, 1) is None


def test_a_window_of_which_nothing_fits_has_no_rows(corpus_of: CorpusOf) -> None:
    rows = WindowRenderer(corpus_of(max_length=10)).window(0)
    assert {len(column) for column in rows.values()} == {0}
    assert rows["input_ids"].shape == (0, 256)


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_validation_rows(corpus: Corpus, limit: int) -> None:
    rows = WindowRenderer(corpus).validation(limit)
    assert same(rows, WindowRenderer(corpus).validation(limit))
    assert 0 < len(rows["row"]) <= limit
    shown = [(corpus.tasks[task].name, int(row)) for row, (_, _, task, _) in _labelled(rows)]
    held_back = {(name, int(row)) for name, index in corpus.indices.items() for row in index.validation}
    assert len(set(shown)) == len(shown)
    assert set(shown) <= held_back
    if limit == 1000:
        assert set(shown) == held_back
    else:
        assert (rows["segment_ids"] > 0).mean() > 0.6
    assert set(rows["dropped"]) == {""}


def _labelled(rows: Rows) -> list[tuple[int, tuple[Any, Any, int, int]]]:
    """(source row, the rest) of every example; row numbers may repeat between tasks."""
    return [
        (int(row), (None, None, int(task), int(targets)))
        for number in range(len(rows["row"]))
        for row, task, targets in zip(
            rows["examples"][number], rows["example_tasks"][number], rows["example_targets"][number], strict=True
        )
    ]


def test_no_validation_rows(corpus_of: CorpusOf) -> None:
    assert len(WindowRenderer(corpus_of(validation=0.0)).validation(8)["row"]) == 0


def ids_in(rows: Rows) -> list[list[int]]:
    """The token ids of every example."""
    return [
        ids[segments == segment].tolist()
        for ids, segments in zip(rows["input_ids"], rows["segment_ids"], strict=True)
        for segment in range(1, int(segments.max()) + 1)
    ]


def test_a_probe_is_short_and_the_same_again(corpus: Corpus) -> None:
    probe = WindowRenderer(corpus).probe(1)
    assert probe.rows == "validation"
    assert 1 <= len(probe.examples) <= 8
    assert sum(example.size for example in probe.examples) <= 512
    assert probe == WindowRenderer(corpus).probe(3)
    held_back = ids_in(WindowRenderer(corpus).validation(1000))
    assert all(example.ids in held_back for example in probe.examples)


def test_a_run_without_validation_is_probed_by_its_training(corpus_of: CorpusOf) -> None:
    corpus = corpus_of(validation=0.0)
    probe = WindowRenderer(corpus).probe(1)
    assert probe.rows == "training"
    trained = ids_in(WindowRenderer(corpus).window(0))
    assert all(example.ids in trained for example in probe.examples)


def test_no_row_to_probe(corpus_of: CorpusOf) -> None:
    with pytest.raises(DataError, match="cannot be checked"):
        WindowRenderer(corpus_of(max_length=10)).probe(2)


def test_one_long_example_is_enough(corpus: Corpus) -> None:
    assert len(WindowRenderer(corpus).probe(1, most_tokens=1).examples) == 1


def test_parts_of_a_conversation_share_only_packed_rows(corpus: Corpus) -> None:
    [example] = WindowRenderer(corpus)._reader.read(corpus.plan.draws(0, 64))[0][:1]
    one = example._replace(tokens=replace(example.tokens, others=(example.tokens,)))
    assert sorted(set(build_columns(corpus, [one], [[0]])["segment_ids"][0])) == [0, 1, 2]
    with pytest.raises(DataError, match=r"is a conversation whose prompts change between turns, and its parts would see"):
        build_columns(replace(corpus, strategy="none"), [one], [[0]])
