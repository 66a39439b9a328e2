"""Conversations of several turns: every answer is trained on, no question is, and a served conversation has the ids of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apprentice.data.corpus import make_corpus
from apprentice.data.encoding.prompt_contract import make_contract
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.tokenize import CUT_TURNS, LAST_TURN_ONLY, encode
from apprentice.data.inspect.preview import preview
from apprentice.data.window import WindowRenderer
from apprentice.errors import RecipeError
from apprentice.preflight.check import run_check
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.tasks.schema import Example

EXAMPLE = Example(
    "t", "c", "And 3?", "", "Nine.", history=(("Square 1.", "One."), ("Now 2.", "Four.\n\nEasy.")), system="Be brief."
)


@pytest.fixture(scope="module")
def layout(tiny_model: Path) -> Layout:
    return Layout("chat", Tokenizer(tiny_model))


def recipe_of(folder: Path, model: Path, **data: object) -> Recipe:
    rows = [
        {"messages": [{"role": "user", "content": f"Add {n}."}, {"role": "assistant", "content": f"{n}!"}] * (1 + n % 3)}
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "tasks": [{"conversations": str(folder / "chats.jsonl")}],
        "max_length": 256,
        "packing": {"length": 256},
        "window": 32,
    }
    content = {"name": "chats", "storage": str(folder / "runs"), "model": {"base": str(model)}, "data": values | data}
    return Recipe.model_validate(content | {"training": {"workers": 1, "steps": 2, "global_batch": 4}})


def test_every_answer_is_trained_on(layout: Layout) -> None:
    (tokens,) = encode(layout, [(EXAMPLE, ())], 500)
    assert tokens is not None
    mask = np.arange(len(tokens.ids)) >= tokens.prompt_length
    for start, stop in tokens.untrained:
        mask[start:stop] = False
    decode = layout.tokenizer.decode
    whole = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSquare 1.<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nNow 2.<|im_end|>\n<|im_start|>assistant\nFour.\n\nEasy.<|im_end|>\n"
        "<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\nNine.<|im_end|>"
    )
    assert decode(tokens.ids, skip_special=False) == whole
    trained = decode([id for id, on in zip(tokens.ids, mask, strict=True) if on], skip_special=False)
    assert trained == "One.<|im_end|>Four.\n\nEasy.<|im_end|>Nine.<|im_end|>"
    assert tokens.target_tokens == mask.sum()


def test_a_served_conversation_has_the_ids_of_training(layout: Layout) -> None:
    (tokens,) = encode(layout, [(EXAMPLE, ())], 500)
    assert tokens is not None
    messages = [{"role": "system", "content": "Be brief."}]
    for question, answer in (*EXAMPLE.history, ("And 3?", "Nine.")):
        messages.append({"role": "user", "content": question})
        prompt = layout.encode_chat(messages)
        assert tokens.ids[: len(prompt)] == prompt
        learnt = layout.encode_answers([answer])[0] + list(layout.end_ids)
        assert tokens.ids[len(prompt) : len(prompt) + len(learnt)] == learnt
        messages.append({"role": "assistant", "content": answer})


def test_what_is_too_long_loses_its_last_turns(layout: Layout) -> None:
    (whole,) = encode(layout, [(EXAMPLE, ())], 500)
    assert whole is not None
    (cut,) = encode(layout, [(EXAMPLE, ())], len(whole.ids) - 1)
    assert cut is not None
    assert (cut.truncated, cut.ids) == (CUT_TURNS, whole.ids[: whole.untrained[1][0]])
    assert encode(layout, [(EXAMPLE, ())], whole.prompt_length) == [None]


def test_a_template_that_changes_earlier_answers(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.role == 'user' else m.content[:3] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    (tokens,) = encode(Layout("chat", Tokenizer(tmp_path)), [(EXAMPLE, ())], 500)
    assert tokens is not None
    assert (tokens.truncated, tokens.untrained) == (LAST_TURN_ONLY, ())


def test_rows_have_several_stretches(tmp_path: Path, tiny_model: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_model)
    corpus = make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=False)
    rows = WindowRenderer(corpus).window(0)
    decode = corpus.layout.tokenizer.decode
    stretches = 0
    for ids, mask, targets in zip(rows["input_ids"], rows["loss_mask"], rows["example_targets"], strict=True):
        edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
        stretches += len(edges)
        assert mask.sum() == targets.sum()
        answers = decode(ids[mask == 1].tolist(), skip_special=False).split("<|im_end|>")
        assert len(answers) == len(edges) + 1
        assert all(answer.endswith("!") for answer in answers[:-1])
    assert stretches > len(np.concatenate(rows["examples"].tolist()))  # more answers than conversations
    assert any("⟧" in shown.trained for shown in preview(corpus, 8))


def test_layouts_without_turns_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"plain has no turns, and task 'conversations_chats' holds conversations"):
        run_check("tasks", recipe_of(tmp_path, tiny_model, layout="plain"))


def test_the_contract_has_golden_ids_of_a_conversation(tmp_path: Path, tiny_model: Path, layout: Layout) -> None:
    golden = make_contract(recipe_of(tmp_path, tiny_model), layout, tiny_model).golden[-1]
    assert len(golden.history) == 2
    assert layout.tokenizer.decode(golden.ids, skip_special=False).count("<|im_start|>assistant") == 3
