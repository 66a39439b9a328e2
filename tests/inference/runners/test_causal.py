"""One forward pass over sequences of different lengths equals the model alone on each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from apprentice.errors import ModelError
from apprentice.inference.kv_cache import KvCache
from apprentice.inference.runners.attention_metadata import TokenChunk
from apprentice.inference.runners.causal import compute_logits, probe_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral, sliding window": MistralConfig(**GROUPED, sliding_window=4),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3, every second layer slides": Gemma3TextConfig(
        **GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
}


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def numbers(length: int, seed: int) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_each_sequence_alone(name: str) -> None:
    model = build(CONFIGS[name])
    probe_model(model)
    memory = KvCache(slots=5, context=32)
    long, short, late = numbers(23, 1), numbers(9, 2), numbers(6, 3)
    rows_of = {}
    steps: list[list[tuple[str, TokenChunk]]] = [
        [("long 10", TokenChunk(3, 0, long[:10])), ("short 0", TokenChunk(0, 0, short[:1]))],
        [
            ("long 19", TokenChunk(3, 10, long[10:20])),
            ("short 1", TokenChunk(0, 1, short[1:2])),
            ("late 3", TokenChunk(1, 0, late[:4])),
        ],
        *(
            [(f"long {20 + n}", TokenChunk(3, 20 + n, [long[20 + n]])), (f"late {4 + n}", TokenChunk(1, 4 + n, [late[4 + n]]))]
            for n in range(2)
        ),
        # Slot 1 is given to another sequence: what lies in its memory must not be seen.
        [
            ("again 2", TokenChunk(1, 0, short[:3])),
            ("long 22", TokenChunk(3, 22, long[22:])),
            ("short 2", TokenChunk(0, 2, short[2:3])),
        ],
    ]
    for step in steps:
        logits = compute_logits(model, memory, [segment for _, segment in step])
        rows_of |= {label: row for (label, _), row in zip(step, logits, strict=True)}
    texts = {"long": long, "short": short, "late": late, "again": short}
    expected = {word: alone(model, ids) for word, ids in texts.items()}
    assert len(rows_of) == 12
    for label, row in rows_of.items():
        word, position = label.split()
        own = expected[word][9 if label == "long 10" else int(position)]
        torch.testing.assert_close(row, own, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_arithmetic_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, as long as the matrix products sum alike, for which the row is filled up to the same number of tokens."""
    model = build(CONFIGS["llama"], dtype)
    probe_model(model)
    texts = [numbers(20 + 3 * number, number) for number in range(16)]

    def last(slots: dict[int, int], fillers: int) -> torch.Tensor:
        """Logits of text 3 where the texts lie in `slots`; `fillers` are other texts' single tokens in slots from 20 on."""
        memory = KvCache(slots=40, context=256)
        for text, slot in slots.items():
            compute_logits(model, memory, [TokenChunk(slot, 0, texts[text][:-1])])
        segments = [TokenChunk(slot, len(texts[text]) - 1, texts[text][-1:]) for text, slot in slots.items()]
        others = [TokenChunk(20 + number, 0, [number]) for number in range(fillers)]
        return compute_logits(model, memory, [*others, *segments])[fillers + list(slots).index(3)]

    together = last({text: text for text in range(16)}, fillers=0)
    alone = last({3: 7}, fillers=15)
    assert torch.equal(alone, together)


def test_memory_is_written_in_place() -> None:
    model = build(CONFIGS["llama"])
    probe_model(model)
    memory = KvCache(slots=2, context=16)
    compute_logits(model, memory, [TokenChunk(0, 0, [1, 2, 3])])
    places = [part.data_ptr() for pair in memory._layers.values() for part in pair]
    before = memory._layers[0][0].clone()
    compute_logits(model, memory, [TokenChunk(0, 3, [4]), TokenChunk(1, 0, [5, 6])])
    after = memory._layers[0][0]
    assert [part.data_ptr() for pair in memory._layers.values() for part in pair] == places
    assert len(places) == 4
    changed = (before != after).any(dim=-1).any(dim=1)  # (slots, context)
    assert changed.nonzero().tolist() == [[0, 3], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["positions by slope", "a state instead of keys"],
)
def test_models_that_do_not_fit_are_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ModelError, match="ForCausalLM"):
        probe_model(build(config))
