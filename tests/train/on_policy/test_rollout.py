"""Rounds of an on-policy run: their shape, and rows that hold what policy, reference and reward model say of every reply."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.data.stream import arrow_table
from apprentice.data.window import WindowRenderer
from apprentice.model_pool.engine_choice import EngineChoice
from apprentice.models.loading import load_model
from apprentice.models.reward import choice_rewards
from apprentice.models.tuning.methods import trainable_parameters
from apprentice.recipe import load_recipe
from apprentice.recipe.round import Round
from apprentice.run.folder import Run, open_run
from apprentice.train.batch import PackedRows
from apprentice.train.checkpoint.restore import restore_model
from apprentice.train.losses.grpo import PolicyLoss, advantages
from apprentice.train.on_policy import rollout
from apprentice.train.on_policy.reply_rewards import ReplyRewards
from apprentice.train.on_policy.rollout import RoundWriter
from apprentice.train.on_policy.writer_engine import WriterEngine
from tests.support.on_policy import round_recipe


@pytest.mark.parametrize(
    ("shape", "steps", "rows"),
    [
        (Round(16, 4, 2, 4, 1, 1), 8, [32]),  # 64 replies, two a row
        (Round(16, 4, 2, 4, 3, 1), 9, [12, 12, 12]),  # six prompts for each of three
        (Round(5, 3, 4, 8, 2, 2), 2, [4, 4]),  # nine replies in three rows, twice over; one step a pass
        (Round(1, 2, 8, 3, 1, 1), 1, [3]),  # rows without a reply
    ],
)
def test_a_round_is_whole_steps_with_room_for_every_reply(shape: Round, steps: int, rows: list[int]) -> None:
    assert shape.steps == steps
    assert [shape.rows_of(part) for part in range(shape.parts)] == rows
    assert sum(rows) * shape.passes == shape.rows == steps * shape.global_batch


def corpus_of(folder: Path, model: Path, **changes: Any) -> Corpus:
    recipe = load_recipe(round_recipe(folder, model, **changes))
    return make_corpus(recipe, Run(open_run(recipe).folder), parallel=False)


@pytest.fixture(scope="module")
def corpus(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("round"), tiny_model)


@pytest.fixture(scope="module")
def rows(corpus: Corpus) -> dict[str, Any]:
    return RoundWriter(corpus, torch.device("cpu")).rows(0, 0, None)


def replies_of(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Every reply of the rows: its position, advantage, reward, and ids, mask and log-probabilities of its example."""
    of_rollout = []
    for row in range(len(rows["row"])):
        for number, position in enumerate(rows["examples"][row]):
            here = rows["segment_ids"][row] == number + 1
            one = {name: rows[name][row][here] for name in ("input_ids", "loss_mask", "written", "held")}
            of_rollout.append(one | {name: rows[name][row][number] for name in ("advantages", "rewards")} | {"position": position})
    return of_rollout


def test_every_prompt_of_the_window_has_its_replies(corpus: Corpus, rows: dict[str, Any]) -> None:
    assert len(rows["row"]) == corpus.recipe.round.rows == 16
    assert rows["row"].tolist() == list(range(16))
    replies = replies_of(rows)
    assert sorted(reply["position"] for reply in replies) == [position for position in range(8) for _ in range(4)]
    assert len({bytes(reply["input_ids"]) for reply in replies}) > 24  # drawn, each by itself
    for reply in replies:
        assert 1 <= reply["loss_mask"].sum() <= 8
        assert not reply["loss_mask"][: -int(reply["loss_mask"].sum())].any()


def test_rewards_and_advantages_are_those_of_the_texts(corpus: Corpus, rows: dict[str, Any]) -> None:
    replies = replies_of(rows)
    end = list(corpus.layout.end_ids)
    texts = []
    for reply in replies:
        ids = reply["input_ids"].tolist()
        texts.append(ids if ids[-1] in corpus.layout.stop_ids else ids + end)
    judge = load_model(str(corpus.recipe.training.grpo.reward), torch.float32, head=0)
    expected = [one for [one] in choice_rewards(judge, [ids[:-1] for ids in texts], [[ids[-1:]] for ids in texts])]
    np.testing.assert_allclose([reply["rewards"] for reply in replies], expected, rtol=1e-4, atol=1e-5)
    for position in range(8):
        group = [reply for reply in replies if reply["position"] == position]
        expected = advantages(torch.tensor([[reply["rewards"] for reply in group]]))[0]
        np.testing.assert_allclose([reply["advantages"] for reply in group], expected, rtol=1e-4, atol=1e-5)


