"""A model in vLLM that answers lists of prompts, for evaluation, prediction and the writers of rounds; API of vLLM 0.29.

Its processes, one for each GPU that the model is split over, end with the process that made it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from apprentice.inference.generation_request import NotFiniteError
from apprentice.model_pool.parent_death import guard_children
from apprentice.model_pool.vllm_arguments import find_free_share, prepare_environment, start_failure, vllm_arguments

MOST_RUNNING = 64  # requests decoded together: the largest block of questions
LARGEST_SEED = 2**63  # a seed of vLLM is a signed number of 64 bits
BATCH_TOKENS = 2048  # of one forward pass: a choice's score takes the logits of all its tokens, four bytes a word of the vocabulary


class VllmModel:
    """The model in `folder`, for prompts and replies of `context` tokens together, on the GPUs that this process was given.

    `others` bytes of each GPU are left to other models of this process. On CPUs (`device` "cpu") each of `tensor_parallel`
    processes has `threads` threads. Raises `ModelError` if vLLM does not start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: Literal["cpu", "cuda"],
        dtype: str,
        context: int,
        threads: int,
        tensor_parallel: int = 1,
        trust: bool = False,
        others: int = 0,
    ) -> None:
        prepare_environment(max(1, threads // tensor_parallel) if device == "cpu" else None)
        # One token is generated after a scored choice that may end at the model's last position; it is never read again.
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        guard_children()
        import vllm

        self._sampling: Any = vllm.SamplingParams
        settings: dict[str, Any] = {"device": device, "dtype": dtype, "context": context + 1, "trust": trust}
        if device == "cuda":
            settings["free_share"] = find_free_share(others)
        arguments = vllm_arguments(folder, **settings, max_running=MOST_RUNNING, kv_bytes=None, tensor_parallel=tensor_parallel)
        try:
            self._llm: Any = vllm.LLM(**arguments, max_num_batched_tokens=BATCH_TOKENS)
        except (RuntimeError, ValueError, OSError) as error:
            raise start_failure(folder, error) from error

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int]) -> list[list[int]]:
        """Greedy replies to `prompts` (token ids), in their order, without the stop id that ended them.

        Raises `NotFiniteError` for a reply with a log-probability that is no number.
        """
        replies = self._replies(prompts, [self._reply_sampling(max_new_tokens, stop_ids, temperature=0.0)] * len(prompts))
        return [ids[:-1] if has_ended else ids for ids, has_ended in replies]

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> list[tuple[list[int], bool]]:
        """Replies to `prompts` at temperature 1, each with its own seed: token ids, and whether a stop id, their last, ended them.

        Raises `NotFiniteError` as `generate` does.
        """
        samplings = [self._reply_sampling(max_new_tokens, stop_ids, temperature=1.0, seed=seed % LARGEST_SEED) for seed in seeds]
        return self._replies(prompts, samplings)

    def load_weights(self, folder: Path) -> None:
        """Takes the weights in `folder`, of a model of the same architecture, in place of its own; its processes go on."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()  # keys and values of the earlier weights

    def _reply_sampling(self, max_new_tokens: int, stop_ids: Collection[int], **settings: Any) -> Any:
        return self._sampling(
            max_tokens=max_new_tokens,
            logprobs=0,
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,  # `stop_token_ids` end the reply
            detokenize=False,
            **settings,
        )

    def _replies(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Any]) -> list[tuple[list[int], bool]]:
        replies = []
        for number, output in enumerate(self._answer(prompts, samplings)):
            (reply,) = output.outputs
            if any(not math.isfinite(scores[id].logprob) for id, scores in zip(reply.token_ids, reply.logprobs, strict=True)):
                raise NotFiniteError(number)
            replies.append((list(reply.token_ids), reply.finish_reason == "stop"))
        return replies

    def choice_logprobs(self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Natural log-probability of every choice (token ids) after its prompt: the sum over the tokens of the choice.

        `choices[i]` are those of `prompts[i]`; the result has the same order.
        """
        rows = [(list(prompt), list(ids)) for prompt, group in zip(prompts, choices, strict=True) for ids in group]
        sampling = self._sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        outputs = self._answer([prompt + ids for prompt, ids in rows], [sampling] * len(rows))
        sums = iter(
            sum(scores[id].logprob for id, scores in zip(ids, output.prompt_logprobs[len(prompt) :], strict=True))
            for (prompt, ids), output in zip(rows, outputs, strict=True)
        )
        return [[next(sums) for _ in group] for group in choices]

    def _answer(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        answers: list[Any] = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], list(samplings), use_tqdm=False
        )
        return answers
