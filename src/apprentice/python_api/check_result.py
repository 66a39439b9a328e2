"""Results to look at: the findings of `Recipe.check`, and previews of examples and packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from apprentice.data.inspect.preview import ExamplePreview
from apprentice.preflight.check import Finding
from apprentice.python_api.html_display import html_frame, html_heading, html_paragraph, html_table


@dataclass(frozen=True)
class CheckResult:
    """The findings of a check, in the order in which a person would correct them; iterating gives each `Finding`.

    A finding has `subject`, `ok` and `message`, one sentence.
    """

    findings: tuple[Finding, ...]

    @property
    def is_ready(self) -> bool:
        """True if every check passed."""
        return all(finding.ok for finding in self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        lines = [f"{_mark(finding)} {finding.subject:<10} {finding.message}" for finding in self.findings]
        return "\n".join([*lines, "ready" if self.is_ready else "not ready"])

    def _repr_html_(self) -> str:
        rows = [(_mark(finding), finding.subject, finding.message) for finding in self.findings]
        return html_heading("ready" if self.is_ready else "not ready") + html_table(["", "subject", "finding"], rows)


def _mark(finding: Finding) -> str:
    return "ok" if finding.ok else "NO"


@dataclass(frozen=True)
class PreviewList:
    """Examples as the model will see them; iterating gives each `ExamplePreview`.

    A preview has `task`, `template`, `prompt` and `trained` (text, special tokens included), `tokens` and `target_tokens`.
    """

    examples: tuple[ExamplePreview, ...]

    def __iter__(self) -> Iterator[ExamplePreview]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> ExamplePreview:
        return self.examples[number]

    def __str__(self) -> str:
        from apprentice.data.inspect.preview import to_text

        return to_text(self.examples).plain

    def _repr_html_(self) -> str:
        return "".join(
            f"{html_heading(item.heading)}{html_paragraph(item.details)}"
            f'<pre style="white-space:pre-wrap">{escape(item.prompt)}<mark>{escape(item.trained)}</mark></pre>'
            for item in self.examples
        )


@dataclass(frozen=True)
class PackedRowsPage:
    """Packed rows as a whole HTML page, `html`; a notebook shows it in a frame."""

    html: str

    def _repr_html_(self) -> str:
        return html_frame(self.html)
