"""Negative log-likelihoods of target tokens: what the losses of all objectives but `reward` are made of.

Examples packed into a row do not see each other: in causal models because positions restart, from which transformers builds the
attention mask, or, where the attention takes all rows as one flat sequence (`apprentice.models.attention`), because of the bounds
that it is given; in encoder-decoders because of the sizes that their attention is given, or of masks that are made here from the
segment ids.

The output layer runs only at places whose next token is a target, usually a small part of a row, and on at most `CHUNK_NUMBERS`
logits at once (`chunked_cross_entropy.py`). The losses are the same, without the (rows, length, vocabulary) tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.errors import RecipeError
from apprentice.models.attention.backend_choice import is_flat
from apprentice.models.attention.t5_segments import T5_SEGMENTS, add_bias_by_distance
from apprentice.train.batch import Seq2SeqBatch, target_places
from apprentice.train.compat import attention_name
from apprentice.train.losses.chunked_cross_entropy import (
    Criterion,
    Labels,
    Reduction,
    TargetPlaces,
    chunked_cross_entropy,
    cross_entropy,
)
from apprentice.train.sequence_bounds import ExampleSizes, SequenceBounds

CHUNK_NUMBERS = 2**26  # logits computed at once: 256 MiB in float32


class TargetLosses:
    """Negative log-likelihoods (nats, float32) of target tokens under `model`.

    `compute` is the number format to multiply in (autocast) if it is not that of the weights. With reduction `sum` a result is the
    sum over all targets, with `none` it has shape (targets,), in the order of the rows.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype | None = None) -> None:
        self._model: Any = model
        self._compute = compute
        self._in_chunks = True  # false if the model does more to its logits than `_finish_logits` knows,
        self._probed = False  # which the first pass shows
        configs = getattr(model, "peft_config", {}).values()
        self._has_virtual_tokens = any(config.is_prompt_learning for config in configs)
        self._is_flat = is_flat(attention_name(model))
        self._takes_sizes = attention_name(model) == T5_SEGMENTS
        if self._takes_sizes:
            add_bias_by_distance(model)

    def causal(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        places: Tensor,
        reduction: Reduction,
        bounds: SequenceBounds | None = None,
    ) -> Tensor:
        """Losses of a causal model's targets at `places` of the rows laid end to end; other tensors have shape (rows, length).

        Without `positions` every row holds one example; `bounds` are those that `positions` show, if they are known. Raises
        `RecipeError` if there are some with prefix or prompt tuning.
        """
        if self._has_virtual_tokens and positions is not None:
            raise RecipeError(
                "data.packing.strategy must be `none` with tuning.method prefix or prompt: virtual tokens ignore where the examples"
                " of a row begin."
            )
        labels = input_ids.flatten()[places]
        arguments = self.model_arguments(input_ids, positions, bounds)
        # The place before a target token predicts it.
        length = arguments["input_ids"].shape[1]
        return self._losses(lambda: self.logits(**arguments), TargetPlaces(places - 1, length), labels, reduction)

    def at_places(
        self,
        arguments: Mapping[str, Any],
        places: TargetPlaces,
        labels: Labels,
        reduction: Reduction,
        criterion: Criterion = cross_entropy,
    ) -> Tensor:
        """Losses of `labels` (targets,), predicted at `places`, in a call of the model with `arguments`."""
        return self._losses(lambda: self.logits(**arguments), places, labels, reduction, criterion)

    def logits_at(self, arguments: Mapping[str, Any], places: TargetPlaces) -> Tensor:
        """Logits (targets, vocabulary) at `places`, in a call of the model with `arguments` that computes no others."""
        head = self._model.get_output_embeddings()
        if head is None:
            return places.take(self.logits(**arguments))
        hook = head.register_forward_pre_hook(lambda _, inputs: (places.take(inputs[0]), *inputs[1:]))
        try:
            return self.logits(**arguments)
        finally:
            hook.remove()

    def seq2seq(self, batch: Seq2SeqBatch, reduction: Reduction) -> Tensor:
        """Losses of an encoder-decoder's targets. Raises `RecipeError` for packed rows with prefix or prompt tuning."""
        shifted = batch.target_ids.roll(1, dims=1)
        decoder_ids = torch.where(batch.target_positions == 0, self._model.config.decoder_start_token_id, shifted)
        sizes = batch.sizes or ExampleSizes.of(batch.segment_ids.cpu().numpy(), batch.target_segment_ids.cpu().numpy())
        if sizes.is_packed and self._has_virtual_tokens:
            raise RecipeError("data.packing.strategy must be `none` with tuning.method prefix or prompt.")
        arguments = {"input_ids": batch.input_ids, "decoder_input_ids": decoder_ids}
        if self._takes_sizes:
            arguments |= sizes.keywords()
        elif not sizes.is_packed:
            arguments["attention_mask"] = (batch.segment_ids > 0).long()
        is_masked = sizes.is_packed and not self._takes_sizes
        call = self._masked_call(batch, decoder_ids) if is_masked else lambda: self.logits(**arguments)
        places, length = target_places(batch), decoder_ids.shape[1]
        return self._losses(call, TargetPlaces(places, length), batch.target_ids.flatten()[places], reduction)

    def logits(self, **arguments: Any) -> Tensor:
        """Logits of one call of the model."""
        with self.casting():
            logits: Tensor = self._model(**arguments, use_cache=False).logits
        return logits

    def logits_after(self, prompt: Tensor, reply: Tensor) -> Tensor:
        """Logits (1, tokens, vocabulary) for `prompt` and the `reply` so far, both (1, tokens); the last are the next token's."""
        if not getattr(self._model.config, "is_encoder_decoder", False):
            return self.logits(**self.model_arguments(torch.cat([prompt, reply], dim=1), None, None))
        start = torch.full_like(prompt[:, :1], self._model.config.decoder_start_token_id)
        arguments = {"input_ids": prompt, "decoder_input_ids": torch.cat([start, reply], dim=1)}
        sizes = ExampleSizes.of_one_example(*arguments.values()).keywords() if self._takes_sizes else {}
        return self.logits(**arguments, **sizes)

    def casting(self) -> AbstractContextManager[Any]:
        """Context of automatic casts to the number format that is computed in."""
        if self._compute is None:
            return nullcontext()
        return torch.autocast(next(self._model.parameters()).device.type, dtype=self._compute)

    def model_arguments(self, input_ids: Tensor, positions: Tensor | None, bounds: SequenceBounds | None) -> dict[str, Any]:
        """Arguments of the model for rows (rows, length): as they are, or as one, with `bounds`, for attention that needs that.

        Without `positions` a row is one sequence. Without `bounds` they are read from `positions`, for which the host waits.
        """
        if not self._is_flat:
            return {"input_ids": input_ids} | ({} if positions is None else {"position_ids": positions})
        if positions is None:
            return {"input_ids": input_ids} | SequenceBounds.of_rows(input_ids).keywords()
        bounds = bounds or SequenceBounds.of(positions.cpu().numpy()).to(positions.device)
        return {"input_ids": input_ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)} | bounds.keywords()

    def _masked_call(self, batch: Seq2SeqBatch, decoder_ids: Tensor) -> Callable[[], Tensor]:
        """A call of an encoder-decoder in which masks keep the examples of a row from each other."""
        dtype, sources, targets = next(self._model.parameters()).dtype, batch.segment_ids, batch.target_segment_ids
        earlier = torch.ones(targets.shape[1], targets.shape[1], dtype=torch.bool, device=targets.device).tril()
        of_encoder = _additive_mask(sources[:, :, None] == sources[:, None], dtype)
        of_decoder = _additive_mask((targets[:, :, None] == targets[:, None]) & earlier, dtype)
        across = _additive_mask(targets[:, :, None] == sources[:, None], dtype)

        def call() -> Tensor:
            with self.casting():
                encoded = self._model.get_encoder()(input_ids=batch.input_ids, attention_mask=of_encoder)
            return self.logits(
                encoder_outputs=encoded,
                attention_mask=across,
                decoder_input_ids=decoder_ids,
                decoder_attention_mask=of_decoder,
            )

        return call

    def _losses(
        self,
        call: Callable[[], Tensor],
        places: TargetPlaces,
        labels: Labels,
        reduction: Reduction,
        criterion: Criterion = cross_entropy,
    ) -> Tensor:
        """Cross-entropy of `labels` (targets,), or another criterion, with the logits of `call()` at `places`.

        The sum, or with reduction `none` one loss for each place, in order. `call()` calls the output layer once, whatever the
        number of targets. The losses are computed there, in chunks, if `_finish_logits` is all that the model does to its logits
        afterwards. If not (scaling, for example), which the first pass shows in every process alike, the logits of all targets are
        computed at once, and `call()` is made again for them in this first pass. So are they where the output layer has modules of
        its own, LoRA's for example, and all logits of a row where the model names no output layer.
        """
        head = self._model.get_output_embeddings()
        if head is None:
            return criterion(places.take(call()).float(), labels, reduction)
        if not self._in_chunks or next(head.children(), None) is not None:
            hook = head.register_forward_pre_hook(lambda _, arguments: (places.take(arguments[0]), *arguments[1:]))
            try:
                return criterion(call().float(), labels, reduction)
            finally:
                hook.remove()
        size = max(1, CHUNK_NUMBERS // self._model.config.get_text_config().vocab_size)
        settings: dict[str, Any] = {"size": size, "finish": self._finish_logits, "casting": self.casting}
        settings["criterion"] = criterion
        losses, probe, finished = chunked_cross_entropy(call, head, places, labels, reduction, **settings)
        if not self._probed:
            same = torch.allclose(self._finish_logits(probe).float(), finished.float(), rtol=1e-3, atol=1e-3)
            self._probed, self._in_chunks = True, same
        return losses if self._in_chunks else self._losses(call, places, labels, reduction, criterion)

    def _finish_logits(self, logits: Tensor) -> Tensor:
        """The model's processing of logits after the output layer, as far as it is known here: soft capping."""
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def _additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (rows, 1, queries, keys): 0 where `visible`, else the lowest number of `dtype`.

    Not a boolean mask, because transformers' eager attention handles it wrongly.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
