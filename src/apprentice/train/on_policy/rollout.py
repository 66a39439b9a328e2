"""Rollout of one on-policy round: the policy replies to prompts, the reward scores, and the replies become packed rows.

    prompts of a window ─▶ replies sampled from the policy ─▶ rewards, advantages ─▶ rows with each token's log-probabilities

The result depends only on the seed, the weights and the sampling plan.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apprentice.data.corpus import Corpus
from apprentice.data.packing import Rows, build_rows
from apprentice.data.sampling.permutation import key_of, permute
from apprentice.data.window import Prompt, WindowRenderer
from apprentice.inference.cpu_linear import place_model
from apprentice.inference.decoding import make_scheduler
from apprentice.inference.generation_request import GenerationRequest, Sampling
from apprentice.model_pool.model import weight_bytes
from apprentice.model_pool.pool import GPU_OVERHEAD_BYTES
from apprentice.model_pool.vllm_model import VllmModel
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.train.batch import PackedRows, SupervisedBatch, move_batch
from apprentice.train.checkpoint.restore import ReadTensor, restore_model
from apprentice.train.engine.deepspeed_config import CPU_MICRO_TOKENS, GPU_MICRO_TOKENS
from apprentice.train.losses.grpo import advantages, token_log_probabilities
from apprentice.train.losses.target_losses import TargetLosses
from apprentice.train.on_policy.reply_rewards import ReplyRewards, Rollout
from apprentice.train.on_policy.writer_engine import OWN_WRITER, WriterEngine
from apprentice.train.packed_attention import packed_attention

EQUAL_REWARDS = "equal_rewards"  # reason under which the mixture ledger counts groups that were left out
AT_ONCE = 64  # slots of the scheduler: replies generated at the same time


class RoundWriter:
    """Makes the rows of on-policy rounds on one device.

    Between rounds it keeps only the reward's functions and model and the reference, so a round's rows do not depend on earlier
    calls.
    """

    def __init__(self, corpus: Corpus, device: torch.device, engine: WriterEngine = OWN_WRITER) -> None:
        self._corpus, self._device, self._engine = corpus, device, engine
        self._renderer = WindowRenderer(corpus)
        self._rewards = ReplyRewards(corpus, lambda name: place_model(self._load(name, head=0), device))
        self._dtype = resolve_dtype(corpus.recipe.model.dtype, device.type)
        budget = GPU_MICRO_TOKENS if device.type == "cuda" else CPU_MICRO_TOKENS
        self._rows_at_once = max(1, budget // corpus.row_length)

    def rows(self, window: int, part: int, read: ReadTensor | None) -> Rows:
        """Packed rows of part `part` of the round over the prompts of `window`.

        `read` gives the policy's tensors from a checkpoint; without it the policy is the base model. The columns are those of
        `apprentice.data.window` and four more: `written` and `held`, float32 (length,), each reply token's log-probability under
        the policy and under the reference; `advantages` and `rewards`, float32 (replies,). Each of the round's `passes` goes over
        all replies in an order of its own. Row 0 of the part says how many groups `training.grpo.redraws` left out.
        """
        shape, recipe = self._corpus.recipe.round, self._corpus.recipe
        prompts = self._renderer.prompts(window)[part :: shape.parts]
        _ = self._vllm  # before other models take memory of its GPU
        policy = self._policy(read)
        replies, rewards, left_out = self._scored_replies(policy, prompts)
        advantage_of_replies = advantages(rewards, scale_rewards=recipe.training.grpo.scale_rewards).reshape(-1).numpy()
        rows: list[list[int]] = []
        for pass_number in range(shape.passes):
            order = permute(
                np.arange(len(replies)), max(len(replies), 1), key_of(recipe.seed, "replies", window, part, pass_number)
            )
            rows += [order[row :: shape.rows_of(part)].tolist() for row in range(shape.rows_of(part))]
        columns = self._columns(replies, rows, {"advantages": advantage_of_replies, "rewards": rewards.reshape(-1).numpy()})
        first_row = sum(shape.rows_of(other) for other in range(part)) * shape.passes
        columns["window"] = np.full(len(rows), window, np.int64)
        columns["row"] = np.arange(first_row, first_row + len(rows), dtype=np.int32)
        if left_out and rows:
            columns["dropped"][0] = json.dumps({task: {EQUAL_REWARDS: left_out[task]} for task in sorted(left_out)})
        columns["written"] = self._log_probabilities(policy, columns)
        columns["held"] = self._log_probabilities(self._reference, columns) if recipe.training.grpo.beta else columns["written"]
        return columns

    def _policy(self, read: ReadTensor | None) -> Any:
        recipe = self._corpus.recipe
        if read is None:
            if self._vllm is not None:
                self._vllm.load_weights(local_folder(recipe.model.base))
            return place_model(self._load(recipe.model.base), self._device)
        merge = TUNING_METHODS[recipe.tuning.method].merge
        assert merge is not None, "the recipe allows only methods that can be merged"
        model = restore_model(recipe, read, self._dtype, quantized=False).to(self._device)
        policy = merge(model).requires_grad_(False).eval()
        if self._vllm is not None:
            with tempfile.TemporaryDirectory() as folder:
                policy.save_pretrained(folder)
                self._vllm.load_weights(Path(folder))
        return place_model(policy, self._device)

    @cached_property
    def _vllm(self) -> VllmModel | None:
        """The policy in vLLM, beside which the models that score replies have room; None where our own engine writes."""
        recipe = self._corpus.recipe
        if self._engine.choice.name != "vllm":
            return None
        return VllmModel(
            local_folder(recipe.model.base),
            device="cuda" if self._device.type == "cuda" else "cpu",
            dtype=str(self._dtype).removeprefix("torch."),
            context=recipe.data.max_length,
            threads=max(1, int(recipe.training.resources.cpus)),
            tensor_parallel=self._engine.tensor_parallel,
            trust=recipe.model.trust,
            others=weight_bytes_of_writer(recipe) + GPU_OVERHEAD_BYTES,
        )

    @cached_property
    def _reference(self) -> Any:
        return place_model(self._load(self._corpus.recipe.model.base), self._device)

    def _load(self, base: str, head: int | None = None) -> Any:
        settings = self._corpus.recipe.model
        model: Any = load_model(base, self._dtype, settings.attention, head=head, trust=settings.trust)
        return model.to(self._device).requires_grad_(False)

    def _scored_replies(self, policy: Any, prompts: Sequence[Prompt]) -> tuple[list[Rollout], Tensor, Counter[str]]:
        """Replies to the prompts, their rewards (prompts, group), and the number of groups left out: task → groups.

        Groups whose replies all have one reward are drawn anew, and then left out, as `training.grpo.redraws` says; it is DAPO's
        dynamic sampling (Yu et al. 2025, section 3.2), which draws other prompts instead.
        """
        grpo, left_out = self._corpus.recipe.training.grpo, Counter[str]()
        replies = self._replies(policy, prompts)
        rewards = self._rewards.score(replies).view(-1, grpo.group)
        if grpo.redraws is None:
            return replies, rewards, left_out
        for attempt in range(1, grpo.redraws + 1):
            places = _equal_groups(rewards)
            if not places:
                break
            drawn = self._replies(policy, [prompts[place] for place in places], attempt)
            rewards[places] = self._rewards.score(drawn).view(-1, grpo.group)
            for number, place in enumerate(places):
                replies[place * grpo.group : (place + 1) * grpo.group] = drawn[number * grpo.group : (number + 1) * grpo.group]
        equal = set(_equal_groups(rewards))
        left_out.update(self._corpus.tasks[prompts[place].task].name for place in equal)
        kept = [place for place in range(len(prompts)) if place not in equal]
        return (
            [reply for place in kept for reply in replies[place * grpo.group : (place + 1) * grpo.group]],
            rewards[kept],
            left_out,
        )

    def _replies(self, policy: Any, prompts: Sequence[Prompt], attempt: int = 0) -> list[Rollout]:
        """`training.grpo.group` sampled replies to each prompt, in the prompts' order; each reply has its own random seed."""
        grpo, seed = self._corpus.recipe.training.grpo, self._corpus.recipe.seed
        stops = frozenset(self._corpus.layout.stop_ids)
        requests = [(prompt, number) for prompt in prompts for number in range(attempt * grpo.group, (attempt + 1) * grpo.group)]
        if not requests:
            return []
        if self._vllm is not None:
            ids_of_prompts = [prompt.ids for prompt, _ in requests]
            seeds = [key_of(seed, "reply", prompt.position, number) for prompt, number in requests]
            replies = self._vllm.sample(ids_of_prompts, seeds, max_new_tokens=grpo.max_new_tokens, stop_ids=stops)
            return [Rollout(prompt, *reply) for (prompt, _), reply in zip(requests, replies, strict=True)]
        scheduler = make_scheduler(policy, slots=min(AT_ONCE, len(requests)), context=self._corpus.recipe.data.max_length)
        for place, (prompt, number) in enumerate(requests):
            sampling = Sampling(1.0, seed=key_of(seed, "reply", prompt.position, number))
            scheduler.submit(place, GenerationRequest(prompt.ids, grpo.max_new_tokens, stops, sampling))
        ids: dict[Hashable, list[int]] = {place: [] for place in range(len(requests))}
        has_ended: dict[Hashable, bool] = {}
        while scheduler.running or scheduler.waiting:
            for token in scheduler.step():
                ids[token.key].append(token.id)
                has_ended[token.key] = token.finish == "stop"
        return [Rollout(prompt, ids[place], has_ended[place]) for place, (prompt, _) in enumerate(requests)]

    def _columns(self, replies: Sequence[Rollout], rows: Sequence[Sequence[int]], per_reply: dict[str, NDArray[Any]]) -> Rows:
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
        """Log-probability of every reply token under `model`, (rows, length); 0 for all other tokens."""
        rows = PackedRows.from_columns(columns)
        log_probabilities = np.zeros(rows.input_ids.shape, np.float32)
        with torch.no_grad(), packed_attention(model, self._corpus.recipe.model.attention, self._device, self._dtype):
            targets = TargetLosses(model.eval())
            for start, batch in zip(self._starts(len(rows)), rows.micro_batches(self._rows_at_once), strict=True):
                assert isinstance(batch, SupervisedBatch)
                values = token_log_probabilities(targets, move_batch(batch, self._device)).cpu().numpy()
                log_probabilities[start : start + self._rows_at_once, : values.shape[1]] = values
        return log_probabilities

    def _starts(self, rows: int) -> Iterator[int]:
        return iter(range(0, rows, self._rows_at_once))


def _equal_groups(rewards: Tensor) -> list[int]:
    """Numbers of the groups in `rewards` (prompts, group) whose replies all have one reward."""
    return (rewards == rewards[:, :1]).all(dim=1).nonzero()[:, 0].tolist()


def weight_bytes_of_writer(recipe: Recipe) -> int:
    """Bytes of the models that a writer of replies holds: the policy, the reward model, and the reference where it is needed."""
    grpo, on_gpu = recipe.training.grpo, recipe.training.resources.gpus > 0
    bases = [recipe.model.base, *([grpo.reward_model] if grpo.reward_model else []), *([recipe.model.base] if grpo.beta else [])]
    return sum(weight_bytes(local_folder(base), recipe.model.dtype, gpu=on_gpu) for base in bases)
