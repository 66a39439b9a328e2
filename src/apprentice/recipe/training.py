"""The recipe's `tuning` and `training` blocks: tuning method, workers, optimizer, DeepSpeed, length of training, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from apprentice.errors import RecipeError
from apprentice.recipe.objective import DPO, GRPO, IPO, KTO, MODEL_KEYS, OBJECTIVES, ORPO, Distill, Objective, ObjectiveName, SimPO
from apprentice.recipe.strict import Positive, Share, Strict

SAMPLES = (
    "Write one sentence about the sea.",
    "Is this review positive or negative? The film was a waste of an evening.",
    "Translate into German: Good morning, where is the station?",
)


def data_parallel_size(workers: int, sequence_parallel: int) -> int:
    """Number of groups of workers that read rows of their own: `sequence_parallel` of `workers` workers share each row.

    Raises `RecipeError` if the workers make no whole groups.
    """
    if workers % sequence_parallel:
        raise RecipeError(
            f"{workers} workers cannot share rows in groups of {sequence_parallel} (training.sequence_parallel); choose a multiple"
            f" of {sequence_parallel} for training.workers."
        )
    return workers // sequence_parallel


class Tuning(Strict):
    """The tuning method: which weights are trained."""

    method: Literal["full", "lora", "qlora", "prefix", "prompt", "adapter"] = Field(
        "lora",
        description="full: every weight; lora: two small matrices beside each linear layer; qlora: the same over a base in 4 bits;"
        " prefix, prompt: trained vectors before every row; adapter: a small layer inside each block.",
    )
    rank: Positive = Field(16, description="Of LoRA's two matrices.")
    alpha: float | None = Field(
        None, description="LoRA scale × rank, default 2 × rank; with `rslora` scale × √rank, default 16, whatever the rank."
    )
    dropout: Share = Field(0.0, description="Of LoRA's input.")
    rslora: bool = Field(
        False, description="Whether LoRA's scale is alpha / √rank, so that high ranks learn as fast (rsLoRA, Kalajdzievski 2023)."
    )
    dora: bool = Field(
        False,
        description="Whether LoRA turns weights only, and a vector for each layer learns their lengths (DoRA, Liu et al. 2024):"
        " nearer to full tuning at low ranks, and slower.",
    )
    virtual_tokens: Positive = Field(20, description="Of prefix and prompt tuning.")
    width: Positive = Field(64, description="Of the bottleneck adapter's inner layer.")
    experts: bool = Field(
        False,
        description="Whether LoRA tunes the experts of every mixture-of-experts model; without, only where peft does so by itself"
        " (Mixtral and Qwen3-MoE, but not Qwen2-MoE).",
    )

    @property
    def keeps_weights_whole(self) -> bool:
        """Whether each worker needs the base's weights whole, which ZeRO-3 splits up."""
        return self.method == "qlora" or self.dora

    @model_validator(mode="after")
    def _variants_fit(self) -> Self:
        for name in ("rslora", "dora"):
            if getattr(self, name) and self.method not in ("lora", "qlora"):
                raise ValueError(f"tuning.{name} is a kind of LoRA, and tuning.method is {self.method}; use lora, or leave it out")
        if self.dora and self.experts:
            raise ValueError(
                "tuning.dora measures the weights of linear layers, and tuning.experts tunes others; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.experts and self.method != "lora":
            raise ValueError(
                f"tuning.experts adds LoRA's matrices to experts, and tuning.method is {self.method}; use lora, or leave it out"
            )
        if self.experts and self.dropout:
            raise ValueError(
                "tuning.experts adds LoRA's matrices to the experts' weights and not to their inputs, which dropout is of;"
                " set tuning.dropout to 0"
            )
        return self


class WorkerRange(Strict):
    """Least and greatest number of training workers, for elastic training."""

    min: Positive = Field(description="Training goes on while there are so many.")
    max: Positive = Field(description="Training uses at most so many.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers: min {self.min} is more than max {self.max}")
        return self


class Resources(Strict):
    """CPUs and GPUs that each training worker reserves in Ray."""

    cpus: float = Field(1.0, gt=0.0, description="CPUs of a worker; its threads are as many.")
    gpus: float = Field(0.0, ge=0.0, description="GPUs of a worker; 0 trains on CPUs.")


class Optimizer(Strict):
    """Optimizer, learning-rate schedule and gradient clipping."""

    name: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="adafactor scales each step by the size of the weights it changes, as T5 was trained; betas are AdamW's.",
    )
    learning_rate: float = Field(2e-4, gt=0.0, description="The greatest, just after the warm-up.")
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = Field(
        "cosine", description="How the learning rate goes on after the warm-up; cosine and linear end at 0."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps in which the learning rate rises from 0.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Share of each weight taken off in a step, times the learning rate."
    )
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Decay of the averages of the gradient and of its square.")
    epsilon: float = Field(1e-8, gt=0.0, description="Added to the root of the average square, against division by 0.")
    clip: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0 turns clipping off.")
    loraplus_ratio: float = Field(
        1.0,
        gt=0.0,
        description="Learning rate of LoRA's second matrices, which begin at 0, as a multiple of the others' (LoRA+, Hayou et al."
        " 2024, who found 16 good).",
    )
    states: Literal["float32", "bfloat16", "8bit"] = Field(
        "float32", description="Number format of AdamW's two moments: 8, 4 or about 2 bytes for each trained number."
    )


