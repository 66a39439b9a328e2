"""The equivalence certificate `equivalence.json` beside exported weights: how far they are from the run's model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

CERTIFICATE_FILE = "equivalence.json"
RESAMPLES = 2000


class MeanWithInterval(BaseModel):
    """A mean over all target tokens, with the interval that holds 95% of its values where rows are drawn anew."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float
    low: float
    high: float


NOTHING = MeanWithInterval(value=0.0, low=0.0, high=0.0)


class EquivalenceCertificate(BaseModel):
    """How far exported weights are from the run's model, on rows that it was not trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 1
    format: str = Field(description="As `--format` names it.")
    read_by: str = Field(description="Program that read the exported files for the comparison; `bytes`: they are the run's own.")
    run: str
    reference_sha256: str = Field(description="Of the run's model, as its prompt contract says it.")
    files: dict[str, str] = Field(description="Name → SHA-256 of the files with exported weights.")
    rows_from: str = Field(description="`validation` rows of the run, or `training` rows where it has none.")
    rows: int
    tokens: int
    mean_kl: MeanWithInterval = Field(description="Kullback-Leibler divergence from the run's model, nats a token.")
    log_likelihood_change: MeanWithInterval = Field(description="Of the right answers, nats a token; negative: less probable.")
    token_accuracy_change: MeanWithInterval = Field(description="Share of the answers' tokens that are the most probable ones.")
    tolerance: float = Field(description="Largest mean divergence that was allowed.")

    def sentence(self) -> str:
        """The certificate in a sentence, for the model card."""
        if self.read_by == "bytes":
            return "The weights are, byte for byte, those of the run."
        divergence, change = self.mean_kl, self.token_accuracy_change
        return (
            f"As {self.format}, read by {self.read_by}, on {self.rows} {self.rows_from} rows with {self.tokens:,} tokens of"
            f" answers: the mean divergence from the run's model is {divergence.value:.2e} nats a token ({divergence.low:.2e} to"
            f" {divergence.high:.2e}), and the most probable token is the right one {change.value:+.2%} more often"
            f" ({change.low:+.2%} to {change.high:+.2%})."
        )


def mean_with_interval(sums: Sequence[float], tokens: Sequence[int], seed: int = 0) -> MeanWithInterval:
    """Sum of `sums` by sum of `tokens`, and its bootstrap interval over rows (Efron 1979); the same numbers give the same one."""
    values, counts = np.asarray(sums, dtype=float), np.asarray(tokens, dtype=float)
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = values[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return MeanWithInterval(value=float(values.sum() / counts.sum()), low=float(low), high=float(high))


def digests_of(folder: Path, is_of_weights: Callable[[Path], bool]) -> dict[str, str]:
    """Path in `folder` → SHA-256 of the files for which `is_of_weights` is true."""
    digests = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and is_of_weights(file):
            with file.open("rb") as stream:
                digests[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
