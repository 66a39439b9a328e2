"""A tiny random model with a real tokenizer, the same every time. Heavy packages are imported by the functions that need them."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a tiny apprentice.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "Is the review positive or negative? The film was a delight from the first scene to the last.",
    "Answer the question with words from the passage. Who wrote the letter that arrived in the morning?",
    "Translate the sentence into German: the children are playing in the garden behind the house.",
    "Does the second sentence follow from the first? Answer yes, no or maybe.",
    "Summarise the conversation in one sentence. Anna asks Ben to bring bread, and Ben says that he will.",
    "Sort the numbers 3, 17, 42, 5 and 260 from the smallest to the largest.",
    "Write a short poem about the sea at night, then explain each line in your own words.",
    "Which topic is this about: sports, business, science or the world? Name one and say why.",
)


def save_tiny_model(folder: Path) -> None:
    """Writes a random Llama (hidden 64, 2 layers, 2 heads, fp32 safetensors) and a byte-level BPE tokenizer of 512 tokens.

    `<|im_end|>` ends, `<|im_start|>` begins, `<|pad|>` pads; the chat template adds a system text of its own when none is given.
    """
    save_tiny_tokenizer(folder)
    save_tiny_weights(folder)


def save_tiny_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def save_tiny_weights(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,  # logits far enough apart that greedy replies are not decided by rounding
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
