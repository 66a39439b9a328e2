"""The model card that goes with exported weights: what they are, what they learnt from under which licences, and how they scored.

Pure: takes a run's recipe, contract, ledger, facts of the export and report. What is not known is said to be not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from apprentice import __version__
from apprentice.evaluate.report.run_history import export_sentence, time_sentence
from apprentice.recipe import Recipe
from apprentice.run.contract import PromptContract
from apprentice.run.identity import is_place, without_place
from apprentice.tasks.exposure import exposure_in, exposures
from apprentice.tasks.schema import Task

UNKNOWN = "unknown"


def model_card(
    recipe: Recipe,
    contract: PromptContract,
    ledger: Mapping[str, Any],
    exported: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    tasks: Sequence[Task],
    held_out: set[str] | frozenset[str],
    kind: str,
    equivalence: str = "",
    time: Mapping[str, Any] | None = None,
) -> str:
    """README.md, in Markdown with the hub's metadata before it; `kind` is `text-generation` or `text2text-generation`.

    `equivalence` says how far the files are from the run's model; `time` is the run's ledger of time, as status.json has it.
    """
    parts = [
        _metadata(contract, tasks, held_out, kind),
        f"# {recipe.name}",
        _origin(recipe, contract),
        _speaking(contract),
        _training(recipe, ledger, exported, " ".join(filter(None, (equivalence, time_sentence(time))))),
        _data(ledger, tasks, held_out),
        _scores(report),
        _licences(contract, tasks, held_out),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(contract: PromptContract, tasks: Sequence[Task], held_out: set[str] | frozenset[str], kind: str) -> str:
    sets = sorted({spec.hub for task in tasks if task.name not in held_out for spec in task.sources if spec.hub is not None})
    base = next(iter(contract.ancestors), contract.base)
    values = {
        **({} if is_place(base) else {"base_model": base}),  # the hub refuses a card that names a folder there
        "library_name": "transformers",
        "pipeline_tag": kind,
        "tags": ["apprentice", "instruction-tuning"],
    }
    return "---\n" + yaml.safe_dump(values | ({"datasets": sets} if sets else {}), sort_keys=False) + "---"


def _origin(recipe: Recipe, contract: PromptContract) -> str:
    line = " → ".join([*map(_without_places, contract.ancestors), recipe.name])
    return f"{line}, tuned to follow instructions ({recipe.tuning.method}) with apprentice {__version__}."


def _speaking(contract: PromptContract) -> str:
    golden = contract.golden[0]
    return (
        "## How to ask it\n\n"
        f"`apprentice serve` on this folder phrases requests as in training (layout `{contract.layout}`),"
        " as `apprentice.json` fixes it."
        " With other software a prompt must give the same token ids:"
        f" instruction {golden.instruction!r} with input {golden.input!r} is {list(golden.ids)};"
        f" a reply ends with one of {list(contract.stop_ids)}."
    )


def _training(recipe: Recipe, ledger: Mapping[str, Any], exported: Mapping[str, Any] | None, sentences: str) -> str:
    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"storage": True, "data": {"root"}})
    text = yaml.safe_dump(_without_places(content), sort_keys=False, allow_unicode=True).strip()
    seen = f"{ledger['examples']:,} examples with {ledger['target_tokens']:,} tokens of answers."
    compared = export_sentence(exported) or f"How far these weights are from the trained ones is {UNKNOWN}."
    compared = f"{compared} {sentences}".strip()
    return f"## Training\n\n{seen} {compared}\n\nThe recipe, without what is at its default:\n\n```yaml\n{text}\n```"


def _without_places(value: Any) -> Any:
    """The recipe's values with the last part alone of paths and URIs: a card goes to others."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return without_place(value)


def _data(ledger: Mapping[str, Any], tasks: Sequence[Task], held_out: set[str] | frozenset[str]) -> str:
    lines = ["## Data", "", "| task | cluster | share of examples | licence |", "|---|---|---:|---|"]
    seen = exposures(tasks, held_out)
    for task in sorted(tasks, key=lambda task: (task.name in held_out, task.cluster, task.name)):
        share = ledger["tasks"].get(task.name, {}).get("share_of_examples")
        shown = seen[task.name].replace("_", " ") if task.name in held_out else UNKNOWN if share is None else f"{share:.1%}"
        lines.append(f"| `{task.name}` | {task.cluster} | {shown} | {task.licence} |")
    return "\n".join(lines)


def _scores(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "## Scores\n\nNot evaluated."
    columns = report["columns"]
    lines = ["## Scores", "", str(report["summary"]["sentence"]), ""]
    lines += [f"| task | metric | {' | '.join(column['title'] for column in columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for task in report["tasks"]:
        scores = [task["columns"].get(column["key"], {}).get("score") for column in columns]
        shown = " | ".join("–" if score is None else f"{score:.1f}" for score in scores)
        exposure = exposure_in(task)["exposure"]
        tag = "" if exposure == "trained_on" else f" ({exposure.replace('_', ' ')})"
        lines.append(f"| `{task['task']}`{tag} | {task['metric']} | {shown} |")
    return "\n".join(lines)


def _licences(contract: PromptContract, tasks: Sequence[Task], held_out: set[str] | frozenset[str]) -> str:
    trained = [task for task in tasks if task.name not in held_out]
    stated = sorted({task.licence for task in trained if task.licence != UNKNOWN})
    silent = sorted(task.name for task in trained if task.licence == UNKNOWN)
    base = _without_places(next(iter(contract.ancestors), contract.base))
    known = "; ".join(stated) or "none stated"
    lines = [f"The base model's licence is that of {base}; look it up there. Licences of the data, as stated: {known}."]
    if silent:
        lines.append(f"No licence is known for {', '.join(f'`{name}`' for name in silent)}.")
    return "## Licences\n\n" + " ".join(lines)
