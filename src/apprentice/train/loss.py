"""The loss of instruction tuning: the sum of the target tokens' negative log-likelihoods, each predicted from its own example.

Examples packed into a row are kept apart by positions that restart; transformers builds the attention mask from them. The
output layer sees only the places whose next token is a target, which for most instructions is a small part of a row: the
same sum, without the largest tensor of the pass. Knows nothing of accumulation or workers: who divides the sum, says by what.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TargetLoss(nn.Module):
    """The sum of `model`'s negative log-likelihoods (nats) over the target tokens of a micro-batch, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor, is_target: Tensor) -> Tensor:
        """All arguments have shape (rows, length); `is_target` is boolean and says which tokens are predicted and count."""
        wanted = torch.zeros_like(is_target)
        wanted[:, :-1] = is_target[:, 1:]  # the place before a target token predicts it
        logits = self._logits(input_ids, positions, wanted)  # (targets, vocabulary)
        return F.cross_entropy(logits.float(), input_ids[:, 1:][is_target[:, 1:]], reduction="sum")

    def _logits(self, input_ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits at the `wanted` places.

        A hook cuts the hidden states just before the output layer, so that what a model does to its logits afterwards (scaling,
        soft caps) still happens. A model whose output layer is no module of its own gives all logits; they are cut afterwards.
        """
        model: Any = self.model
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][wanted], *args[1:])) if head is not None else None
        try:
            logits: Tensor = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits if logits.dim() == 2 else logits[wanted]
