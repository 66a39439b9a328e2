"""Stand-ins for what recipes name and tests lack: tiny random models, and datasets of the tasks' own samples.

Every library task brings a sample row; some dozens of variants of it, written where the task looks first, make a dataset that each
of its wordings can render. Knows nothing of training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apprentice.tasks.schema import Task

ROWS = 60
SHORT = 20  # characters: a shorter text may be an answer or a label


def write_datasets(tasks: Iterable[Task], root: Path) -> None:
    """`<root>/<dataset>/<split>.parquet` for every task that has a dataset and a sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples: dict[tuple[str, str], dict[str, Any]] = {}  # two tasks may read one dataset
    for task in tasks:
        spec = next((spec for spec in task.sources if spec.dataset is not None), None)
        for split in spec.splits.values() if spec is not None and task.sample is not None else ():
            sample = {spec.columns.get(field, field): value for field, value in task.sample.items()}
            samples[spec.dataset, split] = samples.get((spec.dataset, split), {}) | sample
    for (dataset, split), sample in samples.items():
        (root / dataset).mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist([_variant(sample, number) for number in range(ROWS)]), root / dataset / f"{split}.parquet"
        )


def _variant(sample: dict[str, Any], number: int) -> dict[str, Any]:
    """The sample with a number behind its longest text, so that rows differ (validation rows are chosen by a row's hash)."""
    texts = [key for key, value in sample.items() if isinstance(value, str) and len(value) > SHORT]
    longest = max(texts, key=lambda key: len(sample[key]), default=None)
    return sample if longest is None else sample | {longest: f"{sample[longest]} ({number})"}


def tiny_model_of(name: str, tokenizer: Path, folder: Path, chat_template: str | None = None) -> Path:
    """A random model of the architecture `name` (tests/models/architectures.py' names) with the tiny tokenizer."""
    import torch
    import transformers as hf

    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": chat_template}))
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    t5 = {"vocab_size": 512, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    bart = {
        "vocab_size": 512,
        "d_model": 64,
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
        "max_position_embeddings": 512,
    }
    makers: dict[str, Any] = {
        "bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(**bart, decoder_start_token_id=2, eos_token_id=2, bos_token_id=1, pad_token_id=0)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**sizes, num_key_value_heads=1)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes)),
        "t5_v1.1": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**t5, feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=2, pad_token_id=0)
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        makers[name]().save_pretrained(folder)
    return folder
