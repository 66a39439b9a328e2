"""KTO loss (Ethayarajh et al. 2024): answers labelled desirable or not, each compared with a baseline, and not with another.

The baseline, the paper's reference point z₀ (section 4.1), is the mean of log π(y′|x) − log ρ(y′|x) over mismatched prompts and
answers of a batch, at least 0, and nothing is learnt from it. Here the batch is the optimizer step: forward passes over the
mismatched answers of all workers' micro-batches come first, their sum goes round, and the passes that learn follow. So it depends
neither on the number of workers nor on micro-batches or packing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apprentice.recipe import KTO
from apprentice.train.batch import LabelledBatch, MicroBatch, PackedRows, PreferenceBatch
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.forward_passes import ForwardEngine, sum_losses
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.preference import answer_log_probabilities


class KTOLoss(ObjectiveLoss):
    """KTO loss, float32, summed over the answers of a micro-batch (equations 7 and 8 of the paper).

    For an answer with r = log π − log ρ, a baseline z₀ and σ the logistic function: λ_D · (1 − σ(β · (r − z₀))) if it is desirable,
    λ_U · (1 − σ(β · (z₀ − r))) if not. The baseline comes with the batch.
    """

    def __init__(self, model: nn.Module, kto: KTO, compute: torch.dtype | None = None) -> None:
        super().__init__(model, compute)
        self._kto = kto

    def forward(self, batch: LabelledBatch | PreferenceBatch) -> Tensor:
        """Loss of `batch`; of a batch without labels, the mismatched answers, the sum of their r.

        Sets `figures` to sums over the answers: `accuracy` (1 if r is on the right side of the baseline), `margin` (the reward
        β · r, negative where it is undesirable) and `kl` (the baseline).
        """
        ratios = answer_log_probabilities(self.targets, batch) - batch.reference
        if isinstance(batch, PreferenceBatch):
            return ratios.sum()
        signs = torch.where(batch.desirable, 1.0, -1.0)
        weights = torch.where(batch.desirable, self._kto.desirable_weight, self._kto.undesirable_weight)
        above = signs * (ratios - batch.baseline)
        with torch.no_grad():
            sides = {"accuracy": above > 0, "margin": signs * self._kto.beta * ratios, "kl": batch.baseline.expand(len(ratios))}
            self.figures = {name: values.double().sum() for name, values in sides.items()}
        # 1 − σ(x) is σ(−x), which keeps its digits where x is large.
        return (weights * torch.sigmoid(-self._kto.beta * above)).sum()


def measure_baseline(
    engine: ForwardEngine,
    rows: PackedRows,
    micro: int,
    collectives: Collectives,
    lengths: int | None = None,
    *,
    spare: PackedRows | None = None,
    rounds: int | None = None,
) -> float:
    """The baseline (nats, at least 0) over this worker's `rows` of labelled answers and those of all others.

    `micro` and `lengths` are those of `LoopConfig`, `spare` and `rounds` those of `sum_losses`, for workers with unequal numbers of
    rows. All workers must call it.
    """
    mine = rows.mismatched_batches(micro, lengths)
    other = (spare or rows).mismatched_batches(micro, lengths)[0]
    total = sum_losses(engine, mine, other, len(mine) if rounds is None else rounds, collectives)
    [answers] = collectives.sum([rows.loss_denominator])
    return max(0.0, total / max(answers, 1.0))


def with_baseline(batches: Sequence[MicroBatch], baseline: float) -> list[MicroBatch]:
    """The `batches` of labelled answers with their baseline."""
    value = torch.tensor(baseline, dtype=torch.float32)
    return [batch._replace(baseline=value) if isinstance(batch, LabelledBatch) else batch for batch in batches]
