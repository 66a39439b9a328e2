"""MetricSeries: the figures of `steps.jsonl` as columns, read on from where they were read to, smoothed and downsampled.

A picture is some 800 points wide. Of each bucket of steps its least and greatest value are kept, so that no peak is lost.
"""

from __future__ import annotations

import itertools
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy.signal import lfilter

from apprentice.run.folder import Run

_NO_FIGURES = ("attempt", "step", "steps")
_MOST_SAMPLES = 200


class MetricSeries:
    """The series of one run. `read()` takes in what the file has grown by; it is not safe for several threads at once."""

    def __init__(self, run: Run) -> None:
        self._file = run.folder / "steps.jsonl"
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self.events: list[dict[str, Any]] = []  # messages, checkpoints and attempts, in the order of the file
        self.samples: list[dict[str, Any]] = []
        self.memory: dict[str, Any] | None = None
        self._attempt = 0

    @property
    def names(self) -> list[str]:
        """The names of the series, sorted."""
        return sorted(self._values)

    def read(self) -> list[dict[str, Any]]:
        """Takes in the records that were added to the file since the last call; returns them without the rows they trained on."""
        records = []
        for line in self._new_lines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record:
                record.pop("examples", None)
                self._take(record)
                records.append(record)
        return records

    def _new_lines(self) -> Iterable[bytes]:
        """The complete lines behind the offset, which moves on; all lines again of a file that has become shorter."""
        if not self._file.exists():
            return []
        if not self._file.is_local:
            content = self._file.read_bytes()
            data = content[self._offset :] if len(content) >= self._offset else content
            is_shorter = len(content) < self._offset
        else:
            path = self._file.local
            is_shorter = path.stat().st_size < self._offset
            with path.open("rb") as stream:
                stream.seek(0 if is_shorter else self._offset)
                data = stream.read()
        if is_shorter:
            self._reset()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].splitlines()

    def _take(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if record.get("attempt", 0) != self._attempt:
            self._attempt = record.get("attempt", 0)
            if self._attempt > 1:
                self.events.append({"step": step, "kind": "restart", "text": f"attempt {self._attempt} goes on after step {step}"})
        if "message" in record:
            self.events.append({"step": step, "kind": "message", "text": str(record["message"])})
        if "saved_s" in record:
            self.events.append({"step": step, "kind": "checkpoint", "text": f"checkpoint, written in {record['saved_s']:.1f} s"})
        if "samples" in record:
            self.samples = [*self.samples, {"step": step, "samples": record["samples"]}][-_MOST_SAMPLES:]
        self.memory = record.get("memory", self.memory)
        for name, value in record.items():
            if name not in _NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool):
                self._add(name, step, float(value))

    def _add(self, name: str, step: int, value: float) -> None:
        steps, values = self._steps.setdefault(name, array("q")), self._values.setdefault(name, array("d"))
        if steps and steps[-1] >= step:  # training went back to a checkpoint: later steps are made again
            first = bisect_left(steps, step)
            del steps[first:]
            del values[first:]
        steps.append(step)
        values.append(value)

    def sampled(
        self, name: str, *, points: int, smoothing: float = 0.0, first: int | None = None, last: int | None = None
    ) -> dict[str, list[Any]]:
        """`steps` and `values` of a series, at most about `points` of them between the steps `first` and `last`, both included.

        `smoothing` is the weight of the past in an exponential moving average with bias correction, 0 for none. Values that are
        not finite are left out.
        """
        steps = np.array(self._steps.get(name, ()), dtype=np.int64)
        values = np.array(self._values.get(name, ()), dtype=np.float64)
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if smoothing and len(values):
            weights = 1.0 - smoothing ** np.arange(1, len(values) + 1)
            values = lfilter([1.0 - smoothing], [1.0, -smoothing], values) / weights
        begin = 0 if first is None else np.searchsorted(steps, first, "left")
        end = len(steps) if last is None else np.searchsorted(steps, last, "right")
        kept = thin(values[begin:end], points)
        return {"steps": steps[begin:end][kept].tolist(), "values": values[begin:end][kept].tolist()}


def thin(values: np.ndarray[Any, Any], points: int) -> np.ndarray[Any, Any]:
    """Positions, ascending, of at most about `points` values: first, last, and the least and greatest of each bucket."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    buckets = max(1, points // 2)
    edges = np.linspace(0, count, buckets + 1).astype(np.int64)
    kept = {0, count - 1}
    for begin, end in itertools.pairwise(edges):
        part = values[begin:end]
        kept |= {int(begin + part.argmin()), int(begin + part.argmax())}
    return np.array(sorted(kept))
