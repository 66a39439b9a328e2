"""The complete recipe with the checks across blocks, and its `model` block."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from apprentice.recipe.data import Data
from apprentice.recipe.evaluation import Evaluation
from apprentice.recipe.lanes import Lanes
from apprentice.recipe.round import Round
from apprentice.recipe.serving import Serving
from apprentice.recipe.strict import Strict
from apprentice.recipe.training import Training, Tuning


class Model(Strict):
    """The pretrained model that is fine-tuned."""

    base: str = Field(
        description="Hub id, folder, a model that a package carries (`smollm2-135m-instruct`), or `run:NAME`: what that run of the"
        " same storage made."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware multiplies it fast."
    )
    attention: Literal["auto", "flash", "flex", "sdpa", "eager"] = Field("auto", description="auto: the fastest that is there.")
    trust: bool = Field(
        False, description="Read pickled weights (`.bin`), and run code that the model brings: only what you would run yourself."
    )


class Recipe(Strict):
    """One execution of the whole pipeline."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's folder.")
    seed: int = Field(0, description="Of all draws: the sampling plan, new weights and dropout.")
    storage: str = Field(
        "./runs", description="Where runs lie: a folder or URI that every node reaches; left out: `runs` in the current directory."
    )
    model: Model
    data: Data
    tuning: Tuning = Tuning()
    training: Training
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()

    @property
    def head(self) -> int | None:
        """The seed of a reward model's new last layer; None for objectives that train a language model."""
        return self.seed if self.training.aim.head else None

    @property
    def round(self) -> Round:
        """The sizes of a round of an on-policy run; all its rounds have the same."""
        data, grpo = self.data, self.training.grpo
        per_row = max(1, data.packing.length // data.max_length)
        return Round(data.window, grpo.group, per_row, self.training.global_batch, grpo.actors, grpo.passes)

    @property
    def lanes(self) -> Lanes:
        """The lanes of the run's rows, and who reads them."""
        return Lanes(self.data.lanes, self.training.global_batch, self.training.max_readers)

    @property
    def worker_numbers(self) -> list[int]:
        """Numbers of workers, ascending, that training may run with: each step has the same rows on all of them."""
        training = self.training
        least = math.ceil(training.min_workers / training.sequence_parallel)
        return [count * training.sequence_parallel for count in range(least, training.max_readers + 1) if self.lanes.fit(count)]

    @model_validator(mode="after")
    def _lanes_fit(self) -> Self:
        lanes, readers = self.data.lanes, self.training.max_readers
        if lanes > 1 and self.training.aim.rounds:
            raise ValueError(
                f"data.lanes {lanes} would split up rounds, which objective grpo makes one after another; leave it out"
            )
        if self.training.global_batch % lanes:
            raise ValueError(
                f"global_batch {self.training.global_batch} cannot be divided among {lanes} lanes, of which each step takes equally"
                f" many rows; choose a multiple of {lanes}, or other data.lanes"
            )
        if not self.lanes.fit(readers):
            whose = "workers" if self.training.sequence_parallel == 1 else "groups of workers that share rows"
            raise ValueError(
                f"{readers} {whose} cannot read {lanes} lanes evenly: one number must divide the other; choose data.lanes or"
                " training.workers so"
            )
        return self

    @model_validator(mode="after")
    def _scored_aside(self) -> Self:
        if self.evaluation.while_training and (self.training.checkpoint.validation == "workers" or self.training.aim.rounds):
            raise ValueError(
                "evaluation.while_training scores checkpoints in a task aside, and this run has none; set"
                " training.checkpoint.validation to aside (an on-policy run scores only at its end), or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _lora_is_tuned(self) -> Self:
        if self.training.optimizer.loraplus_ratio != 1.0 and self.tuning.method not in ("lora", "qlora"):
            raise ValueError(
                f"training.optimizer.loraplus_ratio is of LoRA's matrices, and tuning.method is {self.tuning.method}; use lora, or"
                " leave it out"
            )
        return self

    @model_validator(mode="after")
    def _thoughts_are_learnt(self) -> Self:
        if self.training.aim.pairs and self.data.reasoning in ("train", "mask"):
            raise ValueError(
                f"data.reasoning {self.data.reasoning} sets thoughts apart from answers, and training.objective"
                f" {self.training.objective} compares answers as they are; say drop, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> Self:
        if self.tuning.dora and self.training.deepspeed.stage == 3:
            raise ValueError(
                "tuning.dora takes lengths of whole weights, which training.deepspeed.stage 3 splits up; use stage 2 or lower, or"
                " leave tuning.dora out"
            )
        if self.tuning.method == "qlora" and self.training.deepspeed.stage == 3:
            raise ValueError(
                "tuning.method qlora keeps weights in 4 bits, which training.deepspeed.stage 3 cannot split up;"
                " use stage 2 or lower, or tuning.method lora"
            )
        return self

    @model_validator(mode="after")
    def _rows_have_few_lengths(self) -> Self:
        if self.training.compile and self.tuning.method in ("prefix", "prompt"):
            raise ValueError(
                f"tuning.method {self.tuning.method} puts virtual tokens before a row, which training.compile has no code for;"
                " use lora, or set training.compile to false"
            )
        return self

    @model_validator(mode="after")
    def _rows_can_be_shared(self) -> Self:
        if self.training.sequence_parallel == 1:
            return self
        if self.model.attention != "auto":
            raise ValueError(
                f"training.sequence_parallel has an attention of its own, and model.attention is {self.model.attention};"
                " leave that out"
            )
        if self.tuning.method in ("prefix", "prompt"):
            raise ValueError(
                f"tuning.method {self.tuning.method} puts virtual tokens before a row, which training.sequence_parallel cannot"
                " divide; use lora, or leave the one or the other out"
            )
        if self.evaluation.while_training:
            raise ValueError(
                "evaluation.while_training gives whole rows to one worker, and training.sequence_parallel shares them; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        if not self.training.aim.rounds:
            return self
        data, training = self.data, self.training
        if training.grpo.max_new_tokens >= data.max_length:
            raise ValueError(
                f"grpo.max_new_tokens {training.grpo.max_new_tokens} leaves no room for a prompt in data.max_length"
                f" {data.max_length}, which holds both; lower the one or raise the other"
            )
        if training.grpo.actors > data.window:
            raise ValueError(f"grpo.actors {training.grpo.actors} are more than the {data.window} prompts of a round (data.window)")
        if self.tuning.method not in ("full", "lora", "qlora"):
            raise ValueError(f"objective grpo tunes with full, lora or qlora; tuning.method is {self.tuning.method}")
        if data.qualities is not None:
            raise ValueError("data.qualities weigh the tokens of given answers, and objective grpo writes its own")
        if data.formats.zero_shot != 1.0:
            raise ValueError("objective grpo shows no exemplars and inverts nothing; leave out data.formats")
        return self

    @model_validator(mode="after")
    def _teacher_fits(self) -> Self:
        if not self.training.aim.teacher:
            return self
        if self.training.distill.teacher is None:
            raise ValueError("objective distill learns what a teacher thinks; name one in `distill.teacher`, such as run:NAME")
        if self.data.formats.zero_shot != 1.0:
            raise ValueError("objective distill shows no exemplars and inverts nothing; leave out data.formats")
        if self.data.qualities is not None:
            raise ValueError("data.qualities weigh the tokens of answers, and objective distill learns a teacher's; leave them out")
        return self

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if not self.training.aim.pairs:
            return self
        objective, data = self.training.objective, self.data
        if 2 * data.max_length > data.packing.length:
            raise ValueError(
                f"training.objective {objective} puts {self.training.aim.company} into one row: packing.length"
                f" {data.packing.length} must be at least twice max_length {data.max_length}"
            )
        if self.training.aim.head and self.tuning.method not in ("full", "lora", "qlora"):
            raise ValueError(f"training.objective reward adds a layer, which tuning.method {self.tuning.method} has no place for")
        if self.training.aim.head and self.evaluation.rank_by != "sum":
            raise ValueError("evaluation.rank_by compares log-probabilities, and objective reward gives numbers; leave it out")
        if data.qualities is not None:
            raise ValueError(f"data.qualities weigh the tokens of single answers, and objective {objective} learns from pairs")
        if data.formats.zero_shot != 1.0:
            raise ValueError(f"training.objective {objective} shows no exemplars and inverts nothing; leave out data.formats")
        return self
