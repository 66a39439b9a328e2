"""The recipe's `data` block: tasks and their sources, mixture, filters, prompt format and packing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from apprentice.recipe.strict import Positive, Share, Strict


class _Strategy(Strict):
    """Shares of the tasks, or of the groups of tasks, in a mixture or a group."""

    strategy: Literal["equal", "proportional", "temperature", "weights"] = Field(
        "proportional",
        description="What a task's share follows: equal for all; its rows up to `cap`; its rows to the power 1 / `temperature`; or"
        " `weights`.",
    )
    cap: Positive | None = Field(None, description="Rows at which a task's size stops counting (T5's K; FLAN's rate of 3,000).")
    temperature: float = Field(2.0, gt=0.0, description="Shares go with size ** (1 / temperature).")
    weights: dict[str, Annotated[float, Field(gt=0.0)]] | None = Field(None, description="Task → weight, for `weights`.")

    groups: dict[str, Group] | None = Field(
        None, description="Sub-mixtures, each with a share of its own (Flan 2022: 40/32/20/5/3), instead of a strategy."
    )

    @model_validator(mode="after")
    def _weights_belong(self) -> Self:
        if (self.strategy == "weights") != (self.weights is not None):
            raise ValueError("`weights` belongs to `strategy: weights`, and only to it")
        own = ("strategy", "cap", "temperature", "weights")
        if self.groups is not None and any(getattr(self, key) != type(self).model_fields[key].default for key in own):
            raise ValueError("with `groups`, each group has its own `strategy`, `cap`, `temperature` or `weights`; move them there")
        if self.groups is not None and not self.groups:
            raise ValueError("`groups` names no group")
        return self


class Group(_Strategy):
    """A sub-mixture: tasks, or further groups, with a share of the mixture or group that it is in."""

    share: float = Field(gt=0.0, description="In proportion to those of the groups beside it.")
    tasks: tuple[str, ...] | None = Field(None, min_length=1, description="Tasks or clusters.")

    @model_validator(mode="after")
    def _has_one_content(self) -> Self:
        if (self.tasks is None) == (self.groups is None):
            raise ValueError("a group has either `tasks` or `groups`")
        return self


class Mixture(_Strategy):
    """The mixture: how often each task is drawn."""

    by: Literal["examples", "target_tokens"] = Field("examples", description="What the shares are shares of.")
    max_rows: Positive | None = Field(
        None, description="Rows of a task that are used at all (FLAN: 30,000), chosen by the seed when the index is made."
    )


class Formats(Strict):
    """Share of plan positions drawn in each format; the shares add up to 1."""

    zero_shot: Share = Field(1.0, description="Of an instruction alone.")
    few_shot: Share = Field(0.0, description="Of an instruction with solved exemplars before it.")
    inverted: Share = Field(0.0, description="Of inverted wordings, which give the answer and ask for the input.")
    cot: Share = Field(0.0, description="Reasoning before the answer (chain of thought), where a task has such wordings.")

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        total = self.zero_shot + self.few_shot + self.inverted + self.cot
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the formats' shares add up to {total:g}, not to 1")
        return self


class Packing(Strict):
    """Packing of several examples into one row."""

    length: Positive = Field(1024, description="Tokens of one packed row; of an encoder-decoder's row, those of the encoder.")
    target_length: Positive | None = Field(
        None, description="Tokens of the decoder's side of a row, for encoder-decoders only; default: a quarter of `length`."
    )
    strategy: Literal["auto", "best_fit", "greedy", "none"] = Field(
        "auto", description="auto: best_fit where the model keeps examples of one row apart, and else none."
    )


class Filters(Strict):
    """Filters that drop training rows when the index is made; the number of rows that each one drops is stored with the run."""

    min_words: Positive = Field(1, description="Fewest words in the fields that a task reads.")
    max_words: Positive | None = Field(None, description="Most words in them.")
    duplicates: Literal["keep", "exact", "near"] = Field(
        "keep", description="exact: same words in all fields; near: besides, MinHash finds their three-word shingles alike."
    )
    near_threshold: float = Field(0.8, gt=0.0, le=1.0, description="Part of the shingles from which rows are near duplicates.")
    decontaminate: bool = Field(False, description="Drop rows that share a passage with a test row of any task that is scored.")
    ngram: Annotated[int, Field(ge=4)] = Field(13, description="Words in a row that make a passage; shorter rows must be equal.")
    label_balance: float | None = Field(None, ge=1.0, description="Times that the commonest label may come for the rarest one.")


class Quality(Strict):
    """One quality class of mixed-quality data: the tasks in it, and the weight of their answers' tokens in the loss."""

    tasks: tuple[str, ...] = Field(
        (), description="Tasks or clusters; a task that no class names belongs to the one of the largest weight."
    )
    weight: float = Field(1.0, gt=0.0, description="Of each target token; the loss is divided by the step's weights together.")


