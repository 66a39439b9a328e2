"""Report of an estimate for hardware that is not here: lines of text, and an object for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.preflight.hardware.advice import FittingVariant, find_fitting_variants
from apprentice.preflight.hardware.devices import GB, parse_hardware
from apprentice.preflight.hardware.hardware_estimate import (
    UNKNOWN_STEPS,
    USABLE,
    HardwareEstimate,
    HardwareEstimator,
    parts_of,
    place_recipe,
)
from apprentice.recipe import Recipe


@dataclass(frozen=True)
class HardwareReport:
    """An estimate, and the ways to make the recipe fit where it does not."""

    estimate: HardwareEstimate
    variants: Sequence[FittingVariant] = ()

    def lines(self) -> list[tuple[str, str, str]]:
        """(`ok`, `NO` or nothing, subject, sentence) of each line."""
        made = self.estimate
        rows = [
            ("ok", "hardware", self._hardware()),
            ("ok" if made.fits_gpu else "NO", "memory", self._gpu()),
            ("ok" if made.fits_host else "NO", "host", self._host()),
            ("ok", "step", self._step()),
            ("ok", "run", self._run()),
        ]
        rows += [("", "or" if number else "fits with", _sentence(way)) for number, way in enumerate(self.variants)]
        if not made.fits and not self.variants:
            rows.append(("", "remedy", "nothing known here makes it fit; name more or larger GPUs, or a smaller model"))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """The report as an object; bytes and seconds."""
        made = self.estimate
        return {
            "is_estimate": True,
            "hardware": str(made.hardware),
            "source": made.hardware.device.source,
            "fits": made.fits,
            "workers": made.recipe.training.max_workers,
            "micro_batch": made.micro,
            "parameters": made.size.parameters,
            "trained": made.size.trained,
            "gpu": {**parts_of(made.gpu), "total": made.gpu.total, "memory": made.hardware.device.memory},
            "host": {**parts_of(made.host), "total": made.host.total, "memory": made.hardware.host_memory},
            "usable_share": USABLE,
            "step_s": {**parts_of(made.step), "total": made.step.total},
            "tokens_per_s": made.tokens_per_s,
            "mfu": made.mfu,
            "steps": made.steps,
            **_durations(made),
            "variants": [
                {
                    "overrides": [str(setting) for setting in way.settings],
                    "hardware": str(way.estimate.hardware),
                    "changes_learning": way.changes_learning,
                    "gpu_bytes": way.estimate.gpu.total,
                    "host_bytes": way.estimate.host.total,
                    "step_s": way.estimate.step.total,
                    **_durations(way.estimate),
                }
                for way in self.variants
            ],
        }

    def _hardware(self) -> str:
        made = self.estimate
        workers, micro = made.recipe.training.max_workers, made.micro
        return (
            f"an estimate, nothing was run: {made.hardware} ({made.hardware.device.source}); {workers} worker{'s' * (workers != 1)}"
            f" of a GPU each, {micro} row{'s' * (micro != 1)} of {made.recipe.data.packing.length} tokens at once;"
            f" {made.size.parameters / 1e9:.2f} billion numbers, {made.size.trained / 1e6:.1f} million of them trained"
        )

    def _gpu(self) -> str:
        made = self.estimate
        device = made.hardware.device.memory
        return f"{made.gpu.total / GB:.1f} of {USABLE * device / GB:.0f} GB that a GPU has for it ({_gigabytes(made.gpu)})"

    def _host(self) -> str:
        made = self.estimate
        room = USABLE * made.hardware.host_memory
        return f"{made.host.total / GB:.0f} of {room / GB:,.0f} GB that a node's host has for it ({_gigabytes(made.host)})"

    def _step(self) -> str:
        made = self.estimate
        parts = ", ".join(f"{name} {value:.3g}" for name, value in parts_of(made.step).items())
        each = made.tokens_per_s / made.hardware.total_gpus
        return f"{made.step.total:.3g} s ({parts}): {made.tokens_per_s:,.0f} tokens/s, {each:,.0f} a GPU, MFU {made.mfu:.2f}"

    def _run(self) -> str:
        made = self.estimate
        length = f"{made.steps or UNKNOWN_STEPS:,} steps"
        why = "" if made.steps else "; `apprentice prepare` says how many steps the run has"
        return f"{length}: {made.hours:,.2f} hours, {made.hours * made.hardware.total_gpus:,.1f} GPU-hours{why}"


def report_on_hardware(recipe: Recipe, name: str) -> HardwareReport:
    """The report of `recipe` on the hardware `name`, as `parse_hardware` reads it. Needs no Ray, no GPU and no weights.

    Raises `ResourcesError` for hardware that is not known, `RecipeError` if the batch cannot be divided among its GPUs, and
    `ModelError` without a config.json.
    """
    hardware = parse_hardware(name)
    estimator = HardwareEstimator(hardware)
    estimate = estimator.estimate(place_recipe(recipe, hardware))
    return HardwareReport(estimate, () if estimate.fits else find_fitting_variants(estimate, estimator))


def _durations(estimate: HardwareEstimate) -> dict[str, float]:
    """Hours and GPU-hours, with the keys that say whether they are of the run or of 1,000 steps."""
    per = "" if estimate.steps else "_per_1000_steps"
    return {f"hours{per}": estimate.hours, f"gpu_hours{per}": estimate.hours * estimate.hardware.total_gpus}


def _sentence(way: FittingVariant) -> str:
    made = way.estimate
    other = "; another model comes of it" if way.changes_learning else ""
    return (
        f"{way} ({made.gpu.total / GB:.1f} GB a GPU, {made.host.total / GB:.0f} GB a host,"
        f" {made.tokens_per_s:,.0f} tokens/s{other})"
    )


def _gigabytes(parts: Any) -> str:
    return ", ".join(f"{name} {'unknown' if size is None else f'{size / GB:.1f}'}" for name, size in parts_of(parts).items())
