"""Rewards of sampled replies: the weighted sum of the recipe's terms, functions of the text and a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apprentice.data.corpus import Corpus
from apprentice.data.window import Prompt
from apprentice.models.reward import choice_rewards
from apprentice.recipe import RewardTerm
from apprentice.rewards.reward_process import Reply, RewardProcess


class Rollout(NamedTuple):
    """A reply of the policy: token ids, with the stop token where it `has_ended` with one and was not cut at the longest length."""

    prompt: Prompt
    ids: list[int]
    has_ended: bool


class ReplyRewards:
    """Scores replies. `load_judge` loads the reward model of a name, once, if the recipe has one."""

    def __init__(self, corpus: Corpus, load_judge: Callable[[str], Any]) -> None:
        self._corpus, self._load_judge = corpus, load_judge
        self._grpo = corpus.recipe.training.grpo
        folder = corpus.working_folder
        self._processes = {place: RewardProcess(term, folder) for place, term in enumerate(self._terms) if term.function}

    @property
    def _terms(self) -> Sequence[RewardTerm]:
        return self._grpo.reward_terms

    @cached_property
    def _judge(self) -> Any:
        assert self._grpo.reward_model is not None, "the recipe names a reward model"
        return self._load_judge(self._grpo.reward_model)

    def score(self, replies: Sequence[Rollout]) -> Tensor:
        """Reward of every reply, float32 (replies,). Raises `TrainingError` if a function gives none."""
        total = torch.zeros(len(replies), dtype=torch.float64)
        if not replies:
            return total.float()
        for place, term in enumerate(self._terms):
            rewards = self._processes[place].score(self._texts(replies)) if term.function else self._judge_rewards(replies)
            total += term.weight * torch.tensor(rewards, dtype=torch.float64)
        return (total - self._overlong(replies)).float()

    def _overlong(self, replies: Sequence[Rollout]) -> Tensor:
        """What is taken off for length: 0 up to `overlong_tokens` before the longest length, then evenly more, 1 at the longest.

        It is DAPO's soft overlong punishment (Yu et al. 2025, equation 13).
        """
        if not self._grpo.overlong_tokens:
            return torch.zeros(len(replies), dtype=torch.float64)
        lengths = torch.tensor([len(reply.ids) for reply in replies], dtype=torch.float64)
        beyond = lengths - (self._grpo.max_new_tokens - self._grpo.overlong_tokens)
        return (beyond / self._grpo.overlong_tokens).clamp(0.0, 1.0)

    def _texts(self, replies: Sequence[Rollout]) -> list[Reply]:
        decode, tasks = self._corpus.layout.tokenizer.decode, self._corpus.tasks
        return [
            Reply(prompt.text, decode(ids), prompt.references, tasks[prompt.task].name, prompt.row) for prompt, ids, _ in replies
        ]

    def _judge_rewards(self, replies: Sequence[Rollout]) -> list[float]:
        """The reward model's numbers. A reply that was cut is scored with an answer's end, like all others."""
        end = list(self._corpus.layout.end_ids)
        texts = [(reply.ids[:-1] if reply.has_ended else reply.ids) + end for reply in replies]
        rewards = choice_rewards(self._judge, [reply.prompt.ids for reply in replies], [[ids] for ids in texts])
        return list(chain.from_iterable(rewards))