class DeepSpeed(Strict):
    """DeepSpeed's ZeRO stage, and offloading of optimizer state and parameters."""

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="What the workers split among them: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing."
    )
    offload: Literal["none", "cpu", "nvme"] = Field("none", description="Where the optimizer's state lies, if not on the GPU.")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field("none", description="Where weights wait; stage 3 only.")
    nvme_path: str | None = Field(None, description="Folder on a local disk, for `nvme`.")
    extra: dict[str, Any] = Field({}, description="Further keys of DeepSpeed's configuration, passed through.")

    @model_validator(mode="after")
    def _offloads_fit(self) -> Self:
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, which splits the weights up; stage is {self.stage}")
        if self.offload == "nvme" and self.stage != 3:
            raise ValueError(f"offload nvme needs stage 3; stage is {self.stage}: use cpu, or stage 3")
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("offload cpu needs stage 1 or higher; at stage 0 nothing of the optimizer is split off")
        if ("nvme" in (self.offload, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("`nvme_path` belongs to `nvme`, and only to it")
        return self


class Checkpointing(Strict):
    """Frequency, number and validation of checkpoints."""

    every_steps: Positive = Field(100, description="Steps between two checkpoints.")
    keep: Positive = Field(2, description="Checkpoints that are kept, the newest and the best among them.")
    best_by: Literal["validation_loss"] = Field("validation_loss", description="What the exported checkpoint has the least of.")
    validation: Literal["auto", "workers", "aside"] = Field(
        "auto",
        description="Who takes the validation loss: the workers, between two steps; or a task aside, on the resources of one more"
        " worker, while they train on. auto: aside where there is room for it and the weights are not split up (stage 3).",
    )


class Training(Strict):
    """Training on Ray Train and DeepSpeed. Exactly one of `steps`, `tokens` and `epochs` says when it ends."""

    objective: ObjectiveName = Field(
        "sft",
        description="sft: answers; dpo, ipo, simpo, orpo: pairs of a better and a worse answer; kto: answers labelled desirable"
        " or not; distill: answers, with a teacher's probabilities of each of their tokens; reward: a model that scores answers,"
        " from pairs; grpo: the model's own replies, which a reward model or functions score.",
    )
    dpo: DPO = DPO()
    ipo: IPO = IPO()
    simpo: SimPO = SimPO()
    orpo: ORPO = ORPO()
    kto: KTO = KTO()
    distill: Distill = Distill()
    grpo: GRPO = GRPO()
    workers: Positive | WorkerRange = Field(
        1,
        description="Number of training processes, or `{min, max}` for elastic training, which goes on with those that are there.",
    )
    sequence_parallel: Positive = Field(
        1,
        description="Workers that share each row, for rows too long for one: each computes a part of its tokens, and within"
        " attention a part of the heads (Ulysses). Objective sft of causal models. What is learned does not depend on it.",
    )
    resources: Resources = Resources()
    steps: Positive | None = Field(None, description="Optimizer steps of the whole run.")
    tokens: Positive | None = Field(None, description="Real tokens, padding excluded; the step that crosses is finished.")
    epochs: float | None = Field(None, gt=0.0, description="Each kept row up to its cap once per epoch.")
    global_batch: Positive = Field(8, description="Packed rows per optimizer step over all workers.")
    micro_batch: Positive | Literal["auto"] = Field("auto", description="Packed rows at once on one worker.")
    optimizer: Optimizer = Optimizer()
    deepspeed: DeepSpeed = DeepSpeed()
    activation_checkpointing: bool | Literal["selective", "offload"] = Field(
        False,
        description="Keep only each layer's input and compute the rest again: less memory, a third more time. selective: in every"
        " second layer; offload: the inputs wait in the host's memory, where a worker has a GPU.",
    )
    router_loss: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the load-balancing loss of a mixture-of-experts model, beside that of objective sft; 0: none.",
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto",
        description="Kernels of norms, rotary positions and MLPs. auto: Liger's on a GPU where the extra `liger` is installed and"
        " fits the model, but not with `compile`.",
    )
    compile: bool = Field(
        False,
        description="Compile each layer of a causal model with torch.compile, for rows padded to quarters of their length. The"
        " first steps take minutes. Not with deepspeed.stage 3, sequence_parallel or mixtures of experts.",
    )
    checkpoint: Checkpointing = Checkpointing()
    sample_every_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps after which the replies to `sample_instructions` are shown; 0: never."
    )
    sample_instructions: tuple[str, ...] = Field(SAMPLES, description="What is asked then.")
    tracking: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="Where figures go besides TensorBoard and Ray's metrics; each needs the extra of its name."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="How often training is started again after a lost worker before the command fails."
    )
    hang_timeout_s: float = Field(
        1800.0,
        gt=0.0,
        description="Seconds after which a worker that does not answer is named and ended, and a collective is given up.",
    )

    @property
    def computed_again(self) -> float:
        """Share of the layers whose forward pass is computed again in the backward pass."""
        return 0.5 if self.activation_checkpointing == "selective" else float(bool(self.activation_checkpointing))

    @property
    def aim(self) -> Objective:
        """The requirements of the objective."""
        return OBJECTIVES[self.objective]

    @property
    def reference(self) -> str | None:
        """The objective's frozen model, a reference or a teacher, where it names one; else the base is the reference."""
        block = getattr(self, self.objective, None)
        return getattr(block, "reference", None) or getattr(block, "teacher", None)

    @property
    def models(self) -> dict[str, str]:
        """Models that the objective's settings name: dotted key in the recipe → name."""
        values = {key: getattr(getattr(self, key.split(".")[0]), key.split(".")[1]) for key in MODEL_KEYS}
        values["grpo.reward"] = self.grpo.reward_model
        return {f"training.{key}": name for key, name in values.items() if name}

    @property
    def max_workers(self) -> int:
        """Greatest number of workers; the fixed number without a range."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def min_workers(self) -> int:
        """Least number of workers; the fixed number without a range."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_readers(self) -> int:
        """Greatest number of workers, or of groups of workers that share rows, that read rows of their own."""
        return data_parallel_size(self.max_workers, self.sequence_parallel)

    @model_validator(mode="after")
    def _rows_can_be_shared(self) -> Self:
        if self.sequence_parallel == 1:
            return self
        if self.objective != "sft":
            raise ValueError(f"sequence_parallel is for objective sft, and {self.objective} needs whole rows; leave it out")
        if self.checkpoint.validation == "aside":
            raise ValueError(
                "checkpoint.validation aside gives whole rows to one worker, and sequence_parallel shares them; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _layers_can_be_fast(self) -> Self:
        if self.kernels == "liger" and not self.resources.gpus:
            raise ValueError("kernels liger needs a GPU, and resources.gpus is 0; use auto")
        if self.compile and self.kernels == "liger":
            raise ValueError("compile makes kernels of its own of what kernels liger replaces; leave one of them out")
        if self.compile and self.deepspeed.stage == 3:
            raise ValueError(
                "compile cannot be combined with deepspeed.stage 3, which gathers weights inside of each layer; set compile to"
                " false, or a lower stage"
            )
        if self.compile and self.activation_checkpointing == "offload":
            raise ValueError(
                "compile cannot be combined with activation_checkpointing offload, which moves inputs inside of each layer; use"
                " selective or true, or set compile to false"
            )
        if self.compile and self.sequence_parallel > 1:
            raise ValueError(
                f"compile cannot be combined with sequence_parallel {self.sequence_parallel}, whose workers exchange tokens inside"
                " of each layer; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _one_end_and_even_batch(self) -> Self:
        for name in OBJECTIVES.keys() & type(self).model_fields.keys() - {self.objective}:
            if (block := getattr(self, name)) != type(block)():
                raise ValueError(f"the block `{name}` belongs to `objective: {name}`, and the objective is {self.objective}")
        if self.objective != "sft" and self.router_loss:
            raise ValueError(f"`router_loss` belongs to `objective: sft`, and the objective is {self.objective}; leave it out")
        if self.router_loss and self.sequence_parallel > 1:
            raise ValueError(
                f"`router_loss` is taken over whole rows, and sequence_parallel {self.sequence_parallel} gives a worker parts"
                " of them; leave one of them out"
            )
        if self.objective == "grpo" and self.grpo.reward is None:
            raise ValueError(
                "objective grpo learns from what a reward model says; name one in `grpo.reward`, such as run:NAME, or a function,"
                " such as {function: math}"
            )
        if self.objective == "grpo" and self.steps is None:
            raise ValueError("objective grpo writes its own answers, so nothing says where `tokens` or `epochs` end; give `steps`")
        if self.objective == "reward" and self.sample_every_steps:
            raise ValueError("`sample_every_steps` shows replies, and a reward model writes none; leave it out")
        ends = [end for end in (self.steps, self.tokens, self.epochs) if end is not None]
        if len(ends) != 1:
            raise ValueError("give exactly one of `steps`, `tokens` and `epochs`")
        if self.max_workers % self.sequence_parallel:
            raise ValueError(
                f"{self.max_workers} workers cannot share rows in groups of {self.sequence_parallel} (sequence_parallel); choose a"
                f" multiple of {self.sequence_parallel} for workers"
            )
        if self.global_batch % self.max_readers:
            whose = "workers" if self.sequence_parallel == 1 else f"groups of {self.sequence_parallel} workers that share rows"
            raise ValueError(
                f"global_batch {self.global_batch} cannot be divided among {self.max_readers} {whose};"
                f" choose a multiple of {self.max_readers}"
            )
        rows = self.global_batch // self.max_readers
        if isinstance(self.micro_batch, int) and rows % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the {rows} rows of one worker; choose a divisor")
        if self.optimizer.name == "adafactor" and self.deepspeed.stage != 0:
            raise ValueError(
                f"adafactor needs whole matrices, and ZeRO stage {self.deepspeed.stage} gives it flat pieces of them;"
                " set deepspeed.stage to 0, or use adamw"
            )
        if self.optimizer.states != "float32" and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.states {self.optimizer.states} is AdamW's, and the optimizer is {self.optimizer.name}; leave it out"
            )
        if self.optimizer.loraplus_ratio != 1.0 and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.loraplus_ratio is AdamW's, and the optimizer is {self.optimizer.name}, whose steps are in proportion to"
                " the weights already; leave it out"
            )
        if self.optimizer.states != "float32" and self.deepspeed.offload == "nvme":
            raise ValueError(
                f"offload nvme moves float32 states, and optimizer.states is {self.optimizer.states};"
                " use float32, or offload to cpu"
            )
        if self.steps is not None and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.optimizer.warmup_steps} is not shorter than the run's {self.steps} steps")
        return self
