"""Cross-entropy at the target places only, in chunks of targets, within the one call that a model makes of its output layer.

    hidden (rows, length, hidden) ──the places that predict a target──▶ (targets, hidden) ──chunk by chunk──▶ logits ──▶ losses

The (rows, length, vocabulary) tensor of all logits never exists; the logits of one chunk do. All chunks are computed inside the
layer's one call, because under ZeRO-3 each call of a module gathers its weights from all processes: one that called the output
layer once for each chunk would wait for ever for those with fewer targets. For the same reason every process builds the same graph,
a single autograd node, whatever its number of targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Reduction = Literal["sum", "none"]
PROBE = 50.0  # largest of the numbers that show what a model does to its logits


Labels = Any  # of some targets: what a criterion compares their logits with, and what `split(size)` cuts into parts
Criterion = Callable[[Tensor, Labels, Reduction], Tensor]  # losses from logits (targets, vocabulary), float32


def cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    """The criterion of token ids (targets,)."""
    return F.cross_entropy(logits, labels, reduction=reduction)


class TargetPlaces(NamedTuple):
    """Places whose hidden states predict targets, int64 (targets,), in rows of `length` tokens laid end to end."""

    places: Tensor
    length: int

    def take(self, states: Tensor) -> Tensor:
        """The `states` (rows, length, size) at these places, (targets, size). Virtual tokens may stand before each row."""
        virtual = states.shape[1] - self.length  # those of prompt tuning
        places = self.places + (self.places // self.length + 1) * virtual if virtual else self.places
        return states.flatten(0, 1)[places]


def chunked_cross_entropy(
    call: Callable[[], Tensor],
    head: nn.Module,
    places: TargetPlaces,
    labels: Labels,
    reduction: Reduction,
    *,
    size: int,
    finish: Callable[[Tensor], Tensor],
    casting: Callable[[], AbstractContextManager[Any]],
    criterion: Criterion = cross_entropy,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of `labels` (targets,) with the logits of a model at `places`, `size` targets at once.

    Another `criterion` takes labels of its own.

    `call()` calls the model and gives its logits, for which the model calls its output layer `head` once. `finish` is what the
    model does to the logits of `head` afterwards, and `casting()` the context of automatic casts. Returns the sum (with reduction
    `none` one loss for each target), `probe`, and what the model made of `probe`, both (1, vocabulary): where the latter is not
    `finish(probe)`, the losses are wrong.
    """
    chunks = _Chunks(head, labels, reduction, size, finish, casting, criterion)
    results: list[tuple[Tensor, Tensor]] = []

    def forward(hidden: Tensor, *_: Any) -> Tensor:
        """Takes the place of the output layer's computation: keeps the losses, and gives the model `probe` in place of logits."""
        function: Any = _Losses  # PyTorch's `apply` has no types
        inputs = (places.take(hidden), *chunks.parameters)
        # Asked here: inside a Function gradients are off, and `needs_input_grad` is true without them as well.
        with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        results.append(function.apply(chunks, with_gradients, *inputs))
        probe: Tensor = results[0][1]
        return probe

    with patch.object(head, "forward", forward):
        finished = call()
    # The logits take part in the backward pass, though with no number: it is where the gradient of the layer's output arrives that
    # DeepSpeed gathers the layer's weights for it.
    return results[0][0] + finished[:0].sum(), chunks.probe, finished.detach()


