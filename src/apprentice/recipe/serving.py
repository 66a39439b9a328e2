"""The recipe's `serving` block: the HTTP endpoint's engine, limits and replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apprentice.recipe.strict import Positive, Strict


class Replicas(Strict):
    """Least and greatest number of replicas of the engine."""

    min: Positive = Field(1, description="Replicas that always run.")
    max: Positive = Field(1, description="Replicas at most, under load.")


class Serving(Strict):
    """The HTTP endpoint that serves the trained model."""

    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="What decodes: `vllm` (an extra) for causal models, `transformers`, our own, or `auto`: vLLM on a GPU.",
    )
    host: str = Field("127.0.0.1", description="Address that the endpoint listens on; 0.0.0.0 for every one of the machine.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port of the endpoint; 0 takes a free one.")
    replicas: Replicas = Replicas()
    max_running: Positive = Field(32, description="Requests decoded together by one replica.")
    max_queued_requests: Positive = Field(
        64, description="Requests that may wait in a replica; further ones are refused with status 429."
    )
    context: Positive = Field(2048, description="Tokens of prompt and reply together.")
    threads: Positive | None = Field(
        None,
        description="CPU threads that one replica decodes with; left out: OMP_NUM_THREADS, or else its share of the CPUs.",
    )
    tensor_parallel: Positive = Field(
        1,
        description="GPUs of one node that vLLM splits each copy of the model over: serve, predict, evaluate, GRPO's replies.",
    )
    kv_memory_gb: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Memory for keys and values of one replica, in 10**9 bytes; left out: what max_running contexts take, and with"
        " vLLM on GPUs what the weights leave free.",
    )
    adapters: str | None = Field(
        None, description="Folder or URI with LoRA adapters of the model, each in a folder that is its name in requests."
    )
    max_adapters: Positive = Field(8, description="Adapters that one replica keeps in memory.")
    beside: tuple[str, ...] = Field((), description="Further models at the same endpoint: runs, folders or hub ids.")
    request_timeout_s: Annotated[float, Field(gt=0.0)] = Field(600.0, description="Longest time that one request may take.")
    max_body_bytes: Positive = Field(4_000_000, description="Largest body of a request.")
    drain_timeout_s: Annotated[float, Field(ge=0.0)] = Field(
        60.0, description="How long a replica that is replaced goes on with its requests."
    )

    @property
    def kv_bytes(self) -> int | None:
        """`kv_memory_gb` in bytes."""
        return None if self.kv_memory_gb is None else int(self.kv_memory_gb * 1e9)