# Key that names a kind of collection → the further keys that this kind allows.
COLLECTION_KEYS: dict[str, tuple[str, ...]] = {
    "promptsource": ("dataset", "splits", "columns", "templates"),
    "natural_instructions": ("definition", "positive", "negative", "explanations", "official_splits"),
    **dict.fromkeys(("conversations", "alpaca", "dolly", "self_instruct", "p3"), ("test",)),
    "preferences": ("test", "splits"),
    "unpaired": (),
    "prompts": (),
}


class Collection(Strict):
    """Tasks read from files in another project's format; exactly one key names the format."""

    promptsource: str | None = Field(
        None, description="`glue/mrpc` under `data.promptsource`, or a path to a templates.yaml or a folder of them."
    )
    natural_instructions: str | None = Field(None, description="Task files of Super-NaturalInstructions: a path or a glob.")
    conversations: str | None = Field(
        None,
        description="File with ShareGPT's `conversations` or OpenAI's `messages`, functions and their calls among them, or with"
        " xLAM's columns query, tools and answers.",
    )
    preferences: str | None = Field(
        None,
        description="File with columns prompt, chosen and rejected: texts or messages, where the prompt may stand in the other two."
        " With `splits`, a dataset under `data.root` or on the hub: `HuggingFaceH4/ultrafeedback_binarized`.",
    )
    unpaired: str | None = Field(
        None, description="File with columns prompt, completion and label: answers that are desirable (true) or not (false)."
    )
    prompts: str | None = Field(None, description="File with the column prompt, a text or messages: questions without answers.")
    alpaca: str | None = Field(None, description="File with columns instruction, input and output.")
    dolly: str | None = Field(None, description="File with columns instruction, context and response.")
    self_instruct: str | None = Field(None, description="File with columns instruction and instances, of which the first is used.")
    p3: str | None = Field(None, description="File with columns inputs_pretokenized and targets_pretokenized.")
    test: str | None = Field(None, description="File of test rows.")
    definition: bool | None = Field(None, description="Natural instructions: whether the definition is shown; default: yes.")
    positive: Annotated[int, Field(ge=0)] | None = Field(None, description="Positive examples shown; default: 2.")
    negative: Annotated[int, Field(ge=0)] | None = Field(None, description="Negative examples shown; default: 0.")
    explanations: bool | None = Field(None, description="Whether examples are shown with their explanations; default: no.")
    official_splits: str | None = Field(None, description="Folder with train_tasks.txt and test_tasks.txt.")
    dataset: str | None = Field(None, description="Folder under `data.root`, where its name is not the collection's.")
    splits: dict[Literal["train", "test"], str] | None = Field(None, description="Our split → the source's.")
    columns: dict[str, str] | None = Field(None, description="Field → the source's column, where the names differ.")
    templates: tuple[str, ...] | None = Field(None, min_length=1, description="Names of the templates to use; default: all.")
    cluster: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_]*$", description="The tasks' cluster.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in COLLECTION_KEYS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"a collection has exactly one of the keys {', '.join(COLLECTION_KEYS)}")
        allowed = COLLECTION_KEYS[kinds[0]]
        set_keys = [key for key in type(self).model_fields if getattr(self, key) is not None]  # a resolved recipe names every key
        if strange := [key for key in set_keys if key not in (*allowed, kinds[0], "cluster")]:
            raise ValueError(f"`{strange[0]}` does not belong to `{kinds[0]}`, which takes {', '.join((*allowed, 'cluster'))}")
        if self.preferences is not None and self.test is not None and self.splits is not None:
            raise ValueError("with `splits`, `preferences` is a dataset, which has its own test rows; leave out `test`")
        return self


