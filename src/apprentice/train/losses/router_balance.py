"""Load-balancing loss of mixture-of-experts models, beside the loss of supervised fine-tuning.

For a row and a layer it is E · Σ f(e) · p(e) over the E experts: f(e) is how many of a token's choices fall on expert e, p(e) the
router's probability of it, both as means over the row's tokens (Fedus et al. 2022, "Switch Transformers", section 2.2). It is
least, the number of choices of a token, where all experts get alike. Layers are averaged.

A row counts as much as its target tokens do in the loss. So the sum over a step is the same however its rows are divided into
micro-batches and among workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apprentice.errors import RecipeError
from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses.sft import SupervisedLoss


class RouterBalancedLoss(SupervisedLoss):
    """`SupervisedLoss` whose gradient is also that of `weight` times the load-balancing loss, while it trains.

    Its value stays the negative log-likelihood; `figures` has the load-balancing loss as `router_loss`. Raises `RecipeError` for a
    model without experts, and for an encoder-decoder.
    """

    def __init__(self, model: Any, weight: float, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        config = model.config
        if config.is_encoder_decoder:
            raise RecipeError(f"training.router_loss is for causal models, and {config.model_type} is none; leave it out.")
        if not hasattr(config, "router_aux_loss_coef"):
            raise RecipeError(f"training.router_loss balances the load of experts, and {config.model_type} has none; leave it out.")
        self._weight, self._choices = weight, int(config.num_experts_per_tok)
        self._router_logits: tuple[Tensor, ...] = ()
        config.output_router_logits = True

    def _keep_router_logits(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._router_logits = output.router_logits

    def forward(self, batch: SupervisedBatch) -> Tensor:
        """Loss of `batch`, as in `SupervisedLoss`."""
        if not self.training:
            return super().forward(batch)
        model: Any = self.model
        base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
        # For this pass alone: trial passes make a loss of their own around the model, whose hook would keep its logits for ever.
        hook = base.register_forward_hook(self._keep_router_logits)
        try:
            loss = super().forward(batch)
        finally:
            hook.remove()
        logits, self._router_logits = self._router_logits, ()
        balance = balance_loss(logits, batch.is_target, self._choices)
        self.figures = {"router_loss": balance.detach().double()}
        return loss + self._weight * (balance - balance.detach())


def balance_loss(router_logits: tuple[Tensor, ...], is_target: Tensor, choices: int) -> Tensor:
    """Sum over rows of the load-balancing loss times the row's targets (or their weights), `is_target` (rows, length).

    `router_logits` has a tensor (rows × length, experts) for each layer. Tokens behind a row's last target are padding: left out.
    """
    targets = is_target.float()
    real = (targets.flip(1).cumsum(1).flip(1) > 0).float()
    tokens = real.sum(1).clamp_min(1.0)
    total = torch.zeros((), device=is_target.device)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1).view(*is_target.shape, -1)
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(choices, dim=-1).indices
        counts = torch.zeros(len(targets), experts, device=is_target.device)
        counts.scatter_add_(1, chosen.flatten(1), real.repeat_interleave(choices, dim=1))
        mean = (probabilities * real[..., None]).sum(1) / tokens[:, None]
        balance = experts * (counts / tokens[:, None] * mean).sum(1)
        total = total + (balance * targets.sum(1)).sum()
    return total / max(len(router_logits), 1)
