"""Log-probabilities of answer choices, in batches; a prompt is computed once for all its choices wherever that is exact.

For a causal model one row of the batch is a prompt followed by all its choices. The last token of a choice is only predicted, so
it is no input:

    prompt [5, 6], choices [7, 8] and [9, 3, 4]
    ids          5  6 | 7 | 9  3
    positions    0  1 | 2 | 2  3
    7 sees       5  6   7
    3 sees       5  6       9  3

An additive mask lets a choice see the prompt and itself only, so the sums are those of separate forward passes. transformers hands
such a mask to the layers unchanged: a layer's sliding window is then not applied, and a recurrent layer ignores the mask. Rows
longer than the window, and all rows of models that mix texts (`architecture.mixing_obstacle`), therefore hold one choice each and
need no mask. Encoder-decoders encode the prompt once (`seq2seq_scoring`). Models with virtual tokens compute each choice in a
forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apprentice.inference.choices.seq2seq_scoring import seq2seq_logprobs
from apprentice.inference.compat import attention_implementation
from apprentice.models.model_kind import has_virtual_tokens, is_encoder_decoder
from apprentice.pretrained.architecture import mixing_obstacle

BATCH_TOKENS = 4096
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # what configs call how far a layer looks back, in tokens
_LOGIT_ROWS = 1024  # positions whose logits one forward pass keeps: 0.2 GB in fp32 with 49,152 words, 1 GB with 256,000


def choice_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], batch_tokens: int = BATCH_TOKENS
) -> list[list[float]]:
    """Natural log-probability of every choice (token ids) after its prompt: the sum over the tokens of the choice.

    `choices[i]` are those of `prompts[i]`; the result has the same order. `batch_tokens` bounds the tokens, padding included, of
    one forward pass (a longer single row still runs alone). Raises `ValueError` for an empty prompt or choice.
    """
    if any(not prompt for prompt in prompts) or any(not ids for group in choices for ids in group):
        raise ValueError("a prompt or a choice without tokens has no log-probability")
    if has_virtual_tokens(model):
        return [[unbatched_logprob(model, prompt, ids) for ids in group] for prompt, group in zip(prompts, choices, strict=True)]
    if prompts and is_encoder_decoder(model):
        return seq2seq_logprobs(model, prompts, choices, batch_tokens)
    limit = _masked_row_limit(model) if prompts else None
    rows = [
        _Row(number, list(prompt), part)
        for number, (prompt, group) in enumerate(zip(prompts, choices, strict=True))
        for part in _parts(len(prompt), group, batch_tokens, limit)
    ]
    logprobs: list[list[float]] = [[0.0] * len(group) for group in choices]
    single_choice = [row for row in rows if limit is not None and sum(row.size) > limit]
    shared = [row for row in rows if limit is None or sum(row.size) <= limit]
    for forward, batches in (
        (_forward, _batches(shared, batch_tokens)),
        (_forward_single_choices, _batches(single_choice, batch_tokens, pads_at_end=True)),
    ):
        for batch in batches:
            for row, sums in zip(batch, forward(model, batch), strict=True):
                for (place, _), value in zip(row.choices, sums, strict=True):
                    logprobs[row.number][place] = value
    return logprobs


@torch.inference_mode()
def unbatched_logprob(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Natural log-probability of `ids` after `prompt`, summed over the tokens of `ids`, in a forward pass of its own."""
    device = next(model.parameters()).device

    def row(values: Sequence[int]) -> Tensor:
        return torch.tensor([list(values)], device=device)

    if is_encoder_decoder(model):
        start = model.config.decoder_start_token_id
        logits = model(input_ids=row(prompt), decoder_input_ids=row([start, *ids[:-1]]), use_cache=False).logits[0]
    else:
        logits = model(input_ids=row([*prompt, *ids]), use_cache=False).logits[0][-len(ids) - 1 : -1]
    return float(logits.float().log_softmax(dim=-1).gather(1, row(ids).T).double().sum())


def _masked_row_limit(model: Any) -> int | None:
    """Maximal tokens of a row in which a mask keeps choices apart; None: any number, 0: the model takes no such mask."""
    config = model.config.get_text_config()
    if attention_implementation(config) not in ("sdpa", "eager"):  # flash attention takes no such mask
        return 0
    if mixing_obstacle(config.to_dict()) is not None:
        return 0
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return min((size for size in windows if isinstance(size, int) and size > 0), default=None)


class _Row:
    """Row of a batch: one prompt with some or all of its choices. `choice_tokens` counts the input tokens of the choices."""

    def __init__(self, number: int, prompt: list[int], choices: list[tuple[int, Sequence[int]]]) -> None:
        self.number = number
        self.prompt = prompt
        self.choices = choices  # (place among all choices of the prompt, ids)
        self.choice_tokens = sum(len(ids) - 1 for _, ids in choices)

    @property
    def size(self) -> tuple[int, int]:
        return len(self.prompt), self.choice_tokens


