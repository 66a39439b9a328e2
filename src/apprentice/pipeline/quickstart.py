"""The quickstart: trains, evaluates and serves a model on the built-in mixture, asks it three instructions, prints a table.

A user could do all of it with the other commands.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from apprentice import pipeline
from apprentice.console import Screen
from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.storage import Folder

SHORT = ("name=quickstart-short", "training.steps=4", "training.optimizer.warmup_steps=1", "evaluation.max_examples=4")
QUESTIONS = (
    ("Is the customer happy or unhappy? Answer with one word.", "The kettle arrived late, leaks, and the handle is loose."),
    (
        "Where did it happen? Answer with words from the text.",
        "On Monday evening Clara met the mayor at the old harbour to talk about the bridge.",
    ),
    ("Write the fields as one English sentence.", "name: Oskar | job: baker | city: Lisbon"),
)


def run(storage: str, *, short: bool, screen: Screen) -> dict[str, Any]:
    """Downloads, trains, evaluates, serves and asks; prints the table and returns the same as a dictionary. `short`: 4 steps."""
    recipe = load_recipe(find_recipe("quickstart"), [f"storage={Folder.at(storage)}", *(SHORT if short else ())])
    took: dict[str, float] = {}
    screen.say(
        f"apprentice quickstart: {recipe.model.base}, {recipe.training.steps} steps, run folder {recipe.storage}/{recipe.name}"
    )
    with _timed(took, "fetch"):
        folder = local_folder(recipe.model.base)
    with ray_session():
        with _timed(took, "train"):
            trained = pipeline.train_run(recipe, restart=True, progress=screen.progress)
        with _timed(took, "evaluate"):
            report, place = pipeline.evaluate_run(recipe, progress=screen.progress)
        with _timed(took, "serve"), pipeline.run_endpoint(trained["run"], port=0, progress=screen.progress) as url:
            replies = [_ask(url, recipe, instruction, text) for instruction, text in QUESTIONS]
    result = {
        "run": trained["run"],
        "model": str(folder),
        "training": {key: trained[key] for key in ("steps", "loss", "validation_loss", "tokens_per_s", "wait_share")},
        "summary": report["summary"],
        "replies": replies,
        "seconds": {stage: round(seconds, 1) for stage, seconds in took.items()},
        "report": str(place / "report.html"),
    }
    _show(result, screen)
    return result


@contextmanager
def _timed(took: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    took[stage] = time.monotonic() - start


def _ask(url: str, recipe: Recipe, instruction: str, text: str) -> dict[str, str]:
    """Sends one instruction over HTTP with the `openai` client, as any other program would."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300.0) as client:
        reply = client.chat.completions.create(
            model=recipe.name,
            messages=[{"role": "user", "content": f"{instruction}\n\n{text}"}],
            max_tokens=recipe.evaluation.max_new_tokens,
            temperature=0.0,
        )
    return {"instruction": instruction, "input": text, "reply": (reply.choices[0].message.content or "").strip()}


def _show(result: Mapping[str, Any], screen: Screen) -> None:
    from rich.table import Table

    training = result["training"]
    table = Table("stage", "seconds", "result", title="apprentice quickstart", title_justify="left", min_width=60)
    seconds = result["seconds"]
    table.add_row("fetch", f"{seconds['fetch']:.0f}", result["model"])
    table.add_row(
        "train",
        f"{seconds['train']:.0f}",
        f"{training['steps']} steps, loss {training['loss']:.3f},"
        f" validation loss {pipeline.format_loss(training['validation_loss'])}, {training['tokens_per_s']:.0f} tokens/s",
    )
    table.add_row("evaluate", f"{seconds['evaluate']:.0f}", result["summary"]["sentence"])
    for number, item in enumerate(result["replies"]):
        shown = f"[bold]{item['instruction']}[/bold] {item['input']}\n→ {item['reply']}"
        table.add_row("serve" if number == 0 else "", f"{seconds['serve']:.0f}" if number == 0 else "", shown)
    screen.show(table)
    screen.say(f"report: {result['report']}")
    screen.say(f"serve it again: apprentice serve {result['run']}")
