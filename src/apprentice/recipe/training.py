"""The recipe's `tuning` and `training` blocks: what is trained, on what, how long and how it is kept safe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from apprentice.recipe.strict import Positive, Share, Strict


class Tuning(Strict):
    """Which weights are trained."""

    method: Literal["full", "lora"] = "lora"
    rank: Positive = 16
    alpha: float | None = Field(None, description="LoRA scale × rank; default 2 × rank.")
    dropout: Share = 0.0


class WorkerRange(Strict):
    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers: min {self.min} is more than max {self.max}")
        return self


class Resources(Strict):
    """What each training worker reserves."""

    cpus: float = Field(1.0, gt=0.0)
    gpus: float = Field(0.0, ge=0.0)


class Optimizer(Strict):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0.0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0.0)
    clip: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0 turns clipping off.")


class DeepSpeed(Strict):
    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"


class Checkpointing(Strict):
    every_steps: Positive = 100
    keep: Positive = 2
    best_by: Literal["validation_loss"] = "validation_loss"


class Training(Strict):
    """The run on Ray Train and DeepSpeed."""

    workers: Positive | WorkerRange = 1
    resources: Resources = Resources()
    steps: Positive | None = None
    tokens: Positive | None = Field(None, description="Real tokens, padding excluded; the step that crosses is finished.")
    epochs: float | None = Field(None, gt=0.0, description="Each kept row up to its cap once per epoch.")
    global_batch: Positive = Field(8, description="Packed rows per optimizer step over all workers.")
    micro_batch: Positive | Literal["auto"] = Field("auto", description="Packed rows at once on one worker.")
    optimizer: Optimizer = Optimizer()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpointing = Checkpointing()
    max_failures: Annotated[int, Field(ge=0)] = 3
    hang_timeout_s: float = Field(1800.0, gt=0.0, description="Seconds after which a collective that does not end is an error.")

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @model_validator(mode="after")
    def _one_end_and_even_batch(self) -> Self:
        given = [end for end in (self.steps, self.tokens, self.epochs) if end is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of `steps`, `tokens` and `epochs`")
        if self.global_batch % self.max_workers:
            raise ValueError(
                f"global_batch {self.global_batch} cannot be divided among {self.max_workers} workers;"
                f" choose a multiple of {self.max_workers}"
            )
        rows = self.global_batch // self.max_workers
        if isinstance(self.micro_batch, int) and rows % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the {rows} rows of one worker; choose a divisor")
        if self.steps is not None and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.optimizer.warmup_steps} is not shorter than the run's {self.steps} steps")
        return self
