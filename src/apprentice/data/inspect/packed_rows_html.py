"""HTML page of packed rows: prompt, answer, padding and the segments that share a row, in colours.

All texts are decoded from the arrays that training gets, so that the page shows what the model sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np

from apprentice.data.corpus import Corpus
from apprentice.data.packing import Rows
from apprentice.data.window import WindowRenderer

_HUES = (210, 28, 275, 165, 340, 55, 190, 300)  # of the segments in turn
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1f2933;background:#fff}"
    "h2{font-size:1rem;margin:2.2rem 0 .4rem}small{color:#52606d}"
    ".bar{display:flex;height:1.1rem;margin:.15rem 0;border-radius:.2rem;overflow:hidden}"
    ".bar i{display:block;background:hsl(var(--h) 60% 82%)}.bar i.a{background:hsl(var(--h) 65% 45%)}"
    ".bar i.p,.key .p{background:repeating-linear-gradient(45deg,#e4e7eb 0 4px,#f5f7fa 4px 8px)}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;padding:.5rem .8rem;background:hsl(var(--h) 60% 96%);"
    "border-left:.35rem solid hsl(var(--h) 60% 60%)}pre b{font-weight:600;color:#fff;background:hsl(var(--h) 65% 40%);"
    "border-radius:.2rem;padding:0 .1rem}pre.p{border-left:.35rem solid #cbd2d9;color:#52606d;background:repeating-linear-gradient("
    "45deg,#e4e7eb 0 4px,#f5f7fa 4px 8px)}section{margin:.5rem 0}.key span{display:inline-block;padding:0 .5rem;margin-right:.6rem;"
    "border-radius:.2rem}"
)


@dataclass(frozen=True)
class SegmentView:
    """One example of a row; `parts` are (text, number of tokens, trained on) in order."""

    heading: str
    parts: tuple[tuple[str, int, bool], ...]


@dataclass(frozen=True)
class RowView:
    """One packed row; `sides` are (name, length, tokens without padding) of its one or two sides."""

    window: int
    row: int
    segments: tuple[SegmentView, ...]
    sides: tuple[tuple[str, int, int], ...]


def rows_of(corpus: Corpus, number: int) -> list[RowView]:
    """The first `number` packed rows of the stream; fewer if ten windows have fewer."""
    renderer, views = WindowRenderer(corpus), list[RowView]()
    for window in range(10):
        rows = renderer.window(window)
        views += [_view(corpus, rows, place) for place in range(min(len(rows["row"]), number - len(views)))]
        if len(views) == number:
            break
    return views


def to_html(rows: Sequence[RowView]) -> str:
    """A self-contained HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Packed rows</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>Packed rows</h1>"
        '<p class="key">Each colour is one example, which sees no other. '
        '<span style="background:hsl(210 60% 82%)">prompt</span>'
        '<span style="background:hsl(210 65% 40%);color:#fff">answer, trained on</span><span class="p">padding</span></p>'
        f"{''.join(_article(row) for row in rows)}</body></html>\n"
    )


def _first_segments(corpus: Corpus, rows: Rows, place: int) -> list[int]:
    """The first segment of each example of a row, and one more; a pair is two segments, and a conversation may be several."""
    trained = rows["loss_mask"][place] > 0
    owners = rows["segment_ids" if corpus.target_length is None else "target_segment_ids"][place]
    counts = np.bincount(owners[trained], minlength=1)[1:]  # targets of each segment
    firsts, segment = [1], 0
    for targets in rows["example_targets"][place].tolist():
        while targets > 0 and segment < len(counts):
            targets -= int(counts[segment])
            segment += 1
        firsts.append(segment + 1)
    return firsts


def _view(corpus: Corpus, rows: Rows, place: int) -> RowView:
    sides_of = (
        [("input_ids", "segment_ids")]
        if corpus.target_length is None
        else [
            ("input_ids", "segment_ids"),
            ("target_ids", "target_segment_ids"),
        ]
    )
    segments = []
    firsts = _first_segments(corpus, rows, place)
    for number, position in enumerate(rows["examples"][place].tolist(), start=1):
        parts: list[tuple[str, int, bool]] = []
        for ids, owners in sides_of:
            here = (rows[owners][place] >= firsts[number - 1]) & (rows[owners][place] < firsts[number])
            apart = owners == "segment_ids" and len(sides_of) == 2  # an encoder's side, which has no loss mask
            mask = np.zeros(int(here.sum())) if apart else rows["loss_mask"][place][here]
            parts += _parts(corpus, rows[ids][place][here].tolist(), mask.tolist())
        [drawn] = corpus.plan.draws(position, position + 1)
        shots = f", {len(drawn.shots)} exemplars drawn" if drawn.shots else ""
        heading = f"{position}: {drawn.task} · {drawn.template} · {drawn.format.replace('_', '-')} · row {drawn.row}{shots}"
        segments.append(SegmentView(heading, tuple(parts)))
    names = ("row",) if len(sides_of) == 1 else ("encoder", "decoder")
    sides = tuple(
        (name, rows[owners].shape[1], int((rows[owners][place] > 0).sum()))
        for name, (_, owners) in zip(names, sides_of, strict=True)
    )
    return RowView(int(rows["window"][place]), int(rows["row"][place]), tuple(segments), sides)


def _parts(corpus: Corpus, ids: Sequence[int], mask: Sequence[float]) -> Iterator[tuple[str, int, bool]]:
    place = 0
    for trained, run in groupby(mask):
        length = len(list(run))
        yield corpus.layout.tokenizer.decode(ids[place : place + length], skip_special=False), length, bool(trained)
        place += length


def _article(row: RowView) -> str:
    filled = ", ".join(f"{name} {real} of {length} tokens" for name, length, real in row.sides)
    bars = "".join(_bar(row, number) for number in range(len(row.sides)))
    return f"<h2>window {row.window}, row {row.row}</h2><small>{filled}</small>{bars}{''.join(_texts(row))}"


def _bar(row: RowView, side: int) -> str:
    """A bar of one side of the row, each part as wide as its share of the tokens."""
    _, length, real = row.sides[side]
    pieces = []
    for number, segment in enumerate(row.segments):
        for _, tokens, trained in segment.parts:
            if len(row.sides) == 1 or trained == bool(side):
                pieces.append((tokens, "a" if trained else "", f"--h:{_HUES[number % len(_HUES)]};"))
    pieces.append((length - real, "p", ""))
    return f"""<div class="bar">{
        "".join(f'<i class="{kind}" style="{hue}width:{100 * tokens / length:.3f}%"></i>' for tokens, kind, hue in pieces)
    }</div>"""


def _texts(row: RowView) -> Iterator[str]:
    for number, segment in enumerate(row.segments):
        text = "".join(f"<b>{escape(part)}</b>" if trained else escape(part) for part, _, trained in segment.parts)
        hue = _HUES[number % len(_HUES)]
        yield f'<section style="--h:{hue}"><small>{escape(segment.heading)}</small><pre>{text}</pre></section>'
    padding = sum(length - real for _, length, real in row.sides)
    if padding:
        yield f'<section><pre class="p">{padding} tokens of padding</pre></section>'
