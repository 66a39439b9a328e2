"""Preview of a plan's examples: the exact text that the model gets, with the trained-on part marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.encoder import ExampleEncoder
from apprentice.data.encoding.render import Renderer
from apprentice.data.encoding.tokenize import Tokenized
from apprentice.data.sampling.plan import Draw
from apprentice.errors import RowError

if TYPE_CHECKING:
    from rich.text import Text

_SEGMENTS = "\n"  # between the segments of a conversation
OPEN, CLOSE = "⟦", "⟧"  # around trained-on text, for outputs without colours


@dataclass(frozen=True)
class ExamplePreview:
    """One example for display; `prompt` and `trained` are decoded from its token ids, special tokens included."""

    position: int  # in the plan
    task: str
    template: str
    format: str
    row: int  # number in the task's training source
    exemplars: int
    shots: tuple[int, ...]  # source rows of the exemplars that were drawn; the first `exemplars` of them fitted
    pass_: int  # number of complete passes over the task's rows before this draw
    prompt: str
    trained: str
    tokens: int
    target_tokens: int
    truncated: str  # reason of the cut or drop, or empty
    rejected: str = ""  # of a pair: the worse answer
    desirable: bool | None = None  # label of the answer, where it has one

    @property
    def heading(self) -> str:
        """Position, task, template and format."""
        return f"{self.position}: {self.task} · {self.template} · {self.format.replace('_', '-')}"

    @property
    def details(self) -> str:
        """One line with source row, exemplars, lengths in tokens, and the reason of a cut."""
        shots = f", exemplars {', '.join(map(str, self.shots[: self.exemplars]))}" if self.exemplars else ""
        cut = f", {self.truncated.replace('_', ' ')}" if self.truncated else ""
        label = "" if self.desirable is None else ", desirable" if self.desirable else ", undesirable"
        size = f"{self.tokens} tokens, {self.target_tokens} of them trained on"
        return f"row {self.row} in pass {self.pass_ + 1}{shots}, {size}{label}{cut}"

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON output."""
        return asdict(self)


def preview(corpus: Corpus, number: int) -> list[ExamplePreview]:
    """The first `number` usable examples of the plan; fewer if more than nine in ten are dropped."""
    renderer, encoder = Renderer(corpus.tasks, corpus.indices, partner_seed=corpus.partner_seed), ExampleEncoder(corpus)
    previews: list[ExamplePreview] = []
    for start in range(0, 10 * number, number):
        draws = corpus.plan.draws(start, start + number)
        rendered = zip(draws, renderer.render_draws(draws), strict=True)
        usable = [(draw, item) for draw, item in rendered if not isinstance(item, RowError)]
        tokenized = encoder.encode([item for _, item in usable])
        previews += [
            _preview_of(corpus, draw, tokens) for (draw, _), tokens in zip(usable, tokenized, strict=True) if tokens is not None
        ]
        if len(previews) >= number:
            break
    return previews[:number]


def to_text(previews: Sequence[ExamplePreview]) -> Text:
    """The examples for a terminal: trained-on text in green and between ⟦ and ⟧, a pair's worse answer in red."""
    from rich.text import Text

    text = Text()
    for item in previews:
        text.append(f"{item.heading}\n", "bold").append(f"{item.details}\n", "dim").append(item.prompt)
        text.append(f"{OPEN}{item.trained}{CLOSE}", "green")
        if item.rejected:
            text.append("\nrejected: ", "dim").append(f"{OPEN}{item.rejected}{CLOSE}", "red")
        text.append("\n\n")
    return text


def trace(corpus: Corpus, positions: Sequence[int]) -> list[ExamplePreview]:
    """The examples at these plan positions; a dropped one has no tokens, and its reason in `truncated`."""
    renderer, encoder = Renderer(corpus.tasks, corpus.indices, partner_seed=corpus.partner_seed), ExampleEncoder(corpus)
    draws = [drawn for position in positions for drawn in corpus.plan.draws(position, position + 1)]
    previews = []
    for draw, item in zip(draws, renderer.render_draws(draws), strict=True):
        if isinstance(item, RowError):
            previews.append(_preview_of(corpus, draw, Tokenized([], 0, 0, item.reason)))
            continue
        [tokens] = encoder.encode([item])
        previews.append(_preview_of(corpus, draw, tokens or Tokenized([], 0, 0, encoder.drop_reason(*item))))
    return previews


def _trained(tokens: Tokenized, decode: Callable[..., str]) -> str:
    """The text that is trained on; a conversation's later questions, which are not, stand between ⟧ and ⟦ in it."""
    text, done = "", tokens.prompt_length
    for start, stop in tokens.untrained:
        text += decode(tokens.ids[done:start], skip_special=False) + CLOSE
        text += decode(tokens.ids[start:stop], skip_special=False) + OPEN
        done = stop
    return text + decode(tokens.ids[done:], skip_special=False)


def _whole(tokens: Tokenized, decode: Callable[..., str]) -> str:
    """A further segment of a conversation: its prompt stands between ⟧ and ⟦."""
    return f"{CLOSE}{decode(tokens.ids[: tokens.prompt_length], skip_special=False)}{OPEN}{_trained(tokens, decode)}"


def _preview_of(corpus: Corpus, draw: Draw, tokens: Tokenized) -> ExamplePreview:
    decode = corpus.layout.tokenizer.decode
    return ExamplePreview(
        position=draw.position,
        task=draw.task,
        template=draw.template,
        format=draw.format,
        row=draw.row,
        exemplars=tokens.exemplars_used,
        shots=draw.shots,
        pass_=draw.pass_,
        prompt=decode(tokens.ids[: tokens.prompt_length], skip_special=False),
        trained=_SEGMENTS.join([_trained(tokens, decode), *(_whole(segment, decode) for segment in tokens.others)]),
        tokens=tokens.size,
        target_tokens=tokens.target_tokens,
        truncated=tokens.truncated or "",
        rejected="" if tokens.rejected is None or tokens.is_desirable is not None else _trained(tokens.rejected, decode),
        desirable=tokens.is_desirable,
    )
