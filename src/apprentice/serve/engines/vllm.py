"""Engine for causal models through vLLM, whose scheduler and model run in processes of their own beside this one.

vLLM takes and returns token ids only. Prompt formats, stop strings, the shape of log-probabilities, keys and limits are handled
outside of it, in the same code as for the other engine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import shutil
import tempfile
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any, Literal, Self

from apprentice.errors import ModelError
from apprentice.inference.generation_request import GeneratedToken, GenerationRequest, ScoredToken
from apprentice.inference.lora import read_lora
from apprentice.inference.token_pacing import pacing_seconds
from apprentice.model_pool.parent_death import guard_children
from apprentice.model_pool.vllm_arguments import prepare_environment, start_failure, vllm_arguments
from apprentice.models.loading import build_without_weights
from apprentice.pretrained.architecture import model_config
from apprentice.run.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from apprentice.serve.api.schemas.requests import MOST_TOP
from apprentice.serve.engines.base import EngineFailed, EngineStats, Overloaded, RequestFailed
from apprentice.serve.engines.compat import (
    AsyncEngineArgs,
    AsyncLLM,
    EngineDeadError,
    EngineGenerateError,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    kv_cache_tokens,
    tokens_input,
)

log = logging.getLogger(__name__)
MOST_RANK = 64  # largest rank of an adapter: vLLM reserves room for it in every layer at the start
_LOAD_TIMEOUT_S = 300.0
_LOOK_S = 0.025  # between two looks for a reply's end while its tokens wait for the pace


class VllmEngine:
    """`Engine` over the model in `folder`: decodes up to `max_running` requests together while up to `max_queued` more wait.

    Must be made in the event loop that uses it. `dtype` is `auto`, `bfloat16` or `float32`. The model is split over
    `tensor_parallel` GPUs, or processes on a CPU. The KV cache takes `kv_bytes` bytes (None: on GPUs its share of what is free with
    `engines` engines beside each other, on a CPU `max_running` contexts). On a CPU, `threads` threads do the arithmetic; if those
    are all CPUs, vLLM leaves one to its scheduler. `adapters` is how many LoRA adapters may be in memory at once (0: none). Raises
    `ModelError` if vLLM does not start.
    """

    follows_any_constraint = False  # vLLM's own processes follow grammars

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        max_running: int,
        max_queued: int,
        context: int,
        threads: int,
        kv_bytes: int | None = None,
        trust: bool = False,
        adapters: int = 0,
        device: Literal["cpu", "cuda"] = "cpu",
        tensor_parallel: int = 1,
        engines: int = 1,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        config = model_config(folder)
        self.context = min(context, config.get("max_position_embeddings") or context)
        self._capacity = max_running + max_queued
        self._folder, self._trust = folder, trust
        self._shape: Any = None  # the model without weights, which adapters must fit; made for the first adapter
        self._numbers = itertools.count(1)
        self._streams: set[VllmStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted = self._prompt_tokens = self.produced = self.shared = 0
        self._failure: str | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="apprentice-vllm-")
        settings = vllm_arguments(
            folder,
            device=device,
            dtype=dtype,
            max_running=max_running,
            context=self.context,
            kv_bytes=kv_bytes,
            trust=trust,
            tensor_parallel=tensor_parallel,
            engines=engines,
        )
        arguments = _endpoint_arguments(settings, adapters)
        prepare_environment(max(1, threads // tensor_parallel))
        guard_children()
        try:
            self._llm = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise start_failure(folder, error) from error
        self._kv_tokens = kv_cache_tokens(self._llm)
        self._end_id: int | None = self._llm.get_tokenizer().eos_token_id

    @property
    def capacity(self) -> int:
        """Most requests that run and wait together."""
        return self._capacity

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model's weights have."""
        return int(self._llm.model_config.get_vocab_size())

    def load_adapter(self, folder: Path) -> VllmAdapter:
        """Loads the adapter in `folder` and tries whether vLLM takes it. Raises `ModelError`."""
        if self._shape is None:
            self._shape = build_without_weights(self._folder, trust=self._trust)
        ranks = {len(down) for down, _ in read_lora(folder, self._shape).layers.values()}
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config.get("alpha_pattern") or len(ranks) > 1:
            raise ModelError(f"the adapter in {folder} has ranks or scales of its own for some layers, which vLLM has not.")
        if max(ranks, default=0) > MOST_RANK:
            raise ModelError(f"the adapter in {folder} has rank {max(ranks)}, and with vLLM at most {MOST_RANK} fits.")
        number = next(self._numbers)
        copy = Path(self._scratch.name) / str(number)  # vLLM reads the files again after it evicted the adapter
        copy.mkdir()
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy(folder / file, copy / file)
        adapter = VllmAdapter(LoRARequest(str(number), number, str(copy)))
        weakref.finalize(adapter, self._remove_adapter, number, copy).atexit = False
        try:
            asyncio.run_coroutine_threadsafe(self._llm.add_lora(adapter.request), self._loop).result(_LOAD_TIMEOUT_S)
        except (TimeoutError, EngineDeadError) as error:
            raise ModelError(f"the adapter in {folder} cannot be loaded: vLLM does not answer.") from error
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"the adapter in {folder} is refused by vLLM: {reason}") from error
        return adapter

    def _remove_adapter(self, number: int, copy: Path) -> None:
        """Removes an adapter that nothing refers to any more, so that its place in vLLM is free for another."""

        async def remove() -> None:
            try:
                await self._llm.remove_lora(number)
            except Exception as error:
                log.debug("adapter %d is not removed: %s", number, error)
            shutil.rmtree(copy, ignore_errors=True)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.run_in_background(remove()))

    def generate(self, requests: list[GenerationRequest]) -> list[VllmStream]:
        """Passes the requests to vLLM. Raises `Overloaded` or `EngineFailed`, and accepts none then."""
        self.check()
        if len(self._streams) + len(requests) > self._capacity:
            raise Overloaded
        streams = [VllmStream(self, request) for request in requests]
        self._streams.update(streams)
        self._accepted += len(requests)
        self._prompt_tokens += sum(len(request.prompt) for request in requests)
        return streams

    def new_key(self) -> str:
        """A key that no other request has."""
        return str(next(self._numbers))

    def outputs(self, key: str, request: GenerationRequest) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for the request, which enters when the first one is awaited; closing the generator aborts it."""
        outputs: AsyncGenerator[Any, None] = self._llm.generate(
            tokens_input(list(request.prompt)),
            _sampling(request, self._end_id),
            key,
            lora_request=request.adapter and request.adapter.request,
        )
        return outputs

    def forget(self, stream: VllmStream) -> None:
        """Drops a stream that has ended or is given up."""
        self._streams.discard(stream)

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in the engine's event loop; a task that nobody refers to might be collected before its end."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def pacing_seconds(self) -> float:
        """Least seconds between two groups of a reply's tokens at the present load."""
        return pacing_seconds(len(self._streams))

    def failure(self) -> EngineFailed:
        """The error of whoever needs the engine now that it has stopped."""
        return EngineFailed(self._failure or "vLLM's own process has ended; its log says why")

    def stats(self) -> EngineStats:
        """The current gauges and counters."""
        running = [stream for stream in self._streams if stream.kv_tokens]
        used = sum(stream.kv_tokens for stream in running) / max(self._kv_tokens, 1)
        return EngineStats(
            len(running),
            len(self._streams) - len(running),
            self._accepted,
            self.produced,
            self._prompt_tokens,
            self.shared,
            used,
            used,  # vLLM reserves nothing: where memory runs out, it preempts a request and computes it again later
            self._kv_tokens,
        )

    def check(self) -> None:
        """Raises `EngineFailed` if vLLM has stopped."""
        if self._failure is not None or self._llm.errored:
            raise self.failure()

    def close(self) -> None:
        """Stops vLLM; replies in progress fail."""
        if self._failure is not None:
            return
        self._failure = "the engine was closed"
        for stream in self._streams:
            stream.stop_reading()
        self._llm.shutdown()
        self._scratch.cleanup()


