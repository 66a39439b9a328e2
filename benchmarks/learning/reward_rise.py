"""Rise of a verifiable reward: GRPO on the built-in sums from a tiny model that was tuned on them a little, several seeds.

    python -m benchmarks.learning.reward_rise [--seeds 1 2 3] [--out DIR] [KEY=VALUE …]

A random Llama of under a million numbers is tuned on `word_problems` by supervised steps until it is right now and then; the recipe
`sums` goes on from there, once for each seed. The rise is the mean reward of the last ten rounds less that of the first ten. Its
interval is of 95%: of one seed by Welch's t over the prompts' groups, of all by Student's t over the seeds, whose prompts, replies
and order all differ.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

from apprentice import pipeline
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.run.folder import open_run
from apprentice.tasks.builtin import rows
from benchmarks.figures import claim_stdout, report

ENDS = 10  # rounds at either end that are compared
TINY = (
    "model.dtype=float32",
    "tuning.method=full",
    "training.checkpoint={every_steps: 1000, keep: 1}",
    "data.tasks=[word_problems]",
    "data.hold_out=[]",
    "data.max_length=192",  # the tokenizer has short tokens
    "data.packing.length=768",
)
SUPERVISED = (
    "name=sums-sft",
    "training.objective=sft",
    "training.grpo={}",
    "training.steps=300",
    "training.global_batch=8",
    "training.optimizer={learning_rate: 3.0e-3, schedule: cosine, warmup_steps: 20}",
)
POLICY = (
    "model.base=run:sums-sft",
    "data.mixture.max_rows=16",  # so that each comes back about once a round
    "training.optimizer={learning_rate: 5.0e-4, schedule: constant, warmup_steps: 4, betas: [0.9, 0.95]}",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path) -> None:
    """Writes a random Llama (hidden 128, 4 layers) and a byte-level BPE tokenizer made from the sums' training rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=768, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([str(row["problem"]) for row in rows("word_problems", "train")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], bos_token=special[1], eos_token=special[2])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def progress(stage: str, values: Mapping[str, Any]) -> None:
    """Shows on standard error what a stage says."""
    shown = {key: values[key] for key in ("step", "loss", "reward", "message") if key in values}
    if shown:
        print(stage, shown, file=sys.stderr, flush=True)


def round_rewards(recipe: Recipe) -> list[list[float]]:
    """For each round of a finished run, in order, the mean reward of the replies to each of its prompts."""
    rounds = open_run(recipe).rounds
    means = []
    for name in sorted(file.name for file in rounds.children()):
        table = pq.read_table(io.BytesIO((rounds / name).read_bytes()), columns=["examples", "rewards"])
        of_prompt: dict[int, list[float]] = {}
        for examples, rewards in zip(table["examples"].to_pylist(), table["rewards"].to_pylist(), strict=True):
            for position, reward in zip(examples, rewards, strict=True):
                of_prompt.setdefault(position, []).append(reward)
        means.append([float(np.mean(rewards)) for rewards in of_prompt.values()])
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("reports/reward_rise"))
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_intermixed_args()
    claim_stdout()
    model, out = chosen.out / "model", f"storage={chosen.out.absolute()}/runs"
    if not (model / "config.json").exists():
        save_model(model)
    sums = find_recipe("sums")
    pipeline.train_run(load_recipe(sums, [out, f"model.base={model.absolute()}", *TINY, *SUPERVISED]), progress=progress)
    rises = []
    for seed in chosen.seeds:
        named = [out, *TINY, *POLICY, f"name=sums-{seed}", f"seed={seed}", *chosen.overrides]
        recipe = load_recipe(sums, named)
        pipeline.train_run(recipe, progress=progress)
        rewards = round_rewards(recipe)
        first, last = (np.concatenate(ends) for ends in (rewards[:ENDS], rewards[-ENDS:]))
        rises.append(float(last.mean() - first.mean()))
        interval = stats.ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
        ends = {"first": round(float(first.mean()), 3), "last": round(float(last.mean()), 3)}
        report(f"reward_rise.{seed}", rises[-1], unit="reward", interval=_rounded(interval), rounds=len(rewards), **ends)
    if len(rises) > 1:
        interval = stats.t.interval(0.95, len(rises) - 1, np.mean(rises), stats.sem(rises))
        report("reward_rise", float(np.mean(rises)), unit="reward", interval=_rounded(interval), seeds=len(rises))


def _rounded(interval: Iterable[float]) -> list[float]:
    return [round(float(end), 3) for end in interval]


if __name__ == "__main__":
    main()
