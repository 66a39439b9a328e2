"""Evaluation speed: rank scoring against lm-evaluation-harness, generation against transformers' `generate` on padded batches.

    python -m benchmarks.evaluation.scoring_speed [--model FOLDER] [--rows 128] [--runs 3]

Both sides have the same model, dtype, rows and batch size, in this process with the same threads. The harness runs as its `hf`
model and computes the log-likelihood of every choice after the same text.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from apprentice.inference.choices.choice_scoring import choice_logprobs
from apprentice.inference.decoding import generate
from apprentice.models.loading import load_model
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from benchmarks.figures import claim_stdout, compare, report

BATCH = 16
# Short and long choices: the harness computes a prompt once for all choices of one token, and again for every longer one.
CHOICES = {
    "rank_vs_lm_eval": ("World", "Sports", "Business", "Science and technology"),
    "rank_sentences_vs_lm_eval": (
        "The bridge will be open again before the winter, the mayor said after the meeting.",
        "Nobody had asked the people who live on the other side of the river.",
        "A new bridge would cost more than the town spends in three years.",
        "The engineers found that the old stones were in better shape than the new ones.",
    ),
}
STORY = "The council met on Tuesday to decide about the old bridge over the river, which had been closed since the spring floods. "
REPLY = 32  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=128)  # enough rows that the last, half-empty batch weighs little
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    folder = local_folder(chosen.model)
    model: Any = load_model(folder, torch.float32)
    tokenizer = Tokenizer(folder)
    texts = [f"{STORY * (1 + number % 5)}Row {number}. Topic:" for number in range(chosen.rows)]
    for figure, choices in CHOICES.items():
        _ranking(f"evaluation.{figure}", choices, folder, model, tokenizer, texts, chosen.runs)
    _generation(model, tokenizer, texts, chosen.runs)


def _ranking(figure: str, said: Sequence[str], folder: Path, model: Any, tokenizer: Tokenizer, texts: list[str], runs: int) -> None:
    peer_name = "lm_eval hf"
    if importlib.util.find_spec("lm_eval") is None:
        report(figure, None, unit="ratio", goal=2.0, why="lm_eval is not installed")
        return
    prompts = tokenizer.encode_batch(texts)
    choices = [tokenizer.encode_batch([f" {choice}" for choice in said])] * len(texts)

    def ours() -> Any:
        longest = max(map(len, prompts)) + sum(map(len, choices[0]))
        return choice_logprobs(model, prompts, choices, batch_tokens=BATCH * longest)

    theirs = _harness(folder, model, texts, said)
    mine, peers = ours(), theirs()
    apart = max(abs(a - b) for line, other in zip(mine, peers, strict=True) for a, b in zip(line, other, strict=True))
    if apart > 1e-2:
        raise SystemExit(f"the two sides do not measure the same: log-probabilities differ by {apart:.3g}")
    compare(figure, _rate(ours, len(texts)), peer_name, _rate(theirs, len(texts)), runs=runs, goal=2.0)


def _harness(folder: Path, model: Any, texts: list[str], said: Sequence[str]) -> Callable[[], Any]:
    """The same questions for lm-evaluation-harness' `hf` model with the same weights."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    peer = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=BATCH, device="cpu")
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(text, f" {choice}"), idx=place)
        for text in texts
        for place, choice in enumerate(said)
    ]

    def run() -> Any:
        flat = [value for value, _ in peer.loglikelihood(requests, disable_tqdm=True)]
        return [flat[start : start + len(said)] for start in range(0, len(flat), len(said))]

    return run


def _generation(model: Any, tokenizer: Tokenizer, texts: list[str], runs: int) -> None:
    prompts = tokenizer.encode_batch(texts)
    # Replies end at a stop token, as in an evaluation, so a padded batch waits for its longest reply.
    stops = frozenset(tokenizer.encode("."))

    def ours() -> Any:
        return generate(model, prompts, max_new_tokens=REPLY, stop_ids=stops, max_running=BATCH)

    def theirs() -> Any:
        replies = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with torch.inference_mode():
                generated = model.generate(
                    ids, attention_mask=mask, max_new_tokens=REPLY, do_sample=False, eos_token_id=sorted(stops), pad_token_id=0
                )
            for line in generated[:, width:].tolist():
                end = next((place for place, token in enumerate(line) if token in stops), len(line))
                replies.append(line[:end])
        return replies

    same = sum(a == b for a, b in zip(ours(), theirs(), strict=True))
    if same < 0.9 * len(prompts):
        raise SystemExit(f"the two sides do not write the same: {same} of {len(prompts)} replies are alike")
    compare(
        "evaluation.generate_vs_transformers",
        _rate(ours, len(prompts)),
        "transformers generate, padded",
        _rate(theirs, len(prompts)),
        runs=runs,
        goal=1.5,
    )


def _rate(work: Callable[[], Any], rows: int) -> Callable[[], float]:
    """Rows per second of one run of `work`."""

    def timed() -> float:
        began = time.perf_counter()
        work()
        return rows / (time.perf_counter() - began)

    return timed


if __name__ == "__main__":
    claim_stdout()
    main()
