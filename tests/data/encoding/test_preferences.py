"""Pairs in packed rows: both answers side by side after the same prompt, and what a recipe may not ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.tokenize import encode_labelled, encode_pairs, encode_prompts
from apprentice.data.inspect.packed_rows_html import rows_of
from apprentice.data.inspect.preview import preview
from apprentice.data.reference import ReferenceLogProbs
from apprentice.data.window import WindowRenderer
from apprentice.errors import DataError, RecipeError
from apprentice.preflight.check import run_check
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.tasks.schema import Example
from tests.support.chat_templates import sources, stand_in
from tests.support.preferences import pairs, write_pairs
from tests.support.stand_ins import tiny_model_of


def recipe_of(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Recipe:
    file = write_pairs(folder / "pairs.jsonl", rows)
    content: dict[str, Any] = {
        "name": "pairs",
        "storage": str(folder / "runs"),
        "model": {"base": str(model)},
        "data": {
            "tasks": [{"preferences": str(file)}],
            "validation": 0.2,
            "max_length": 100,
            "packing": {"length": 400},
            "window": 16,
        },
        "training": {"objective": "dpo", "workers": 1, "steps": 2, "global_batch": 2},
    }
    for key, value in changes.items():
        block, _, name = key.partition("__")
        content[block] = content[block] | {name: value}
    return Recipe.model_validate(content)


def corpus_of(folder: Path, model: Path, **changes: Any) -> Corpus:
    recipe = recipe_of(folder, model, **changes)
    return make_corpus(recipe, Run(Folder.at(recipe.storage) / recipe.name), parallel=False)


def test_a_row_holds_whole_pairs(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model)
    rows = WindowRenderer(corpus).window(0)
    decode = corpus.layout.tokenizer.decode
    positions: list[int] = []
    assert max(len(examples) for examples in rows["examples"]) >= 2
    for place, examples in enumerate(rows["examples"]):
        segments = rows["segment_ids"][place]
        assert segments.max() == 2 * len(examples)
        for number, position in enumerate(examples.tolist()):
            [drawn] = corpus.plan.draws(position, position + 1)
            record = pairs()[drawn.row]
            texts = []
            for segment in (2 * number + 1, 2 * number + 2):
                here = segments == segment
                assert rows["positions"][place][here].tolist() == list(range(int(here.sum())))
                ids, mask = rows["input_ids"][place][here], rows["loss_mask"][place][here] > 0
                texts.append((decode(ids[~mask].tolist(), skip_special=False), decode(ids[mask].tolist(), skip_special=False)))
            assert texts[0][0] == texts[1][0]
            assert record["prompt"] in texts[0][0]
            assert [answer for _, answer in texts] == [f"{record[side]}<|im_end|>" for side in ("chosen", "rejected")]
            positions.append(position)
    assert sorted(positions) == list(range(16))
    targets = [int(count) for counts in rows["example_targets"] for count in counts]
    assert sum(targets) == int(rows["loss_mask"].sum())


def test_reference_numbers_lie_beside_their_answers(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model)
    [index] = corpus.indices.values()
    known = np.sort(np.concatenate([index.train, index.validation]))
    values = np.stack([-known, -known - 0.5], axis=1).astype(np.float32)
    with_reference = replace(corpus, reference={index.task: ReferenceLogProbs(known, values)})
    for rows, row_of in (
        (WindowRenderer(with_reference).window(1), lambda position: corpus.plan.draws(position, position + 1)[0].row),
        (WindowRenderer(with_reference).validation(3), lambda row: row),
    ):
        assert len(rows["examples"])
        for examples, reference in zip(rows["examples"], rows["reference"], strict=True):
            expected = [[-row_of(number), -row_of(number) - 0.5] for number in examples.tolist()]
            assert reference.reshape(-1, 2).tolist() == expected
    assert not np.concatenate(WindowRenderer(corpus).window(1)["reference"]).any()


def test_a_reference_that_lacks_a_row(tmp_path):
    reference = ReferenceLogProbs(np.array([1, 4]), np.array([[-1, -2], [-3, -4]], np.float32))
    reference.write(Folder.at(tmp_path) / "task.npz")
    again = ReferenceLogProbs.read(Folder.at(tmp_path) / "task.npz")
    assert (again.of(1), again.of(4)) == ((-1.0, -2.0), (-3.0, -4.0))
    with pytest.raises(DataError, match=r"says nothing of row 2"):
        again.of(2)


def test_one_pair_a_row_without_packing(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model, data__packing={"length": 400, "strategy": "none"})
    rows = WindowRenderer(corpus).window(0)
    assert rows["input_ids"].shape == (16, 200)
    assert {len(examples) for examples in rows["examples"]} == {1}


def test_the_prompt_is_cut_alike_for_both_answers(tiny_model):
    layout = Layout("plain", Tokenizer(tiny_model))
    long = Example("t", "p", "Answer.", "one two three four five six seven", "Yes.", rejected="Certainly not, never, at no time.")
    [whole] = encode_pairs(layout, [long], 200)
    assert whole is not None
    assert whole.rejected is not None
    most = max(len(answer.ids) for answer in whole.answers)
    [cut] = encode_pairs(layout, [long], most - 4)
    assert cut is not None
    assert cut.rejected is not None
    assert cut.ids[: cut.prompt_length] == cut.rejected.ids[: cut.rejected.prompt_length]
    assert cut.truncated == "truncated_input"
    assert max(len(answer.ids) for answer in cut.answers) <= most - 4
    assert cut.ids[cut.prompt_length :] == whole.ids[whole.prompt_length :]
    assert encode_pairs(layout, [long], len(whole.rejected.ids) - whole.prompt_length) == [None]


def test_preview_and_the_page_of_rows_show_both_answers(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model)
    shown = preview(corpus, 3)
    assert [item.rejected for item in shown] == [f"{pairs()[item.row]['rejected']}<|im_end|>" for item in shown]
    [view] = rows_of(corpus, 1)
    first = "".join(text for text, _, _ in view.segments[0].parts)
    assert first.count("Name colour") == 2
    assert sum(tokens for segment in view.segments for _, tokens, _ in segment.parts) == view.sides[0][2]


def test_sft_learns_the_better_answers(tiny_model, tmp_path):
    corpus = corpus_of(tmp_path, tiny_model, training__objective="sft")
    rows = WindowRenderer(corpus).window(0)
    assert "reference" not in rows
    text = corpus.layout.tokenizer.decode(rows["input_ids"][0].tolist(), skip_special=False)
    assert "gladly" in text
    assert "Never" not in text


def test_equal_answers_are_refused_with_the_row(tiny_model, tmp_path):
    rows = pairs()
    rows[7]["rejected"] = rows[7]["chosen"]
    with pytest.raises(DataError, match=r"1 of 40 rows are unusable.*train row 7: .*both answers of the pair are the same"):
        corpus_of(tmp_path, tiny_model, rows=rows)


def test_equal_answers_are_counted_where_some_bad_rows_are_allowed(tiny_model, tmp_path):
    rows = pairs()
    rows[7]["rejected"] = rows[7]["chosen"]
    [index] = corpus_of(tmp_path, tiny_model, rows=rows, data__max_bad_rows=0.05).indices.values()
    assert index.rejects == {"equal_answers": 1}
    assert 7 not in [*index.train, *index.validation]
    assert len(index.train) + len(index.validation) == 39


def test_tasks_without_pairs_are_refused(tiny_model, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model)
    tasks = {"tasks": [*recipe.data.tasks, "message_moods"]}
    data = recipe.data.model_copy(update=tasks)
    with pytest.raises(RecipeError, match=r"dpo learns from preferences, and task 'message_moods' has no rejected answers"):
        run_check("tasks", recipe.model_copy(update={"data": data}))
    data_of_held_out = data.model_copy(update={"hold_out": ("message_moods",)})
    assert run_check("tasks", recipe.model_copy(update={"data": data_of_held_out})) == "2 tasks, 1 of them held out"


def test_a_reference_with_another_tokenizer_is_refused(tiny_model, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    file = other / "tokenizer.json"
    recipe = recipe_of(tmp_path, tiny_model, training__dpo={"reference": str(other)})
    assert run_check("model", recipe)
    file.write_text(file.read_text().replace("<|pad|>", "<|pod|>"))
    with pytest.raises(RecipeError, match=r"training\.dpo\.reference .* has another tokenizer than model\.base"):
        run_check("model", recipe)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_methods_that_do_not_pack_are_refused(method, tiny_model, tmp_path):
    recipe = recipe_of(tmp_path, tiny_model)
    tuned = recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"method": method})})
    with pytest.raises(RecipeError, match="where they would see each other here: the virtual tokens"):
        run_check("model", tuned)


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_an_encoder_decoder_is_refused(objective, tiny_model, tmp_path):
    model = tiny_model_of("t5_v1.1", tiny_model, tmp_path / "t5")
    with pytest.raises(
        RecipeError,
        match=rf"^training\.objective {objective} puts both answers of a pair into one row, where they would see each other here:"
        r" an encoder reads a prompt once for each answer; use a causal model that packs",
    ):
        run_check("model", recipe_of(tmp_path, model, training__objective=objective))


def test_dropped_thoughts_are_in_no_answer_that_is_compared(tmp_path):
    layout = Layout("chat", stand_in("qwen3", sources()["qwen3"].read_text(), tmp_path), reasoning="drop")
    history = (("Hot?", "<think>a guess</think>No."),)
    example = Example("t", "p", "Here?", "", "<think>a guess</think>Yes.", (), (), history, rejected="<think>a guess</think>Never.")
    other = Exemplar("", "", "<think>a guess</think>Cold.")
    [pair], [labelled] = encode_pairs(layout, [example], 200), encode_labelled(layout, [(example, [other])], 200)
    [prompt] = encode_prompts(layout, [example], 200)
    assert pair is not None
    assert labelled is not None
    assert prompt is not None
    assert all("guess" not in layout.tokenizer.decode(one.ids) for one in (*pair.answers, *labelled.answers, prompt))
    ends = [layout.tokenizer.decode(one.ids[one.prompt_length :]) for one in (*pair.answers, *labelled.answers)]
    assert [text.split("<")[0].strip() for text in ends] == ["Yes.", "Never.", "Yes.", "Cold."]
