"""One forward pass over ragged sequences equals the model alone on each of them."""

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
from apprentice.inference.batch import Group, KvMemory, Ragged, Segment, forward, group_slots, prepare

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


def test_adjacent_slots_of_one_bucket_are_grouped() -> None:
    assert group_slots([0, 1, 2, 4, 5], [9, 128, 129, 8, 8], context=200) == [
        Group(first=0, slot=0, count=2, read=128),
        Group(first=2, slot=2, count=1, read=200),
        Group(first=3, slot=4, count=2, read=128),
    ]
    assert group_slots([], [], context=200) == []


def test_the_flat_row_has_single_tokens_first_in_order_of_slots() -> None:
    ragged = Ragged(KvMemory(4, 16), [Segment(3, 0, [7, 8, 9]), Segment(1, 9, [5]), Segment(0, 5, [4])], torch.device("cpu"))
    assert ragged.order == [2, 1, 0]
    assert ragged.ids.tolist() == [4, 5, 7, 8, 9]
    assert ragged.slots.tolist() == [0, 1, 3, 3, 3]
    assert ragged.positions.tolist() == [5, 9, 0, 1, 2]
    assert ragged.kept.tolist() == [0, 1, 4]
    assert ragged.order_kept.tolist() == [2, 1, 0]
    keys = torch.zeros(4, 2, 16, 8)
    mask = ragged.mask(ragged.groups[0], 3, keys)
    assert mask.shape == (2, 2, 1, 16)
    assert (mask[:, 1, 0] == 0).tolist() == [[False] * 3 + [True] * 3 + [False] * 10, [False] * 7 + [True] * 3 + [False] * 6]
    assert ragged.mask(ragged.chunks[0], None, keys) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_each_sequence_alone(name: str) -> None:
    model = build(CONFIGS[name])
    prepare(model)
    memory = KvMemory(slots=5, context=32)
    long, short, late = numbers(23, 1), numbers(9, 2), numbers(6, 3)
    seen = {}
    steps: list[list[tuple[str, Segment]]] = [
        [("long 10", Segment(3, 0, long[:10])), ("short 0", Segment(0, 0, short[:1]))],
        [("long 19", Segment(3, 10, long[10:20])), ("short 1", Segment(0, 1, short[1:2])), ("late 3", Segment(1, 0, late[:4]))],
        *(
            [(f"long {20 + n}", Segment(3, 20 + n, [long[20 + n]])), (f"late {4 + n}", Segment(1, 4 + n, [late[4 + n]]))]
            for n in range(2)
        ),
        # Slot 1 is given to another sequence: what lies in its memory must not be seen.
        [("again 2", Segment(1, 0, short[:3])), ("long 22", Segment(3, 22, long[22:])), ("short 2", Segment(0, 2, short[2:3]))],
    ]
    for step in steps:
        logits = forward(model, memory, [segment for _, segment in step])
        seen |= {label: row for (label, _), row in zip(step, logits, strict=True)}
    texts = {"long": long, "short": short, "late": late, "again": short}
    expected = {word: alone(model, ids) for word, ids in texts.items()}
    assert len(seen) == 12
    for label, row in seen.items():
        word, position = label.split()
        wanted = expected[word][9 if label == "long 10" else int(position)]
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_arithmetic_in_any_company(dtype: torch.dtype) -> None:
    """Bit for bit, as long as the matrix products sum alike, for which the row is filled up to the same number of tokens."""
    model = build(CONFIGS["llama"], dtype)
    prepare(model)
    texts = [numbers(20 + 3 * number, number) for number in range(16)]

    def last(slots: dict[int, int], fillers: int) -> torch.Tensor:
        """Logits of text 3 where the texts lie in `slots`; `fillers` are other texts' single tokens in slots from 20 on."""
        memory = KvMemory(slots=40, context=256)
        for text, slot in slots.items():
            forward(model, memory, [Segment(slot, 0, texts[text][:-1])])
        segments = [Segment(slot, len(texts[text]) - 1, texts[text][-1:]) for text, slot in slots.items()]
        others = [Segment(20 + number, 0, [number]) for number in range(fillers)]
        return forward(model, memory, [*others, *segments])[fillers + list(slots).index(3)]

    together = last({text: text for text in range(16)}, fillers=0)
    alone = last({3: 7}, fillers=15)
    assert torch.equal(alone, together)


def test_memory_is_written_in_place() -> None:
    model = build(CONFIGS["llama"])
    prepare(model)
    memory = KvMemory(slots=2, context=16)
    forward(model, memory, [Segment(0, 0, [1, 2, 3])])
    places = [part.data_ptr() for pair in memory._layers.values() for part in pair]
    before = memory._layers[0][0].clone()
    forward(model, memory, [Segment(0, 3, [4]), Segment(1, 0, [5, 6])])
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
        prepare(build(config))
