"""One on-policy round, from its prompts to packed rows: the policy replies, a reward model compares, a reference is asked.

    prompts of a window ─▶ replies of the policy, drawn by seed ─▶ rewards, advantages ─▶ rows with each token's log-probabilities

What comes out depends on the seed, the weights and the plan alone. Knows nothing of Ray, of files, or of when a round begins.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apprentice.data.corpus import Corpus
from apprentice.data.packing import Rows, build_rows
from apprentice.data.sampling.permutation import key_of, permute
from apprentice.data.window import Prompt, WindowRenderer
from apprentice.inference.cpu_linear import placed
from apprentice.inference.decoder import Decoder, Generation
from apprentice.inference.sampler import Sampling
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.reward import choice_rewards
from apprentice.models.tuning.methods import TUNING_METHODS, load_trainable, trainable
from apprentice.train.batch import PackedRows
from apprentice.train.engine.deepspeed import WEIGHT
from apprentice.train.engine.deepspeed_config import CPU_MICRO_TOKENS, GPU_MICRO_TOKENS
from apprentice.train.losses.grpo import ReplyLogProbs, advantages

AT_ONCE = 64  # replies that are written together

Read = Callable[[str], Tensor]  # key of a checkpoint → its tensor


class Reply(NamedTuple):
    """What the policy wrote, the end included where it came to one."""

    prompt: Prompt
    ids: list[int]
    ended: bool


class RoundWriter:
    """Makes the rows of rounds on one device. Holds the reward model and the reference, nothing that a result depends on."""

    def __init__(self, corpus: Corpus, device: torch.device) -> None:
        self._corpus, self._device = corpus, device
        self._renderer = WindowRenderer(corpus)
        self._dtype = resolve_dtype(corpus.recipe.model.dtype, device.type)
        budget = GPU_MICRO_TOKENS if device.type == "cuda" else CPU_MICRO_TOKENS
        self._rows_at_once = max(1, budget // corpus.row_length)

    def rows(self, window: int, part: int, read: Read | None) -> Rows:
        """Part `part` of the round over the prompts of `window`, written by the policy that a checkpoint's `read` gives.

        Without one it is the base. The columns are those of `apprentice.data.window` with four more: `written` and `reference`,
        here `held`, float32 (length,): every reply token's log-probability under the policy and under the reference; `advantages`
        and `rewards`, float32 (any,): of every reply.
        """
        shape, recipe = self._corpus.recipe.round, self._corpus.recipe
        prompts = self._renderer.prompts(window)[part :: shape.parts]
        policy = self._policy(read)
        replies = self._replies(policy, prompts)
        rewards = self._rewards(replies).view(-1, shape.group)
        better = advantages(rewards).reshape(-1).numpy()
        rows: list[list[int]] = []
        for turn in range(shape.passes):
            order = permute(np.arange(len(replies)), max(len(replies), 1), key_of(recipe.seed, "replies", window, part, turn))
            rows += [order[row :: shape.rows_of(part)].tolist() for row in range(shape.rows_of(part))]
        columns = self._columns(replies, rows, {"advantages": better, "rewards": rewards.reshape(-1).numpy()})
        before = sum(shape.rows_of(other) for other in range(part)) * shape.passes
        columns["window"] = np.full(len(rows), window, np.int64)
        columns["row"] = np.arange(before, before + len(rows), dtype=np.int32)
        columns["written"] = self._log_probabilities(policy, columns)
        columns["held"] = self._log_probabilities(self._reference, columns) if recipe.training.grpo.beta else columns["written"]
        return columns

    def _policy(self, read: Read | None) -> Any:
        recipe = self._corpus.recipe
        model = self._loaded(recipe.model.base)
        if read is None:
            return placed(model, self._device)
        method = TUNING_METHODS[recipe.tuning.method]
        assert method.merge is not None, "the recipe allows only methods that can be merged"
        wrapped = method.wrap(model, recipe.tuning, recipe.seed)
        load_trainable(wrapped, {name: read(f"{WEIGHT}/{name}") for name in trainable(wrapped)})
        return placed(method.merge(wrapped).requires_grad_(False).eval(), self._device)

    @cached_property
    def _reference(self) -> Any:
        return placed(self._loaded(self._corpus.recipe.model.base), self._device)

    @cached_property
    def _judge(self) -> Any:
        reward = self._corpus.recipe.training.grpo.reward
        assert reward is not None, "the recipe names a reward model"
        return placed(self._loaded(reward, head=0), self._device)

    def _loaded(self, base: str, head: int | None = None) -> Any:
        settings = self._corpus.recipe.model
        model: Any = load_model(base, self._dtype, settings.attention, head=head, trust=settings.trust)
        return model.to(self._device).requires_grad_(False)

    def _replies(self, policy: Any, prompts: Sequence[Prompt]) -> list[Reply]:
        """As many to each prompt as the recipe asks for, those to one prompt after each other."""
        grpo, seed = self._corpus.recipe.training.grpo, self._corpus.recipe.seed
        stops = frozenset(self._corpus.layout.stop_ids)
        asked = [(prompt, number) for prompt in prompts for number in range(grpo.group)]
        if not asked:
            return []
        decoder = Decoder(policy, slots=min(AT_ONCE, len(asked)), context=self._corpus.recipe.data.max_length)
        for place, (prompt, number) in enumerate(asked):
            sampling = Sampling(1.0, seed=key_of(seed, "reply", prompt.position, number))
            decoder.submit(place, Generation(prompt.ids, grpo.max_new_tokens, stops, sampling))
        written: dict[Hashable, list[int]] = {place: [] for place in range(len(asked))}
        ended: dict[Hashable, bool] = {}
        while decoder.running or decoder.waiting:
            for token in decoder.step():
                written[token.key].append(token.id)
                ended[token.key] = token.finish == "stop"
        return [Reply(prompt, written[place], ended[place]) for place, (prompt, _) in enumerate(asked)]

    def _rewards(self, replies: Sequence[Reply]) -> Tensor:
        """What the reward model gives to every reply, each with the end of an answer."""
        end = list(self._corpus.layout.end_ids)
        texts = [(reply.ids[:-1] if reply.ended else reply.ids) + end for reply in replies]
        found = choice_rewards(self._judge, [reply.prompt.ids for reply in replies], [[ids] for ids in texts])
        return torch.tensor(list(chain.from_iterable(found)), dtype=torch.float32)

    def _columns(self, replies: Sequence[Reply], rows: Sequence[Sequence[int]], per_reply: dict[str, NDArray[Any]]) -> Rows:
        texts = [reply.prompt.ids + reply.ids for reply in replies]
        lengths = np.array([len(ids) for ids in texts], np.int64)
        prompts = np.array([len(reply.prompt.ids) for reply in replies], np.int64)
        ids = np.fromiter(chain.from_iterable(texts), np.int32, int(lengths.sum()))
        columns = build_rows(ids, lengths, prompts, rows, self._corpus.row_length, self._corpus.layout.tokenizer.pad_id)
        per_reply = per_reply | {
            "examples": np.array([reply.prompt.position for reply in replies], np.int64),
            "example_tasks": np.array([reply.prompt.task for reply in replies], np.int32),
            "example_targets": (lengths - prompts).astype(np.int32),
        }
        for name, values in per_reply.items():
            columns[name] = np.empty(len(rows), object)
            columns[name][:] = [values[np.array(row, np.int64)] for row in rows]
        columns["dropped"] = np.full(len(rows), "", object)
        return columns

    def _log_probabilities(self, model: Any, columns: Rows) -> NDArray[np.float32]:
        """Of every reply token, (rows, length); 0 elsewhere."""
        rows = PackedRows.of(columns)
        module = ReplyLogProbs(model).eval()
        found = np.zeros(rows.input_ids.shape, np.float32)
        with torch.no_grad():
            for start, micro in zip(self._starts(len(rows)), rows.micros(self._rows_at_once), strict=True):
                ids, positions, is_target = micro.to(self._device).tensors
                given = module(ids, positions, is_target).cpu().numpy()
                found[start : start + self._rows_at_once, : given.shape[1]] = given
        return found

    def _starts(self, rows: int) -> Iterator[int]:
        return iter(range(0, rows, self._rows_at_once))
