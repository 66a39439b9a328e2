"""Causal models as an engine through vLLM, whose scheduler and model run in processes of their own beside this one.

vLLM gets token ids and gives token ids: layout, stop texts, scores' shape, keys and limits are ours, as with the other engine.
Knows nothing of text or HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self

# Before vLLM is imported, which reads them: nothing is reported to anybody, and a replica's log holds no more than warnings.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from apprentice.errors import ModelError
from apprentice.inference.lora import CONFIG, WEIGHTS, read_lora
from apprentice.models.loading import resolve_dtype, without_weights
from apprentice.pretrained.architecture import kv_numbers, model_config
from apprentice.serve.api.schemas import MOST_TOP
from apprentice.serve.engines.base import EngineFailed, NewToken, Overloaded, Request, RequestFailed, Score, Stats
from apprentice.serve.engines.parent_death import guard_children

log = logging.getLogger(__name__)
MOST_RANK = 64  # of an adapter: vLLM keeps room for it in every layer from the start
_LOAD_TIMEOUT_S = 300.0
_BLOCK = 128  # tokens whose keys and values vLLM keeps together on a CPU; fewer on a GPU
# Under load tokens go out several at once: a reply's are held for so long for each request that runs, but not longer than the most.
_PACE_S, _MOST_PACE_S = 0.003, 0.1


class VllmEngine:
    """The model in `folder`, decoding up to `max_running` requests together while up to `max_queued` more wait.

    Made in the event loop that asks it. `dtype` is `auto`, `bfloat16` or `float32`; keys and values take at most `kv_bytes` (None:
    `max_running` contexts); on a CPU `threads` do the arithmetic, or, where those are all there are, all but the one that vLLM
    leaves to its scheduler. `adapters` (0: none) are in memory at once. Raises `ModelError` if vLLM does not start.
    """

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
    ) -> None:
        self._loop = asyncio.get_running_loop()
        config = model_config(folder)
        self.context = min(context, config.get("max_position_embeddings") or context)
        self._most = max_running + max_queued
        self._folder, self._trust = folder, trust
        self._shape: Any = None  # the model that adapters must fit
        self._numbers = itertools.count(1)
        self._replies: set[_Reply] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted = self._prompt_tokens = self.produced = self.shared = 0
        self._failure: str | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="apprentice-vllm-")
        arguments = _arguments(
            folder, dtype, max_running=max_running, context=self.context, kv_bytes=kv_bytes, trust=trust, adapters=adapters
        )
        _use_threads(threads)
        guard_children()
        try:
            self._llm = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"vLLM does not start with {folder}: {reason}") from error
        cache = self._llm.vllm_config.cache_config
        self._kv_tokens = int(cache.num_gpu_blocks or 0) * int(cache.block_size)
        self._end_id: int | None = self._llm.get_tokenizer().eos_token_id

    @property
    def capacity(self) -> int:
        return self._most

    @property
    def vocabulary(self) -> int:
        return int(self._llm.model_config.get_vocab_size())

    def adapter(self, folder: Path) -> Adapter:
        if self._shape is None:
            self._shape = without_weights(self._folder, trust=self._trust)
        ranks = {len(down) for down, _ in read_lora(folder, self._shape).layers.values()}
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("alpha_pattern") or len(ranks) > 1:
            raise ModelError(f"the adapter in {folder} has ranks or scales of its own for some layers, which vLLM has not.")
        if max(ranks, default=0) > MOST_RANK:
            raise ModelError(f"the adapter in {folder} has rank {max(ranks)}, and with vLLM at most {MOST_RANK} fits.")
        number = next(self._numbers)
        copy = Path(self._scratch.name) / str(number)  # vLLM reads it again when it had to put it out of memory
        copy.mkdir()
        for file in (CONFIG, WEIGHTS):
            shutil.copy(folder / file, copy / file)
        adapter = Adapter(LoRARequest(str(number), number, str(copy)))
        weakref.finalize(adapter, self._put_away, number, copy).atexit = False
        try:
            asyncio.run_coroutine_threadsafe(self._llm.add_lora(adapter.request), self._loop).result(_LOAD_TIMEOUT_S)
        except (TimeoutError, EngineDeadError) as error:
            raise ModelError(f"the adapter in {folder} cannot be loaded: vLLM does not answer.") from error
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"the adapter in {folder} is refused by vLLM: {reason}") from error
        return adapter

    def _put_away(self, number: int, copy: Path) -> None:
        """Nobody has the adapter any more: its place in vLLM is free for another."""

        async def put_away() -> None:
            try:
                await self._llm.remove_lora(number)
            except Exception as error:
                log.debug("adapter %d is not put away: %s", number, error)
            shutil.rmtree(copy, ignore_errors=True)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self._start(put_away()))

    def generate(self, requests: list[Request]) -> list[_Reply]:
        self.check()
        if len(self._replies) + len(requests) > self._most:
            raise Overloaded
        replies = [_Reply(self, request) for request in requests]
        self._replies.update(replies)
        self._accepted += len(requests)
        self._prompt_tokens += sum(len(request.prompt) for request in requests)
        return replies

    async def enter(self, request: Request) -> Any:
        """Hands the request over to vLLM; gives the queue of its outputs."""
        return await self._llm.add_request(
            str(next(self._numbers)),
            tokens_input(list(request.prompt)),
            _sampling(request, self._end_id),
            lora_request=request.adapter and request.adapter.request,
        )

    def forget(self, reply: _Reply, entering: asyncio.Task[Any] | None) -> None:
        """A reply has ended (None), or nobody wants it any more, wherever it stands."""
        if reply not in self._replies:
            return
        self._replies.remove(reply)
        if entering is None:
            return
        self._start(self._abort(entering))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort(self, entering: asyncio.Task[Any]) -> None:
        try:
            await self._llm.abort((await entering).request_id, internal=True)
        except Exception as error:
            log.debug("not aborted: %s", error)

    def pace_s(self) -> float:
        """How long a reply's tokens are held back now."""
        return min(_MOST_PACE_S, _PACE_S * (len(self._replies) - 1))

    def failed(self) -> EngineFailed:
        return EngineFailed(self._failure or "vLLM's own process has ended; its log says why")

    def stats(self) -> Stats:
        running = [reply for reply in self._replies if reply.held]
        used = sum(reply.held for reply in running) / max(self._kv_tokens, 1)
        return Stats(
            len(running),
            len(self._replies) - len(running),
            self._accepted,
            self.produced,
            self._prompt_tokens,
            self.shared,
            used,
            used,  # vLLM reserves nothing: where memory runs out, it puts a request back and computes it again later
            self._kv_tokens,
        )

    def check(self) -> None:
        if self._failure is not None or self._llm.errored:
            raise self.failed()

    def close(self) -> None:
        if self._failure is not None:
            return
        self._failure = "the engine was closed"
        for reply in self._replies:
            reply.fail()
        self._llm.shutdown()
        self._scratch.cleanup()