class VllmAdapter:
    """An adapter that vLLM has loaded; its copy on disk is removed when this object is collected."""

    def __init__(self, request: LoRARequest) -> None:
        self.request = request


class VllmStream:
    """Token stream of one reply from vLLM; under load a step gives several tokens, which vLLM has joined meanwhile."""

    def __init__(self, engine: VllmEngine, request: GenerationRequest) -> None:
        self._engine = engine
        self._request = request
        self._key = engine.new_key()
        self._outputs = engine.outputs(self._key, request)
        self._reading: asyncio.Task[list[GeneratedToken]] | None = None
        self.kv_tokens = 0  # tokens of prompt and reply in vLLM's KV cache, as far as its outputs show
        self._sent_at = 0.0
        self._has_ended = False
        self._prompt_scores: tuple[ScoredToken, ...] = ()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[GeneratedToken]:
        if self._has_ended:
            raise StopAsyncIteration
        self._engine.check()
        self._reading = asyncio.create_task(self._next_tokens())
        try:
            tokens = await self._reading
        except asyncio.CancelledError:
            self._engine.check()  # the engine was closed, and has cancelled the task
            raise
        self._sent_at = time.monotonic()
        self._has_ended = tokens[-1].finish is not None
        return tokens

    async def _next_tokens(self) -> list[GeneratedToken]:
        """The next tokens, at least one: all that come until the load allows another group, or until the reply's end."""
        due = self._sent_at + self._engine.pacing_seconds()
        tokens: list[GeneratedToken] = []
        try:
            while True:
                tokens += self._read(await anext(self._outputs))
                if tokens and (tokens[-1].finish is not None or time.monotonic() >= due):
                    break
                await asyncio.sleep(min(_LOOK_S, max(0.0, due - time.monotonic())))
            if tokens[-1].finish is not None:
                await anext(self._outputs, None)  # lets vLLM's generator end; closed before that, it would abort the request
        except (EngineDeadError, StopAsyncIteration) as error:
            raise self._engine.failure() from error
        except (EngineFailed, RequestFailed):
            raise
        except Exception as error:  # vLLM refuses requests by exceptions of many types
            cause = error.__cause__ if isinstance(error, EngineGenerateError) else None
            raise RequestFailed(" ".join(str(cause or error).split())[:300]) from error
        return tokens

    def _read(self, output: Any) -> list[GeneratedToken]:
        request, (reply,) = self._request, output.outputs
        if request.score_from is not None and output.prompt_logprobs:
            places = list(zip(request.prompt, output.prompt_logprobs, strict=True))[request.score_from :]
            self._prompt_scores = tuple(_score(id, candidates, request.logprobs or 0) for id, candidates in places)
        scores: list[ScoredToken | None] = [None] * len(reply.token_ids)
        if (most := request.logprobs) is not None:
            scores = [_score(id, candidates, most) for id, candidates in zip(reply.token_ids, reply.logprobs, strict=True)]
        tokens = [GeneratedToken(self._key, id, None, score) for id, score in zip(reply.token_ids, scores, strict=True)]
        if reply.finish_reason is not None:
            if not tokens or reply.finish_reason not in ("stop", "length"):
                raise self._engine.failure()
            tokens[-1] = tokens[-1]._replace(finish=reply.finish_reason)
        if tokens and self._prompt_scores:
            tokens[0], self._prompt_scores = tokens[0]._replace(prompt_scores=self._prompt_scores), ()
        if not self.kv_tokens:
            self.kv_tokens = len(request.prompt)
            reused = output.num_cached_tokens or 0
            self._engine.shared += reused
            if tokens:
                tokens[0] = tokens[0]._replace(reused=reused)
        self.kv_tokens += len(tokens)
        self._engine.produced += len(tokens)
        return tokens

    def stop_reading(self) -> None:
        """Ends the wait for tokens, with `EngineFailed` once the engine is closed; vLLM aborts the request."""
        if self._reading is not None:
            self._reading.cancel()

    def close(self) -> None:
        """Ends the stream, and aborts its request in vLLM unless it has ended."""
        self._engine.forget(self)
        if not self._has_ended:
            self._engine.run_in_background(self._abort())

    async def _abort(self) -> None:
        try:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.gather(self._reading, return_exceptions=True)
            await self._outputs.aclose()
        except Exception as error:
            log.debug("not aborted: %s", error)


