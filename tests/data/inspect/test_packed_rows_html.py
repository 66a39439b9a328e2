"""Packed rows on a page: what a row holds, to the last token."""

from __future__ import annotations

import re

import pytest

from apprentice.data.corpus import Corpus
from apprentice.data.inspect.packed_rows_html import RowView, SegmentView, rows_of, to_html
from apprentice.data.window import WindowRenderer
from tests.data.small import CorpusOf


def test_a_row_is_shown_whole(corpus: Corpus) -> None:
    rows, shown = WindowRenderer(corpus).window(0), rows_of(corpus, 3)
    assert [row.row for row in shown] == [0, 1, 2]
    decode = corpus.layout.tokenizer.decode
    for place, row in enumerate(shown):
        texts = "".join(text for segment in row.segments for text, _, _ in segment.parts)
        real = rows["segment_ids"][place] > 0
        assert texts == decode(rows["input_ids"][place][real].tolist(), skip_special=False)
        trained = sum(tokens for segment in row.segments for _, tokens, is_trained in segment.parts if is_trained)
        assert trained == rows["loss_mask"][place].sum()
        assert row.sides == (("row", 256, int(real.sum())),)
        assert len(row.segments) == len(rows["examples"][place]) > 1


def test_the_two_sides_of_an_encoder_decoder(pairs_of: CorpusOf) -> None:
    [row] = rows_of(pairs_of(packing={"length": 256, "target_length": 40}), 1)
    assert [(name, length) for name, length, _ in row.sides] == [("encoder", 256), ("decoder", 40)]
    for trained, (_, _, real) in zip((False, True), row.sides, strict=True):
        assert sum(tokens for one in row.segments for _, tokens, is_trained in one.parts if is_trained == trained) == real
    assert to_html([row]).count('class="bar"') == 2


def test_more_rows_than_one_window_has(corpus: Corpus) -> None:
    rows = rows_of(corpus, 30)
    assert len(rows) == 30
    assert {row.window for row in rows} > {0, 1}


def test_the_page_is_to_scale_and_escaped() -> None:
    segments = (
        SegmentView("0: sums", (("Add <b>.\n", 6, False), ("16</s>", 2, True))),
        SegmentView("1: sums", (("Go", 1, False),)),
    )
    page = to_html([RowView(0, 4, segments, (("row", 20, 9),))])
    assert page.startswith("<!doctype html>")
    assert "<pre>Add &lt;b&gt;.\n<b>16&lt;/s&gt;</b></pre>" in page
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", page)]
    assert widths == [30.0, 10.0, 5.0, 55.0]
    assert sum(widths) == pytest.approx(100)
    assert "11 tokens of padding" in page
