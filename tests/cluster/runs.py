"""Runs of the tiny model on a cluster of hosts, and what each is held against: what one process without Ray finds.

Whatever happens to a cluster, every optimizer step must have had the rows that the plan gives it.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.cluster.hosts import Host, Hosts
from tests.support.recipes import tiny_recipe

CPUS, OF_A_WORKER = 7, 4  # of each host and of each training worker: two workers cannot share a host, and two hosts are enough
STEPS = 40
LONGEST_S = 500.0  # that anything may take which no fault holds up

SUBMIT = "import os, sys; os.chdir(sys.argv.pop(1)); sys.argv[0] = 'apprentice'; from apprentice.cli import main; main()"


@dataclass
class Training:
    """A run that has been started on the head, and the steps that it has told of."""

    process: subprocess.Popen[str]
    run: Path

    def steps(self) -> list[tuple[int, list[int]]]:
        """Step and the plan's positions it was made of, as often as it was made."""
        file = self.run / "steps.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(record["step"], sorted(record["examples"])) for record in records if "examples" in record]

    def wait(self, condition: Callable[[], object], within_s: float = LONGEST_S) -> float:
        """Seconds until the condition held. The run must not end before."""
        began = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended: {self.end}")
            assert time.monotonic() - began < within_s, f"{self.run}: nothing for {within_s:g} s"
            time.sleep(0.1)
        return time.monotonic() - began

    def reach(self, step: int) -> None:
        self.wait(lambda: max((number for number, _ in self.steps()), default=0) >= step)

    def next_step(self, within_s: float) -> float:
        """Seconds until a step is made after now; what was on its way is not taken for one."""
        time.sleep(1.0)
        before = len(self.steps())
        return 1.0 + self.wait(lambda: len(self.steps()) > before, within_s)

    @cached_property
    def end(self) -> tuple[int, str]:
        """Exit code, and the sentence on standard error; where there is none, the end of all that was said."""
        out, err = self.process.communicate(timeout=LONGEST_S)
        sentences = re.findall(r"^error: (.*)", err, re.MULTILINE)
        return self.process.returncode, sentences[-1] if sentences else (out + err)[-3000:]


@dataclass
class Place:
    """A cluster that is up, and what runs on it need."""

    cluster: Hosts
    folder: Path
    model: Path

    def recipe(self, **overrides: object) -> Path:
        training = {"steps": STEPS, "checkpoint": {"every_steps": 5}, "resources": {"cpus": OF_A_WORKER}}
        return tiny_recipe(self.folder, self.model, **{f"training__{key}": value for key, value in training.items()} | overrides)

    def begin(self, **overrides: object) -> Training:
        """`apprentice train`, as a job runs it, on the head."""
        recipe = self.recipe(**overrides)
        process = self.cluster.begin(self.cluster.hosts[0], "-m", "apprentice.jobs", "train", "--recipe", str(recipe))
        return Training(process, Path(str(overrides.get("storage", self.folder / "runs"))) / "tiny")

    def submit(self, *words: str, **overrides: object) -> Training:
        """`apprentice submit RECIPE --follow` on the head."""
        recipe = self.recipe(**overrides)
        command = ["submit", recipe.name, *words, "--address", self.cluster.dashboard, "--follow", "--json"]
        return Training(
            self.cluster.begin(self.cluster.hosts[0], "-c", SUBMIT, str(self.folder), *command), self.folder / "runs" / "tiny"
        )

    def loser(self) -> Host:
        """A host besides the head that trains."""
        return next(host for host in self.cluster.running("RayTrainWorker") if host is not self.cluster.hosts[0])

    def restarts(self, training: Training, steps: int = STEPS) -> int:
        """How often a run started its workers again that has ended well, with the rows that it should have had."""
        code, said = training.end
        assert code == 0, f"{code}: {said}\n{self.cluster.logs()}"
        steps_made, plan = training.steps(), planned(training.run, steps)
        assert {step for step, _ in steps_made} == set(plan)
        assert [step for step, positions in steps_made if positions != plan[step]] == [], "steps with other rows"
        return int(json.loads((training.run / "status.json").read_text())["training"]["restarts"])


def planned(folder: Path, steps: int) -> dict[int, list[int]]:
    """The plan's positions of each step, in order, from the run's recipe and index alone."""
    from apprentice.data.stream import make_corpus, render_window
    from apprentice.run.folder import Run
    from apprentice.storage import Folder

    run = Run(Folder.at(str(folder)))
    recipe = run.recipe()
    corpus = make_corpus(recipe, run, parallel=False)
    rows = (list(map(int, row)) for window in itertools.count() for row in render_window(corpus, window)["examples"])
    batch = recipe.training.global_batch
    return {step: sorted(itertools.chain(*itertools.islice(rows, batch))) for step in range(1, steps + 1)}