def _endpoint_arguments(settings: dict[str, Any], adapters: int) -> AsyncEngineArgs:
    """vLLM's arguments for an endpoint: `settings` of the model, with grammars, scores and room for `adapters` LoRA adapters."""
    loras: dict[str, Any] = {}
    if adapters:
        # One slot more than adapters: on a CPU, vLLM 0.29 applies the adapter in the last slot to rows without an adapter.
        places = adapters + 1
        loras = {"enable_lora": True, "max_lora_rank": MOST_RANK, "max_loras": places, "max_cpu_loras": places}
    return AsyncEngineArgs(
        **settings,
        structured_outputs_config={"backend": "guidance"},
        max_logprobs=MOST_TOP,
        disable_log_stats=True,
        **loras,
    )


def _sampling(request: GenerationRequest, end_id: int | None) -> SamplingParams:
    sampling, stop_ids = request.sampling, frozenset(request.stop_ids)
    constraint: Any = request.constraint  # has a `grammar` besides what `Constraint` asks for
    if constraint is not None and end_id is not None:
        stop_ids |= {end_id}  # vLLM's own grammar matcher ends a reply with this id
    return SamplingParams(
        max_tokens=request.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed % 2**63 if sampling.temperature else None,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.bias) or None,
        logprobs=request.logprobs,
        prompt_logprobs=None if request.score_from is None else request.logprobs or 0,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,  # `stop_token_ids` end the reply
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if constraint is None else _structured_outputs(constraint.grammar),
        skip_clone=True,
    )


def _structured_outputs(grammar: str) -> StructuredOutputsParams:
    """Converts an llguidance grammar (Lark, or JSON that contains Lark or a JSON schema) to vLLM's parameters."""
    if not grammar.startswith("{"):
        return StructuredOutputsParams(grammar=grammar)
    (source,) = json.loads(grammar)["grammars"]
    if lark := source.get("lark_grammar"):
        return StructuredOutputsParams(grammar=lark)
    return StructuredOutputsParams(json=source["json_schema"])


def _score(id: int, candidates: Any, most: int) -> ScoredToken:
    """Score of token `id`; `candidates` has vLLM's rank and log-probability by id, for `id` and the best (a text's first: None)."""
    if candidates is None:
        return ScoredToken(id, None)
    best = sorted((one.rank, other, one.logprob) for other, one in candidates.items() if one.rank <= most)
    return ScoredToken(id, candidates[id].logprob, tuple((other, logprob) for _, other, logprob in best[:most]))