class Adapter:
    """An adapter that vLLM has read; the copy that it reads goes when this does."""

    def __init__(self, request: LoRARequest) -> None:
        self.request = request


class _Reply:
    """One reply's tokens on their way from vLLM, several at a time when many run."""

    def __init__(self, engine: VllmEngine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._entering = asyncio.get_running_loop().create_task(engine.enter(request))
        self.held = 0  # tokens of prompt and reply that vLLM has keys and values of, as far as it has told
        self._passed_on = 0.0
        self._ended = False
        self._prompt: tuple[Score, ...] = ()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[NewToken]:
        if self._ended:
            raise StopAsyncIteration
        try:
            try:
                queue = await asyncio.shield(self._entering)
            except EngineDeadError:
                raise
            except Exception as error:  # vLLM refuses by many kinds of them
                raise RequestFailed(" ".join(str(error).split())[:300]) from error
            early = self._passed_on + self._engine.pace_s() - time.monotonic()
            if early > 0 and not (queue.output is not None and queue.output.finished):
                await asyncio.sleep(early)
            tokens: list[NewToken] = []
            while not tokens:
                tokens = self._read(queue.get_nowait() or await queue.get())
        except EngineDeadError as error:
            raise self._engine.failed() from error
        self._passed_on = time.monotonic()
        self._ended = tokens[-1].finish is not None
        return tokens

    def _read(self, output: Any) -> list[NewToken]:
        wanted, (reply,) = self._request, output.outputs
        if wanted.score_from is not None and output.prompt_logprobs:
            places = list(zip(wanted.prompt, output.prompt_logprobs, strict=True))[wanted.score_from :]
            self._prompt = tuple(_score(id, found, wanted.logprobs or 0) for id, found in places)
        scores: list[Score | None] = [None] * len(reply.token_ids)
        if (most := wanted.logprobs) is not None:
            scores = [_score(id, found, most) for id, found in zip(reply.token_ids, reply.logprobs, strict=True)]
        tokens = [NewToken(id, None, score) for id, score in zip(reply.token_ids, scores, strict=True)]
        if reply.finish_reason is not None:
            if not tokens or reply.finish_reason not in ("stop", "length"):
                raise self._engine.failed()
            tokens[-1] = tokens[-1]._replace(finish=reply.finish_reason)
        if tokens and self._prompt:
            tokens[0], self._prompt = tokens[0]._replace(prompt=self._prompt), ()
        if not self.held:
            self.held = len(wanted.prompt)
            cached = output.num_cached_tokens or 0
            self._engine.shared += cached
            if tokens:
                tokens[0] = tokens[0]._replace(cached=cached)
        self.held += len(tokens)
        self._engine.produced += len(tokens)
        return tokens

    def fail(self) -> None:
        """Whoever waits for tokens learns that none will come."""

        def tell(entering: asyncio.Task[Any]) -> None:
            if not entering.cancelled() and entering.exception() is None:
                entering.result().put(EngineDeadError())

        self._entering.add_done_callback(tell)

    def close(self) -> None:
        self._engine.forget(self, None if self._ended else self._entering)


def _arguments(
    folder: Path, dtype: str, *, max_running: int, context: int, kv_bytes: int | None, trust: bool, adapters: int
) -> AsyncEngineArgs:
    kind = resolve_dtype(dtype)
    if kv_bytes is None and (numbers := kv_numbers(model_config(folder))) is not None:
        kv_bytes = numbers * kind.itemsize * max_running * -(-context // _BLOCK) * _BLOCK
    loras: dict[str, Any] = {}
    if adapters:
        # One place more than adapters: on a CPU, vLLM 0.29 adds what lies in the last place to rows without an adapter.
        places = adapters + 1
        loras = {"enable_lora": True, "max_lora_rank": MOST_RANK, "max_loras": places, "max_cpu_loras": places}
    return AsyncEngineArgs(
        model=str(folder),
        dtype=str(kind).removeprefix("torch."),
        max_model_len=context,
        max_num_seqs=max_running,
        kv_cache_memory_bytes=kv_bytes,
        load_format="auto" if trust else "safetensors",
        trust_remote_code=trust,
        generation_config="vllm",  # what is sampled how is each request's to say
        structured_outputs_config={"backend": "guidance"},
        max_logprobs=MOST_TOP,
        disable_log_stats=True,
        **loras,
    )


def _sampling(request: Request, end_id: int | None) -> SamplingParams:
    stop_ids = request.stop_ids
    if request.constraint is not None and end_id is not None:
        stop_ids |= {end_id}  # vLLM's own matcher ends a form with this one
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed % 2**63 if request.temperature else None,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=dict(request.logit_bias) or None,
        logprobs=request.logprobs,
        prompt_logprobs=None if request.score_from is None else request.logprobs or 0,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,  # the request's own ids end it
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if request.constraint is None else _form(request.constraint.grammar),
        skip_clone=True,
    )


def _form(grammar: str) -> StructuredOutputsParams:
    """A grammar of llguidance, which is Lark or holds Lark or a JSON schema in JSON, in vLLM's words."""
    if not grammar.startswith("{"):
        return StructuredOutputsParams(grammar=grammar)
    (held,) = json.loads(grammar)["grammars"]
    if lark := held.get("lark_grammar"):
        return StructuredOutputsParams(grammar=lark)
    return StructuredOutputsParams(json=held["json_schema"])


def _score(id: int, found: Any, most: int) -> Score:
    """`found`: rank and log-probability by token, of the best and of `id`; None for a text's first."""
    if found is None:
        return Score(id, None)
    best = sorted((one.rank, other, one.logprob) for other, one in found.items() if one.rank <= most)
    return Score(id, found[id].logprob, tuple((other, logprob) for _, other, logprob in best[:most]))


def _use_threads(threads: int) -> None:
    """On a CPU: `threads` of them for the arithmetic, wherever the system puts them, where other processes are to have the rest."""
    if threads < len(os.sched_getaffinity(0)):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(threads)
