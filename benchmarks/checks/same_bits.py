"""Proof that a restructuring changed nothing: two commits train, evaluate and serve the same model, compared to the last bit.

    python -m benchmarks.checks.same_bits BEFORE [AFTER]      # AFTER is HEAD by default

Each commit runs in its turn in the same folder, with the environment's libraries, one thread a process, float32 and fixed seeds.
The recipe is the quickstart's with a tiny random model and 20 steps. Only what users have is driven and read: commands, files of
the run folder, HTTP. So names inside the package may change between the two commits. Compared are

    steps      loss, gradient norm, learning rate and counts of each step: steps.jsonl
    rows       the texts of the packed rows of all steps, segment by segment: `apprentice preview --html`
    examples   where the examples of the last step come from: `apprentice trace`
    report     all of report.json but its times
    replies    sixteen replies one after another, with token ids and log-probabilities
    together   the texts of the same sixteen, asked all at once

Prints one JSON object for each, with the first differences; exits 1 if there is one. Takes a few minutes a commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx

from tests.support.tiny_model import save_tiny_model

ROOT = Path(__file__).parents[2]
STEPS = 20
NAME = "same-bits"
STEP_KEYS = ("step", "loss", "grad_norm", "learning_rate", "examples", "tokens", "target_tokens", "reward", "validation_loss")
# Whatever tells the time, the speed or the place: not what was computed.
VOLATILE = re.compile(r"(^|_)(created|date|seconds|time|times|took|id|version|host|machine|memory|per_s|started|ended)($|_)")
SHOWN = 5  # differences that are printed

QUESTIONS = (
    "Name a colour.",
    "Is the customer happy or unhappy? The kettle arrived late, leaks, and the handle is loose.",
    "Write the fields as one English sentence.\n\nname: Oskar | job: baker | city: Lisbon",
    "Übersetze: „Grüß Gott“ 你好 🙂",
    "Sort the numbers 3, 17, 42, 5 and 260.",
    "Where did it happen? On Monday evening Clara met the mayor at the old harbour.",
    "Say <|im_end|> twice.",
    "Summarise the conversation in one sentence. Anna asks Ben to bring bread, and Ben says that he will.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="commit, tag or branch")
    parser.add_argument("after", nargs="?", default="HEAD", help="commit, tag or branch; HEAD by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        save_tiny_model(model)
        before, after = (results_of(commit, Path(folder), model) for commit in (options.before, options.after))
    differ = False
    for name in before:
        differences = list(differences_of(before[name], after[name]))
        differ = differ or bool(differences)
        outcome = {
            "compared": name,
            "same": not differences,
            "values": count_values(before[name]),
            "sha256": digest_of(before[name]),
        }
        print(json.dumps(outcome | ({"differences": differences[:SHOWN]} if differences else {}), ensure_ascii=False), flush=True)
    sys.exit(differ)


def results_of(commit: str, folder: Path, model: Path) -> dict[str, Any]:
    """All compared values of `commit`. Its code and its run lie in `folder` at the same paths as the other commit's."""
    code, work = folder / "code", folder / "work"
    for place in (code, work):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    unpack_commit(commit, code)
    apprentice = Apprentice(code, work)
    model_keys = [f"model.base={model}", "model.dtype=float32"]
    overrides = [f"name={NAME}", f"storage={work / 'runs'}", *model_keys, f"training.steps={STEPS}"]
    apprentice.call("train", "quickstart", *overrides)
    run = work / "runs" / NAME
    records = [json.loads(line) for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    apprentice.call("evaluate", str(run))
    rows = sum(record.get("rows", 2) for record in records if "loss" in record)
    page = work / "rows.html"
    apprentice.call("preview", "quickstart", *overrides, "-n", str(rows), "--html", str(page))
    examples = json.loads(apprentice.call("trace", str(run), "--step", str(STEPS), "--json"))
    with apprentice.endpoint(run) as url:
        one_by_one = [reply_of(url, number) for number in range(2 * len(QUESTIONS))]
        with ThreadPoolExecutor(2 * len(QUESTIONS)) as threads:
            together = list(threads.map(lambda number: reply_of(url, number), range(2 * len(QUESTIONS))))
    return {
        "steps": [{key: record[key] for key in STEP_KEYS if key in record} for record in records],
        "rows": page_texts(page.read_text(encoding="utf-8")),
        "examples": examples,
        "report": without_volatile(json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))),
        "replies": one_by_one,
        "together": [[choice_text(choice) for choice in reply["choices"]] for reply in together],
    }


