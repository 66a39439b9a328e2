"""The preview: the text that the model sees, and which part of it is trained on."""

from __future__ import annotations

import io

from rich.console import Console

from apprentice.data.corpus import Corpus
from apprentice.data.inspect.preview import ExamplePreview, preview, to_text, trace
from tests.data.small import CorpusOf

ITEM = ExamplePreview(
    7, "sums", "add", "few_shot", 4, 2, (9, 6, 1), 1, "Add <b>[1]</b>.\n", "16<|im_end|>", 20, 3, "truncated_exemplars"
)


def test_it_shows_the_plan(corpus: Corpus) -> None:
    shown = preview(corpus, 20)
    assert [item.position for item in shown] == list(range(20))
    assert {item.format for item in shown} == {"zero_shot", "few_shot", "inverted"}
    tokenizer = corpus.layout.tokenizer
    for item, draw in zip(shown, corpus.plan.draws(0, 20), strict=True):
        assert (item.task, item.template, item.row) == (draw.task, draw.template, draw.row)
        assert item.prompt.endswith("<|im_start|>assistant\n")
        assert item.prompt.count("assistant\n") == item.exemplars + 1
        assert item.trained.endswith("<|im_end|>")
        assert item.target_tokens == len(tokenizer.encode(item.trained))
        assert item.tokens == len(tokenizer.encode(item.prompt)) + item.target_tokens


def test_the_first_of_all(corpus_of: CorpusOf) -> None:
    corpus = corpus_of(layout="plain", formats={"zero_shot": 1.0}, hold_out=["stories"])
    [item] = preview(corpus, 1)
    source = {name: f"{row} and {3 * row % 17}" for name, row in [("pair", item.row)]}["pair"]
    texts = {"add": f"Add the two numbers.\n\n{source}\n", "total": f"What is the total of {source}?\n"}
    assert item.prompt == texts[item.template]
    assert item.trained == f"{item.row + 3 * item.row % 17}<|im_end|>"


def test_nothing_usable_shows_nothing(corpus_of: CorpusOf) -> None:
    assert preview(corpus_of(max_length=10), 3) == []


def test_as_text() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(to_text([ITEM]))
    assert console.file.getvalue() == (  # type: ignore[attr-defined]
        "7: sums · add · few-shot\nrow 4 in pass 2, exemplars 9, 6, 20 tokens, 3 of them trained on, truncated exemplars\n"
        "Add <b>[1]</b>.\n⟦16<|im_end|>⟧\n\n\n"
    )


def test_what_stood_at_some_positions(corpus_of: CorpusOf) -> None:
    corpus = corpus_of(max_length=60)
    first, cut = preview(corpus, 1)[0], trace(corpus, list(range(64)))
    assert [item.position for item in cut] == list(range(64))
    assert cut[first.position] == first
    dropped = [item for item in cut if item.truncated == "too_long"]
    assert {(item.tokens, item.trained) for item in dropped} == {(0, "")}
    draw = corpus.plan.draws(50_000, 50_001)[0]
    [far] = trace(corpus, [50_000])
    assert (far.task, far.row, far.template, far.shots, far.pass_) == (draw.task, draw.row, draw.template, draw.shots, draw.pass_)
    assert far.pass_ > 50