class Data(Strict):
    """Tasks and their sources, mixture, filters, prompt format and packing."""

    root: str | None = Field(None, description="Searched first: <root>/<dataset>/<split>.parquet; then the hub.")
    tasks: tuple[str | Collection, ...] = Field(
        min_length=1, description="Library names, clusters, paths of task files, or other collections: `{promptsource: glue/mrpc}`."
    )
    promptsource: str | None = Field(None, description="Folder of PromptSource's templates: <promptsource>/<name>/templates.yaml.")
    hold_out: tuple[str, ...] = Field((), description="Clusters or tasks never trained on, always scored.")
    validation: Share = Field(0.02, description="Share of training rows, chosen by hash, that are never trained on.")
    layout: Literal["plain", "alpaca", "chat"] = Field(
        "chat", description="How instruction, input and answer become one prompt; chat uses the model's chat template."
    )
    system: str = Field("", description="System text; empty: the layout's own.")
    chat_template: str | None = Field(
        None, description="Chat template (Jinja) in place of the tokenizer's own; it is saved with the model."
    )
    control_tokens: tuple[str, ...] = Field(
        (),
        description="Control tokens of the tokenizer that the rows' texts mean as such. All others are text in what people"
        " wrote: `<|im_end|>` in a question ends no turn.",
    )
    reasoning: Literal["train", "mask", "drop"] | None = Field(
        None,
        description="What becomes of thoughts in answers, `<think>` parts and `reasoning_content`: train learns them, mask shows"
        " them and learns only what follows, drop leaves them out. By default `<think>` parts are text like any other, and"
        " `reasoning_content` is not read.",
    )
    qualities: dict[str, Quality] | None = Field(
        None,
        min_length=1,
        description="Classes of mixed-quality data (OpenChat's conditioned fine-tuning): the chat template sees the class's name as"
        " `quality`. Replies are asked for in the one of the largest weight.",
    )
    max_length: Positive = Field(1024, description="Tokens of one example.")
    mixture: Mixture = Mixture()
    filters: Filters = Filters()
    formats: Formats = Formats()
    templates_per_task: Positive | None = Field(
        None, description="Wordings of each kind that training uses at most, chosen by the seed; those of 1 are among those of 2."
    )
    shots: tuple[Positive, Positive] = Field((1, 3), description="Least and most exemplars of a few-shot example.")
    packing: Packing = Packing()
    window: Positive = Field(1024, description="Positions of the plan that are rendered and packed together.")
    lanes: Positive = Field(
        1,
        description="Independent streams of windows, each with its share of every step's rows and its share of the workers. One"
        " feeds about a hundred workers; the order of examples depends on this number, and not on that of the workers.",
    )
    max_bad_rows: Share = Field(0.001, description="Share of a task's rows that may be unusable before the run stops.")

    @property
    def entries(self) -> tuple[str | dict[str, Any], ...]:
        """The entries of `tasks` as plain values that can be resolved without the recipe: names, paths, or mappings."""
        return tuple(
            entry if isinstance(entry, str) else {"root": self.promptsource, **entry.model_dump(exclude_none=True)}
            for entry in self.tasks
        )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_length > self.packing.length:
            raise ValueError(f"max_length {self.max_length} is more than packing.length {self.packing.length}")
        if self.chat_template is not None and self.layout != "chat":
            raise ValueError(f"`chat_template` belongs to `layout: chat`, and the layout is {self.layout}")
        if self.reasoning is not None and self.layout != "chat":
            raise ValueError(
                f"`reasoning` belongs to `layout: chat`, whose template writes thoughts, and the layout is {self.layout}"
            )
        if self.shots[0] > self.shots[1]:
            raise ValueError(f"shots: least {self.shots[0]} is more than most {self.shots[1]}")
        return self