def _parts(
    prompt: int, group: Sequence[Sequence[int]], batch_tokens: int, limit: int | None
) -> list[list[tuple[int, Sequence[int]]]]:
    """Splits choices, in order, so that prompt and part fit `batch_tokens` and `limit`; a choice too long is a part alone."""
    parts: list[list[tuple[int, Sequence[int]]]] = []
    whole = min(batch_tokens, batch_tokens if limit is None else limit)
    room = 0
    for place, ids in enumerate(group):
        if not parts or len(ids) - 1 > room:
            parts.append([])
            room = whole - prompt
        parts[-1].append((place, ids))
        room -= len(ids) - 1
    return parts


def _batches(rows: list[_Row], batch_tokens: int, *, pads_at_end: bool = False) -> list[list[_Row]]:
    """Groups rows of similar size, longest first, so that memory runs out at once or not at all.

    `pads_at_end`: rows are padded at the end, so the logits that are needed begin in a different column for each prompt.
    """
    batches: list[list[_Row]] = []
    widest = (0, 0)
    for row in sorted(rows, key=lambda row: (row.size, row.number), reverse=True):
        widest = (max(widest[0], row.size[0]), max(widest[1], row.size[1]))
        count = len(batches[-1]) + 1 if batches else 0
        columns_kept = widest[1] + 1 + (widest[0] - row.size[0] if pads_at_end else 0)
        if not count or count * sum(widest) > batch_tokens or count * columns_kept > _LOGIT_ROWS:
            batches.append([])
            widest = row.size
        batches[-1].append(row)
    return batches


@torch.inference_mode()
def _forward(model: Any, batch: list[_Row]) -> list[list[float]]:
    device = next(model.parameters()).device
    width, choice_tokens = max(len(row.prompt) for row in batch), max(row.choice_tokens for row in batch)
    ids, positions, mask = _inputs(batch, width, choice_tokens, next(model.parameters()).dtype)
    # Prompts end in the same column, so the columns whose logits are needed are the last ones.
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=choice_tokens + 1,
    ).logits[:, -choice_tokens - 1 :]  # (rows, 1 + choice_tokens, vocabulary); a model that keeps all of them gives more
    return [_sums(logits[number], row) for number, row in enumerate(batch)]


@torch.inference_mode()
def _forward_single_choices(model: Any, batch: list[_Row]) -> list[list[float]]:
    """`_forward` for rows of one choice each, under the model's own causal mask: padding follows the text, so no token sees it."""
    texts = [[*row.prompt, *row.choices[0][1][:-1]] for row in batch]
    width, first = max(map(len, texts)), min(len(row.prompt) for row in batch) - 1
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    for line, text in enumerate(texts):
        ids[line, : len(text)] = torch.tensor(text)
    columns_kept = width - first
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=columns_kept).logits[:, -columns_kept:]
    return [_sums(logits[line, len(row.prompt) - 1 - first :], row) for line, row in enumerate(batch)]


def _inputs(batch: list[_Row], width: int, choice_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions, int64 (rows, length), and the additive mask (rows, 1, length, length) in `dtype`.

    `length` is `width`, of the longest prompt, and `choice_tokens`, of the row with the most of them. Prompts are padded at the
    start, so that all end in column `width - 1`. The module's docstring shows one row.
    """
    length = width + choice_tokens
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    positions = torch.zeros(len(batch), length, dtype=torch.long)
    # Padding sees itself, so that no row of weights is empty.
    visible = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)
    for number, row in enumerate(batch):
        start = width - len(row.prompt)
        ids[number, start:width] = torch.tensor(row.prompt)
        positions[number, start:width] = torch.arange(len(row.prompt))
        visible[number, start:width, start:width] = torch.ones(len(row.prompt), len(row.prompt), dtype=torch.bool).tril()
        at = width
        for _, choice in row.choices:
            end = at + len(choice) - 1
            ids[number, at:end] = torch.tensor(choice[:-1], dtype=torch.long)
            positions[number, at:end] = len(row.prompt) + torch.arange(end - at)
            visible[number, at:end, start:width] = True
            visible[number, at:end, at:end] = torch.ones(end - at, end - at, dtype=torch.bool).tril()
            at = end
    # An additive mask: a boolean one is silently wrong with eager attention (transformers 5.23).
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return ids, positions, mask[:, None]


def _sums(logits: Tensor, row: _Row) -> list[float]:
    """Log-probability of each choice of a row; logits (1 + choice_tokens, vocabulary) begin after the last token of the prompt."""
    columns, targets, owners = [], [], []
    at = 1
    for order, (_, choice) in enumerate(row.choices):
        columns += [0, *range(at, at + len(choice) - 1)]  # the prompt's last token predicts every choice's first
        targets += list(choice)
        owners += [order] * len(choice)
        at += len(choice) - 1
    used = logits[torch.tensor(columns, device=logits.device)].float()  # (tokens, vocabulary)
    target_ids = torch.tensor(targets, device=logits.device)[:, None]
    logprobs = (used.gather(1, target_ids)[:, 0] - used.logsumexp(dim=-1)).double().cpu()
    sums = torch.zeros(len(row.choices), dtype=torch.float64).index_add_(0, torch.tensor(owners), logprobs)
    return [float(value) for value in sums]
