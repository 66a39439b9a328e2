"""Importer of Super-NaturalInstructions (Wang et al. 2022): one JSON file a task, with definition, examples and instances.

Both schemas are read: `Definition` is a text (the earlier one) or a list of texts. Prompt and metrics are those of
Tk-Instruct: the definition, then positive and negative examples, then the input. The instances are read by
`apprentice.data.sources.parquet_conversion`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

from apprentice.errors import RowError, TaskError
from apprentice.tasks.schema import Example, Task, Template
from apprentice.tasks.source_spec import SourceSpec

LISTS = ("train_tasks.txt", "test_tasks.txt")  # the official splits; each file lists names of tasks, one a line


class InstanceTemplate(Template):
    """A template with the definition and examples as plain text before each instance."""

    @classmethod
    def _compiles(cls, text: str) -> str:
        return text  # plain text: braces have no meaning in it

    @property
    def is_whole(self) -> bool:
        return True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(["input", "output"])

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one instance; all its outputs count as right, and the first is the target.

        Raises `RowError` with reason `null` or `empty_answer`.
        """
        input_text, outputs = row.get("input"), row.get("output")
        if input_text is None or outputs is None:
            raise RowError("null", f"task {task!r}: an instance lacks its input or output.")
        right = tuple(self.text(text).strip() for text in ([outputs] if isinstance(outputs, str) else outputs))
        if not right or not right[0]:
            raise RowError("empty_answer", f"task {task!r}: an instance has an empty output.")
        return Example(task, self.name, self.instruction, f"Input: {self.text(input_text).strip()}\nOutput:", right[0], (), right)


def instruction_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The tasks for a recipe entry with `natural_instructions`, a path or glob.

    Optional keys: `definition`, `positive`, `negative`, `explanations`, `cluster`, and `official_splits`, the folder with
    train_tasks.txt and test_tasks.txt. With official splits a task of the test list has test rows only, and a task of neither
    list is left out. Raises `TaskError` if no file matches, a file cannot be read, or none is in the lists.
    """
    pattern = str(entry["natural_instructions"])
    files = [Path(path) for path in sorted(glob(pattern))]
    if not files:
        raise TaskError(f"data.tasks: no file matches {pattern}; check the path.")
    official = _official_splits(Path(entry["official_splits"])) if entry.get("official_splits") else None
    tasks = []
    for file in files:
        split = "train" if official is None else official.get(file.stem)
        if split is not None:
            tasks.append(_task(file, split, entry))
    if not tasks:
        raise TaskError(f"data.tasks: none of the {len(files)} files of {pattern} is in the lists of {entry['official_splits']}.")
    return tasks


def _official_splits(folder: Path) -> dict[str, str]:
    """Task name → `train` or `test`, from the lists in `folder`. Raises `TaskError` if one cannot be read."""
    split_of: dict[str, str] = {}
    for name in LISTS:
        try:
            names = (folder / name).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{folder / name} cannot be read ({error.__class__.__name__}); correct official_splits.") from error
        split_of |= dict.fromkeys(names, name.partition("_")[0])
    return split_of


@cache
def _read_header(file: Path) -> tuple[str, str, tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """(definition, category, positive examples, negative examples) of a file; each example is (input, output, explanation).

    Raises `TaskError` for a file of another format.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        definition = content["Definition"]
        shown = [
            tuple(
                tuple(str(example.get(key, "")).strip() for key in ("input", "output", "explanation")) for example in content[kind]
            )
            for kind in ("Positive Examples", "Negative Examples")
        ]
        text = "\n".join(map(str, definition)) if isinstance(definition, list) else str(definition)
        return text.strip(), str((content.get("Categories") or ["natural instructions"])[0]), shown[0], shown[1]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"{file} is not a task file of Super-NaturalInstructions ({error.__class__.__name__}: {error}).") from error


def _task(file: Path, split: str, entry: Mapping[str, Any]) -> Task:
    definition, category, positive, negative = _read_header(file)
    parts = [f"Definition: {definition}"] if entry.get("definition", True) else []
    for kind, examples, number in (
        ("Positive", positive, entry.get("positive", 2)),
        ("Negative", negative, entry.get("negative", 0)),
    ):
        parts += [
            _shown(f"{kind} Example {place}", example, bool(entry.get("explanations")))
            for place, example in enumerate(examples[:number], 1)
        ]
    return Task(
        name=_slug(file.stem),
        cluster=entry.get("cluster") or _slug(category),
        summary=definition,
        sources=(SourceSpec(files={split: str(file)}),),
        metrics=("ni_rouge_l", "ni_exact_match"),
        templates=(InstanceTemplate(name="instance", instruction="\n\n".join([*parts, "Now complete the following example -"])),),
        origin=str(file),
    )


def _shown(title: str, example: Sequence[str], explained: bool) -> str:
    input_text, answer, why = example
    lines = [f"{title} -", f"Input: {input_text}", f"Output: {answer}", *([f"Explanation: {why}"] if explained and why else [])]
    return "\n".join(lines)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