def unpack_commit(commit: str, folder: Path) -> None:
    """Puts the files of `commit` into `folder`."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", "--format=tar", commit], check=True, stdout=subprocess.PIPE).stdout
    archive = folder.with_suffix(".tar")
    archive.write_bytes(packed)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="tar")


class Apprentice:
    """The command line of the code in the folder `code`, run in the folder `work`."""

    def __init__(self, code: Path, work: Path) -> None:
        source = code / "src"
        fixed = {
            "PYTHONPATH": str(source),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # DeepSpeed calls ninja
        self.environment = os.environ | fixed | {"PATH": beside}
        self.work = work
        imported = self._output([sys.executable, "-c", "import apprentice; print(apprentice.__file__)"])
        if not Path(imported.strip()).is_relative_to(source):
            raise SystemExit(f"{imported.strip()} was imported instead of {source}")

    def call(self, *words: str) -> str:
        """Runs `apprentice WORDS…` to its end; returns what it wrote to standard output."""
        print(f"apprentice {' '.join(words)}", file=sys.stderr, flush=True)
        return self._output(self._command(*words))

    @contextmanager
    def endpoint(self, run: Path) -> Iterator[str]:
        """The URL of `apprentice serve RUN`, which ends with the block."""
        log = self.work / "serve.log"
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(
                self._command("serve", str(run), "--port", "0"),
                cwd=self.work,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
            )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if url := re.search(r"at (http://\S+)", line):
                    yield url[1]
                    return
            raise SystemExit(f"the endpoint did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-c", "import sys; from apprentice.cli import main; sys.exit(main())", *words]

    def _output(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=self.work, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[3:])} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout


def reply_of(url: str, number: int) -> dict[str, Any]:
    """Reply to question `number`: the first half of the numbers greedy, the second sampled with a seed."""
    sampled = number >= len(QUESTIONS)
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "max_tokens": 24,
        "temperature": 0.8 if sampled else 0.0,
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
        **({"seed": number, "top_p": 0.9} if sampled else {}),
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    if answer.status_code != 200:
        raise SystemExit(f"the endpoint answered {answer.status_code}: {answer.text}")
    reply: dict[str, Any] = without_volatile(answer.json())
    return reply


def choice_text(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"])


def page_texts(page: str) -> list[str]:
    """The texts of an HTML page in order, without its styles."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return [unescape(text) for text in re.split(r"<[^>]*>", body) if text.strip()]


def without_volatile(value: Any) -> Any:
    """`value` without the keys that tell a time, a speed or a name made by chance."""
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if not VOLATILE.search(key)}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


def differences_of(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """One line for each value of two JSON documents that differs, in its type or its last bit."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            place = f"{path}.{key}" if path else key
            if key not in before or key not in after:
                yield f"{place}: only {'after' if key in after else 'before'}"
            else:
                yield from differences_of(before[key], after[key], place)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{path}: {len(before)} items before, {len(after)} after"
        for index, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences_of(one, other, f"{path}[{index}]")
    elif (old := json.dumps(before)) != (new := json.dumps(after)):  # 1 is not 1.0, and NaN is NaN
        yield f"{path}: {old} before, {new} after"


def count_values(document: Any) -> int:
    """The number of leaves of a JSON document."""
    if isinstance(document, dict):
        return sum(map(count_values, document.values()))
    return sum(map(count_values, document)) if isinstance(document, list) else 1


def digest_of(document: Any) -> str:
    """The first 16 hex digits of a SHA-256 over the document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