def test_log_probabilities_are_those_of_single_texts(corpus: Corpus, rows: dict[str, Any]) -> None:
    model: Any = load_model(corpus.recipe.model.base, torch.float32)
    for reply in replies_of(rows)[:6]:
        ids = torch.from_numpy(reply["input_ids"].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        own = torch.log_softmax(logits[:-1].float(), dim=-1).gather(1, ids[1:, None])[:, 0].numpy()
        mask = reply["loss_mask"] > 0
        for name in ("written", "held"):  # the policy of the first round is its reference
            np.testing.assert_allclose(reply[name][mask], own[mask[1:]], rtol=1e-4, atol=1e-5)
            assert not reply[name][~mask].any()


def test_the_first_step_learns_from_advantages_alone(corpus: Corpus, rows: dict[str, Any]) -> None:
    packed = PackedRows.from_columns(rows)
    assert packed.loss_denominator == 32
    loss = PolicyLoss(load_model(corpus.recipe.model.base, torch.float32), corpus.recipe.training.grpo)
    total = sum(float(loss(micro).detach()) for micro in packed.micro_batches(4))
    assert total == pytest.approx(-sum(reply["advantages"] for reply in replies_of(rows)), abs=1e-4)
    assert float(loss.figures["kl"]) == pytest.approx(0.0, abs=1e-5)
    assert float(loss.figures["clipped"]) == 0.0


@pytest.mark.parametrize("kept", [1, 0])
def test_rows_without_a_reply_have_no_loss_and_no_gradient(
    corpus: Corpus, kept: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts with two replies each, `kept` are not too long: fewer replies than the round has rows, or none."""
    reward = str(corpus.recipe.training.grpo.reward)
    shape = {"reward": reward, "group": 2, "max_new_tokens": 8}
    small = corpus_of(tmp_path, tiny_model, training__grpo=shape, data__window=2, training__checkpoint__every_steps=1)
    inner = WindowRenderer.prompts
    monkeypatch.setattr(WindowRenderer, "prompts", lambda self, window: inner(self, window)[:kept])
    made = RoundWriter(small, torch.device("cpu")).rows(0, 0, None)
    replies = 2 * kept
    assert len(made["row"]) == small.recipe.round.rows == 8 > replies
    assert sum(len(row) for row in made["examples"]) == replies
    assert len(replies_of(made)) == replies
    packed = PackedRows.from_columns(made)
    empty = [row for row in range(8) if not len(made["examples"][row])]
    assert len(empty) == 8 - replies
    assert not made["segment_ids"][empty].any()
    assert not made["loss_mask"][empty].any()
    model: Any = load_model(small.recipe.model.base, torch.float32)
    for row, micro in enumerate(packed.micro_batches(1)):
        model.zero_grad()
        loss = PolicyLoss(model, small.recipe.training.grpo)(micro)
        loss.backward()
        learns = any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        assert math.isfinite(float(loss.detach()))
        if row in empty:
            assert not learns
            assert float(loss.detach()) == 0.0
    assert arrow_table(made).num_rows == 8


SUMS: dict[str, Any] = {
    "data__tasks": ["word_problems"],
    "data__max_length": 160,
    "data__packing": {"length": 320},
    "training__grpo__beta": 0.0,
}


def of_rewards(folder: Path, model: Path, reward: Any, **changes: Any) -> tuple[Corpus, list[dict[str, Any]], dict[str, Any]]:
    """The corpus, replies and rows of a first round over word problems with this reward."""
    small = corpus_of(folder, model, **SUMS, training__grpo__reward=reward, **changes)
    made = RoundWriter(small, torch.device("cpu")).rows(0, 0, None)
    return small, replies_of(made), made


LENGTHS = """
def length(completions, prompts, references, tasks):
    assert all(task == "word_problems" for task in tasks)
    assert all(" = " in right and len(rights) == 1 for rights in references for right in rights)
    assert len(prompts) == len(completions)
    return [len(completion) for completion in completions]
"""


def test_a_reward_is_the_weighted_sum_of_functions_over_the_texts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lengths.py").write_text(LENGTHS)
    monkeypatch.chdir(tmp_path)
    terms = [{"function": "python:lengths:length", "weight": 0.5}, {"function": "regex", "pattern": "[^a-z]*", "weight": -2}]
    small, replies, _ = of_rewards(tmp_path, tiny_model, terms, training__grpo__overlong_tokens=4)
    assert len(replies) == 32
    for reply in replies:
        ids = reply["input_ids"][reply["loss_mask"] > 0].tolist()
        text = small.layout.tokenizer.decode(ids)
        overlong = max(0, len(ids) - 4) / 4  # of 8 tokens at most, the last 4
        expected = 0.5 * len(text) - 2 * bool(re.fullmatch("[^a-z]*", text.strip())) - overlong
        assert reply["rewards"] == pytest.approx(expected)
    assert any(len(reply["loss_mask"].nonzero()[0]) == 8 for reply in replies)


def test_groups_of_one_reward_are_left_out_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    """A random model never gets a sum right, so that no group teaches; without `redraws` all replies stay, with advantage 0."""
    _, replies, made = of_rewards(tmp_path, tiny_model, {"function": "math"}, training__grpo__redraws=1)
    assert replies == []
    assert len(made["row"]) == 16  # as ever, so that the steps stay what they are
    assert json.loads(made["dropped"][0]) == {"word_problems": {"equal_rewards": 8}}
    assert not any(made["dropped"][1:])
    assert PackedRows.from_columns(made).loss_denominator == 0
    _, replies, made = of_rewards(tmp_path / "all", tiny_model, {"function": "math"})
    assert [reply["advantages"] for reply in replies] == [0.0] * 32
    assert not any(made["dropped"])


def test_a_group_of_one_reward_is_drawn_anew(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draw of the first two prompts is worth the same; the second one is not, and takes its place."""
    texts: list[list[str]] = []

    def score(self: Any, replies: Any) -> torch.Tensor:
        texts.append([str(reply.ids) for reply in replies])
        values = torch.arange(len(replies)).float()
        if len(texts) == 1:
            values[:8] = 7.0
        return values

    monkeypatch.setattr(ReplyRewards, "score", score)
    _, replies, made = of_rewards(tmp_path, tiny_model, {"function": "math"}, training__grpo__redraws=3)
    assert [len(drawn) for drawn in texts] == [32, 8]
    assert set(texts[0][:8]) != set(texts[1])  # other seeds
    assert not any(made["dropped"])
    ids = sorted(str(reply["input_ids"][reply["loss_mask"] > 0].tolist()) for reply in replies)
    assert ids == sorted(texts[1] + texts[0][8:])
    assert sorted(float(reply["rewards"]) for reply in replies) == sorted([*range(8), *range(8, 32)])


def test_the_same_round_again_is_the_same(corpus: Corpus, rows: dict[str, Any]) -> None:
    again = RoundWriter(corpus, torch.device("cpu")).rows(0, 0, None)
    for name in ("input_ids", "written", "held", "segment_ids"):
        np.testing.assert_array_equal(again[name], rows[name])


def test_passes_and_parts_hold_the_same_replies(corpus: Corpus, tiny_model: Path, tmp_path: Path, rows: dict[str, Any]) -> None:
    reward = str(corpus.recipe.training.grpo.reward)
    changes = {"training__grpo__reward": reward, "training__grpo__passes": 2, "training__grpo__actors": 2}
    twice = corpus_of(tmp_path, tiny_model, **changes, training__checkpoint__every_steps=4)
    writer = RoundWriter(twice, torch.device("cpu"))
    parts = [writer.rows(0, part, None) for part in range(2)]
    assert [part["row"].tolist() for part in parts] == [list(range(16)), list(range(16, 32))]
    once = sorted(bytes(reply["input_ids"]) for reply in replies_of(rows))
    rollout_ids = sorted(bytes(reply["input_ids"]) for part in parts for reply in replies_of(part))
    assert rollout_ids == sorted(once + once)


class RecordingVllm:
    """Stands for `VllmModel`: replies to each prompt with one token and the stop id, and keeps what it is given."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings, self.weights, self.prompts = settings, [load_file(folder / "model.safetensors")], []

    def load_weights(self, folder: Path) -> None:
        self.weights.append(load_file(folder / "model.safetensors"))

    def sample(self, prompts: Any, seeds: Any, *, max_new_tokens: int, stop_ids: Any) -> list[tuple[list[int], bool]]:
        self.prompts.append(list(zip(prompts, seeds, strict=True)))
        return [([9, next(iter(stop_ids))], True) for _ in prompts]


def test_vllm_writes_with_the_weights_of_each_rounds_snapshot(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts once; the adapter is merged into what it is given. The log-probabilities are our model's."""
    monkeypatch.setattr(rollout, "VllmModel", RecordingVllm)
    engine = WriterEngine(EngineChoice("vllm", "asked for"), 2.0, is_split=True)
    writer = RoundWriter(corpus, torch.device("cpu"), engine)
    first = writer.rows(0, 0, None)
    vllm: Any = writer._vllm
    assert vllm.settings["tensor_parallel"] == 2
    assert vllm.settings["context"] == corpus.recipe.data.max_length
    assert vllm.settings["others"] > 2 * 2**30
    assert len({seed for _, seed in vllm.prompts[0]}) == len(vllm.prompts[0]) == 32
    assert (first["written"] != 0).sum() == 2 * 32
    model = restore_model(corpus.recipe, None, torch.float32)
    trained = {f"weight/{name}": torch.full_like(value, 0.02) for name, value in trainable_parameters(model).items()}
    writer.rows(1, 0, trained.__getitem__)
    assert writer._vllm is vllm
    base, again, merged = vllm.weights
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "proj" in name}