class _Chunks:
    """Computes losses, and their gradients, from the hidden states before the output layer, chunk by chunk."""

    def __init__(
        self,
        head: nn.Module,
        labels: Labels,
        reduction: Reduction,
        size: int,
        finish: Callable[[Tensor], Tensor],
        casting: Callable[[], AbstractContextManager[Any]],
        criterion: Criterion,
    ) -> None:
        self.parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        self.reduction = reduction
        self.probe: Tensor  # set by `loss`
        self._criterion = criterion
        self._logits: Callable[[Tensor], Tensor] = head.forward
        self._labels, self._size, self._finish, self._casting = labels.split(size), size, finish, casting

    def split(self, states: Tensor) -> list[tuple[Tensor, Labels]]:
        """The (states, labels) of each chunk; the states are leaves of a graph of their own."""
        parts = states.detach().split(self._size)
        return [(part.requires_grad_(), labels) for part, labels in zip(parts, self._labels, strict=True)]

    def loss(self, states: Tensor, labels: Labels) -> Tensor:
        """Loss of one chunk; `states` is (targets, hidden)."""
        with self._casting():
            logits = self._logits(states)
            self.probe = torch.linspace(-PROBE, PROBE, logits.shape[-1], dtype=logits.dtype, device=logits.device)[None]
            return self._criterion(self._finish(logits).float(), labels, self.reduction)

    def joined(self, losses: Sequence[Tensor]) -> Tensor:
        """The losses of all chunks as one tensor."""
        return torch.stack(list(losses)).sum() if self.reduction == "sum" else torch.cat(list(losses))

    def losses_and_gradients(self, states: Tensor, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The joined losses, and the gradients of the states and of the layer's trained parameters.

        `upstream` is the gradient of the joined losses.
        """
        of_chunks = [upstream] * len(self._labels) if self.reduction == "sum" else upstream.split(self._size)
        losses: list[Tensor] = []
        of_states: list[Tensor] = []
        # In float32, since sums of many chunks in bfloat16 lose the small ones.
        of_parameters = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters]
        for (part, labels), gradient in zip(self.split(states), of_chunks, strict=True):
            with torch.enable_grad():
                loss = self.loss(part, labels)
            of_part, *of_chunk = torch.autograd.grad(loss, [part, *self.parameters], gradient)
            losses.append(loss.detach())
            of_states.append(of_part)
            for total, more in zip(of_parameters, of_chunk, strict=True):
                total.add_(more)
        of_layer = [total.to(parameter.dtype) for total, parameter in zip(of_parameters, self.parameters, strict=True)]
        return self.joined(losses), [torch.cat(of_states), *of_layer]


class _Losses(torch.autograd.Function):
    """Joined losses of `states` (targets, hidden), and the probe of `chunks`, whose own gradient is ignored.

    A single chunk keeps its graph until the backward pass. The gradients of several, where all losses count alike, are computed in
    the forward pass and only scaled in the backward pass (as in Liger's fused linear cross-entropy), so that no logits are computed
    twice. Otherwise, and in float16, where gradients are too small without the loss scale, the backward pass computes them again.
    """

    @staticmethod
    def forward(context: Any, chunks: _Chunks, with_gradients: bool, states: Tensor, *parameters: Tensor) -> Any:
        context.chunks, context.of_one, context.are_computed = chunks, None, False
        parts = chunks.split(states)
        if with_gradients and len(parts) == 1:
            with torch.enable_grad():
                loss = chunks.loss(*parts[0])
            context.of_one = (loss, [parts[0][0], *parameters])
            return loss.detach(), chunks.probe.clone()
        if with_gradients and chunks.reduction == "sum" and states.dtype != torch.float16:
            loss, gradients = chunks.losses_and_gradients(states, states.new_ones((), dtype=torch.float32))
            context.are_computed = True
            context.save_for_backward(*gradients)
            return loss, chunks.probe.clone()
        context.save_for_backward(states)
        return chunks.joined([chunks.loss(*part) for part in parts]), chunks.probe.clone()

    @staticmethod
    def backward(context: Any, upstream: Tensor, _: Tensor) -> Any:
        if context.of_one is not None:
            loss, inputs = context.of_one
            gradients: Sequence[Tensor] = torch.autograd.grad(loss, inputs, upstream)
            context.of_one = ()  # the hidden states are not needed any more
        elif context.are_computed:
            gradients = [gradient * upstream for gradient in context.saved_tensors]
        else:
            _, gradients = context.chunks.losses_and_gradients(*context.saved_tensors, upstream)
        return None, None, *gradients
