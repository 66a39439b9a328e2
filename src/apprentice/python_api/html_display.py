"""HTML that notebooks show: self-contained, without scripts, and with every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "padding:.15rem .6rem;text-align:left;vertical-align:top"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers are shown with four significant digits, None as a dash."""
    head = "".join(f'<th style="{_CELL}">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f'<td style="{_CELL}">{escape(_text(cell))}</td>' for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_paragraph(text: str) -> str:
    """A paragraph that keeps its line breaks."""
    return f'<p style="white-space:pre-wrap;margin:.3rem 0">{escape(text)}</p>'


def html_heading(text: str) -> str:
    """A small heading."""
    return f"<strong>{escape(text)}</strong>"


def html_frame(page: str, *, height: int = 480) -> str:
    """A whole HTML page inside another, in a frame that runs no scripts and shares no styles; `height` in pixels."""
    style = f"width:100%;height:{height}px;border:1px solid #cbd2d9"
    return f'<iframe sandbox="" style="{style}" srcdoc="{escape(page, quote=True)}"></iframe>'


def _text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
