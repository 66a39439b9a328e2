"""Supervised fine-tuning loss: the sum of the target tokens' negative log-likelihoods. The caller divides the sum.

Examples packed into a row do not see each other: in causal models because positions restart, from which transformers builds the
attention mask; in encoder-decoders because of masks that are made here from the segment ids.

The output layer runs only at places whose next token is a target, usually a small part of a row, and on at most `CHUNK_NUMBERS`
logits at once (`chunked_cross_entropy.py`). The sum is the same, without the (rows, length, vocabulary) tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apprentice.errors import RecipeError
from apprentice.train.losses.chunked_cross_entropy import Reduction, at_places, chunked_cross_entropy

CHUNK_NUMBERS = 2**26  # logits computed at once: 256 MiB in float32


class TargetLoss(nn.Module):
    """Negative log-likelihood (nats, float32) of a causal model, summed over the target tokens of a micro-batch.

    `compute` is the number format to multiply in (autocast) if it is not that of the weights. `figures` holds other sums over the
    last micro-batch, by name; it is empty for this loss, and subclasses fill it.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self._compute = compute
        self._in_chunks = True  # false if the model does more to its logits than `_finished` knows,
        self._probed = False  # which the first pass shows
        configs = getattr(model, "peft_config", {}).values()
        self.figures: dict[str, Tensor] = {}  # set by subclasses
        self._alone = any(config.is_prompt_learning for config in configs)
        self._flat = str(getattr(getattr(model, "config", None), "_attn_implementation", "")).startswith("flash")

    def forward(self, input_ids: Tensor, positions: Tensor | None, is_target: Tensor) -> Tensor:
        """Loss of a micro-batch; all arguments have shape (rows, length).

        `is_target` is boolean, true for target tokens, or float32: the weight of each target token, 0 for others. Without
        `positions` every row holds one example. Raises `RecipeError` if `positions` are given with prefix or prompt tuning.
        """
        if is_target.dtype == torch.bool:
            return self._losses_at(input_ids, positions, is_target, "sum")
        losses = self._losses_at(input_ids, positions, is_target > 0, "none")
        return (losses * _weights(is_target[:, 1:])).sum()

    def _losses_at(self, input_ids: Tensor, positions: Tensor | None, is_target: Tensor, reduction: Reduction) -> Tensor:
        if self._alone and positions is not None:
            raise RecipeError(
                "data.packing.strategy must be `none` with tuning.method prefix or prompt: virtual tokens ignore where the examples"
                " of a row begin."
            )
        wanted = torch.zeros_like(is_target)
        wanted[:, :-1] = is_target[:, 1:]  # the place before a target token predicts it
        labels = input_ids[:, 1:][is_target[:, 1:]]
        if self._flat and positions is not None:  # flash attention recognises restarting positions only in a batch of one row
            input_ids, positions, wanted = (tensor.reshape(1, -1) for tensor in (input_ids, positions, wanted))
        given: dict[str, Any] = {"input_ids": input_ids} | ({} if positions is None else {"position_ids": positions})
        return self._losses(lambda: self._called(**given), wanted, labels, reduction)

    def target_log_probabilities(self, prompt: Tensor, reply: Tensor, is_target: Tensor) -> Tensor:
        """Log-probabilities (nats, (targets,)) of the target tokens of `reply` after `prompt`; arguments have shape (1, tokens)."""
        wanted = F.pad(is_target, (prompt.shape[1], 0))
        return -self._losses_at(torch.cat([prompt, reply], dim=1), None, wanted, "none")

    def logits_after(self, prompt: Tensor, reply: Tensor) -> Tensor:
        """Logits (1, tokens, vocabulary) for `prompt` and the `reply` so far, both (1, tokens); the last are the next token's."""
        model: Any = self.model
        if not getattr(model.config, "is_encoder_decoder", False):
            return self._called(input_ids=torch.cat([prompt, reply], dim=1))
        start = torch.full_like(prompt[:, :1], model.config.decoder_start_token_id)
        return self._called(input_ids=prompt, decoder_input_ids=torch.cat([start, reply], dim=1))

    def _called(self, **arguments: Any) -> Tensor:
        with self._casting():
            logits: Tensor = self.model(**arguments, use_cache=False).logits
        return logits

    def _casting(self) -> AbstractContextManager[Any]:
        if self._compute is None:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=self._compute)

    def _losses(self, call: Callable[[], Tensor], places: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Cross-entropy of `labels` (targets,) with the logits of `call()` at `places`, a (rows, length) mask.

        The sum, or with reduction `none` one loss for each place, in order. `call()` calls the output layer once, whatever the
        number of targets. The losses are computed there, in chunks, if `_finished` is all that the model does to its logits
        afterwards. If not (scaling, for example), which the first pass shows in every process alike, the logits of all targets are
        computed at once, and `call()` is made again for them in this first pass. So are they where the output layer has modules of
        its own, LoRA's for example, and all logits of a row where the model names no output layer.
        """
        model: Any = self.model
        head = model.get_output_embeddings()
        if head is None:
            return F.cross_entropy(call()[places].float(), labels, reduction=reduction)
        if not self._in_chunks or next(head.children(), None) is not None:
            hook = head.register_forward_pre_hook(lambda _, given: (at_places(given[0], places), *given[1:]))
            try:
                return F.cross_entropy(call().float(), labels, reduction=reduction)
            finally:
                hook.remove()
        size = max(1, CHUNK_NUMBERS // model.config.get_text_config().vocab_size)
        settings: dict[str, Any] = {"size": size, "finish": self._finished, "casting": self._casting}
        losses, probe, finished = chunked_cross_entropy(call, head, places, labels, reduction, **settings)
        if not self._probed:
            same = torch.allclose(self._finished(probe).float(), finished.float(), rtol=1e-3, atol=1e-3)
            self._probed, self._in_chunks = True, same
        return losses if self._in_chunks else self._losses(call, places, labels, reduction)

    def _finished(self, logits: Tensor) -> Tensor:
        """The model's processing of logits after the output layer, as far as it is known here: soft capping."""
        model: Any = self.model
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


class PairLoss(TargetLoss):
    """`TargetLoss` for an encoder-decoder: prompts in the encoder's rows, answers in the decoder's."""

    def forward(  # type: ignore[override]  # other arguments: an engine calls the loss with what its micro-batches hold
        self,
        input_ids: Tensor,
        segments: Tensor,
        target_ids: Tensor,
        target_positions: Tensor,
        target_segments: Tensor,
        is_target: Tensor,
    ) -> Tensor:
        """Loss of a micro-batch: the first two arguments have shape (rows, length), the others (rows, target length).

        Segment 0 is padding. `target_ids` are the labels, not shifted; `is_target` is as for `TargetLoss`.
        """
        given = (input_ids, segments, target_ids, target_positions, target_segments)
        if is_target.dtype == torch.bool:
            return self._losses_of_pairs(*given, is_target, "sum")
        return (self._losses_of_pairs(*given, is_target > 0, "none") * _weights(is_target)).sum()

    def target_log_probabilities(self, prompt: Tensor, reply: Tensor, is_target: Tensor) -> Tensor:
        """As in `TargetLoss`; `prompt` goes to the encoder, `reply` to the decoder."""
        places = torch.arange(reply.shape[1], device=reply.device)[None]
        given = (prompt, torch.ones_like(prompt), reply, places, torch.ones_like(reply))
        return -self._losses_of_pairs(*given, is_target, "none")

    def _losses_of_pairs(
        self,
        input_ids: Tensor,
        segments: Tensor,
        target_ids: Tensor,
        target_positions: Tensor,
        target_segments: Tensor,
        is_target: Tensor,
        reduction: Reduction,
    ) -> Tensor:
        model: Any = self.model
        shifted = target_ids.roll(1, dims=1)
        decoder_ids = torch.where(target_positions == 0, model.config.decoder_start_token_id, shifted)
        labels = target_ids[is_target]
        if int(segments.max()) <= 1:  # at most one example in each row
            given = {"input_ids": input_ids, "attention_mask": (segments > 0).long(), "decoder_input_ids": decoder_ids}
            return self._losses(lambda: self._called(**given), is_target, labels, reduction)
        if self._alone:
            raise RecipeError("data.packing.strategy must be `none` with tuning.method prefix or prompt.")
        dtype = next(self.model.parameters()).dtype
        earlier = torch.ones(target_ids.shape[1], target_ids.shape[1], dtype=torch.bool, device=target_ids.device).tril()
        of_encoder = _additive(segments[:, :, None] == segments[:, None], dtype)
        of_decoder = _additive((target_segments[:, :, None] == target_segments[:, None]) & earlier, dtype)
        across = _additive(target_segments[:, :, None] == segments[:, None], dtype)

        def call() -> Tensor:
            with torch.autocast(input_ids.device.type, dtype=self._compute) if self._compute is not None else nullcontext():
                encoded = model.get_encoder()(input_ids=input_ids, attention_mask=of_encoder)
            return self._called(
                encoder_outputs=encoded,
                attention_mask=across,
                decoder_input_ids=decoder_ids,
                decoder_attention_mask=of_decoder,
            )

        return self._losses(call, is_target, labels, reduction)


def _weights(counts: Tensor) -> Tensor:
    """The weights that are not 0, in order; shape (targets,)."""
    return counts[counts > 0]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (rows, 1, queries, keys): 0 where `seen`, else the lowest number of `dtype`.

    Not a boolean mask, because transformers' eager attention handles it wrongly.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
