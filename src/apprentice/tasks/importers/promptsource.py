"""Importer of PromptSource's `templates.yaml` (Bach et al. 2022), the templates that T0 and P3 were made with.

    {{ premise }} Does it follow that {{ hypothesis }}? ||| {{ answer_choices[label] }}
    ──────────────────── prompt ───────────────────────     ──────── answer ─────────

A template's text is the prompt, `|||` and the answer. Lists are printed as Python writes them, as PromptSource does. Answer
choices, fixed or depending on the row, are a template of their own. A row for which either part is empty is skipped by that
template on purpose, and is not counted as a bad row. Templates whose metadata says `original_task: false` ask for something
else than the dataset's answer, and count as inverted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from apprentice.errors import RowError, TaskError, did_you_mean
from apprentice.plain_yaml import PlainLoader
from apprentice.tasks.schema import Example, Metric, Task, Template
from apprentice.tasks.source_spec import SourceSpec
from apprentice.tasks.templates.expressions import PromptSourceWording, Wording

SEPARATOR = "|||"
_MARK = "\ue000pipes\ue000"  # replaces a separator in a row's own text while the template is split
_METRICS: dict[str, tuple[Metric, ...]] = {
    "Accuracy": ("accuracy",),
    "BLEU": ("bleu",),
    "ROUGE": ("rouge_l",),
    "Squad": ("exact_match", "token_f1"),
    "Trivia QA": ("exact_match", "token_f1"),
    "COQA F1": ("token_f1",),
}


class _Loader(PlainLoader):
    """YAML loader of plain data that reads PromptSource's two tags as plain mappings."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, f"{node.tag} stands before a mapping", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


class PromptSourceTemplate(Template):
    """One template of PromptSource; `instruction` holds its whole text."""

    answer_choices: str | None = Field(None, description="Choices, between separators; may depend on the row.")
    choices_in_prompt: bool | None = None
    languages: tuple[str, ...] = ()

    @classmethod
    def _compiles(cls, text: str) -> str:
        return text  # compiled on first use, in PromptSource's dialect

    @property
    def is_whole(self) -> bool:
        return True

    @cached_property
    def _whole(self) -> Wording:
        return PromptSourceWording(self.instruction)

    @cached_property
    def _choices(self) -> Wording | None:
        return PromptSourceWording(self.answer_choices) if self.answer_choices else None

    @property
    def names(self) -> frozenset[str]:
        own = self._choices.names if self._choices else frozenset()
        return (self._whole.names | own) - {"answer_choices"}

    def example(self, task: str, row: Mapping[str, Any]) -> Example:
        """The example of one row. Raises `RowError` with reason `skipped` if the prompt or the answer is empty."""
        values = {name: _escape_separator(value) for name, value in row.items() if name in self.names}
        chosen = self._choices(values).split(SEPARATOR) if self._choices is not None else []
        shown = [choice.strip() for choice in chosen] or None
        parts = self._whole(values | {"answer_choices": shown}).split(SEPARATOR)
        choices = tuple(self._unescape_separator(choice).strip() for choice in chosen)
        texts = [self._unescape_separator(part).strip() for part in parts]
        if len(texts) != 2 or not all(texts):
            raise RowError("skipped", f"task {task!r}, template {self.name!r}: gives no prompt and answer for this row.")
        prompt, target = texts
        return Example(task, self.name, prompt, "", target, choices if target in choices else (), (target,))

    def _unescape_separator(self, text: str) -> str:
        """`text` with separators in place of their marks.

        In a list that was printed whole, the mark has the escaped form that Python prints.
        """
        text = text.replace(_MARK, SEPARATOR)
        return text if self._python_forms else text.replace(repr(_MARK)[1:-1], SEPARATOR)


def _escape_separator(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, _MARK)
    if isinstance(value, list):
        return [_escape_separator(item) for item in value]
    if isinstance(value, dict):
        return {key: _escape_separator(item) for key, item in value.items()}
    return value


def promptsource_tasks(entry: Mapping[str, Any]) -> list[Task]:
    """The tasks for a recipe entry with `promptsource`: a name under `root`, a file, or a folder.

    Optional keys: `dataset`, `splits`, `columns`, `templates` (names) and `cluster`. Raises `TaskError` for missing or
    unreadable files and unknown templates.
    """
    files = template_files(str(entry["promptsource"]), entry.get("root"))
    if len(files) > 1 and (extra := [key for key in ("dataset", "templates") if entry.get(key)]):
        raise TaskError(f"data.tasks: `{extra[0]}` is for one set of templates, and {entry['promptsource']} holds {len(files)}.")
    return [_apply_entry(load_templates(file), file, entry) for file in files]


def template_files(name: str, root: str | None) -> list[Path]:
    """The `templates.yaml` files that `name` stands for: `glue/mrpc` under `root`, a path to one, or a folder of many.

    Raises `TaskError` if there are none.
    """
    places = [Path(name)] if Path(name).is_absolute() else [Path(root) / name] if root else []
    for place in places:
        if place.is_file():
            return [place]
        if (place / "templates.yaml").is_file():
            return [place / "templates.yaml"]
        if files := sorted(place.glob("**/templates.yaml")):
            return files
    if not places:
        raise TaskError(f"data.tasks: promptsource {name!r} is a name, and data.promptsource does not say where the templates lie.")
    known = [str(file.parent.relative_to(root)) for file in sorted(Path(root).glob("**/templates.yaml"))] if root else []
    raise TaskError(f"data.tasks: {places[0]} holds no templates.yaml.{did_you_mean(name, known)} Correct it or data.promptsource.")


@cache
def load_templates(file: Path) -> Task:
    """The task in one `templates.yaml`, on the dataset that it names. Raises `TaskError` that names the file."""
    try:
        content = _Loader(file.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{file} cannot be read as PromptSource templates: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("templates"), dict) or not content["templates"]:
        raise TaskError(f"{file} holds no `templates`; it is not a file of PromptSource.")
    dataset, subset = str(content.get("dataset") or file.parent.name), content.get("subset")
    near = [f"{dataset}/{subset}", str(subset)] if subset else [dataset]
    try:
        templates = tuple(_template(key, entry) for key, entry in content["templates"].items())
        names = [template.name for template in templates]
        return Task(
            name="promptsource_" + re.sub(r"[^a-z0-9]+", "_", "_".join(filter(None, [dataset, subset])).lower()).strip("_"),
            cluster="promptsource_" + re.sub(r"[^a-z0-9]+", "_", dataset.lower()).strip("_"),
            summary=f"PromptSource's templates for {'/'.join(filter(None, [dataset, subset]))}",
            sources=(*(SourceSpec(dataset=name) for name in near), SourceSpec(hub=dataset, config=subset)),
            metrics=_metrics(content["templates"].values()),
            templates=tuple(
                template if names.count(template.name) == 1 else template.model_copy(update={"name": f"{template.name} {number}"})
                for number, template in enumerate(templates, 1)
            ),
            origin=str(file),
        )
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"{file}: a template is not as PromptSource writes them: {' '.join(str(error).split())}") from error


def _template(key: str, content: Mapping[str, Any]) -> PromptSourceTemplate:
    metadata = content.get("metadata") or {}
    return PromptSourceTemplate(
        name=str(content.get("name") or key),
        instruction=str(content["jinja"]),
        output="",
        answer_choices=content.get("answer_choices"),
        choices_in_prompt=metadata.get("choices_in_prompt"),
        languages=tuple(metadata.get("languages") or ()),
        inverted=metadata.get("original_task") is False,
    )


def _metrics(templates: Any) -> tuple[Metric, ...]:
    """Metrics of the task: those named in its original templates, the most frequent first.

    Accuracy if at least half of these templates have answer choices, `exact_match` if no known metric is named.
    """
    own = [one for one in templates if (one.get("metadata") or {}).get("original_task") is not False] or list(templates)
    named = [name for template in own for name in (template.get("metadata") or {}).get("metrics") or ()]
    if 2 * sum(1 for template in own if template.get("answer_choices")) >= len(own):
        return ("accuracy",)
    known = sorted({name for name in named if name in _METRICS and name != "Accuracy"}, key=lambda name: (-named.count(name), name))
    return tuple(dict.fromkeys(metric for name in known for metric in _METRICS[name])) or ("exact_match",)


def _apply_entry(task: Task, file: Path, entry: Mapping[str, Any]) -> Task:
    """The task with the templates, cluster, splits and columns of the recipe's entry."""
    changes: dict[str, Any] = {}
    if template_names := entry.get("templates"):
        if unknown := [name for name in template_names if name not in task.template_by_name]:
            raise TaskError(f"{file}: no template is called {unknown[0]!r}.{did_you_mean(unknown[0], task.template_by_name)}")
        changes["templates"] = tuple(template for template in task.templates if template.name in template_names)
    if entry.get("cluster"):
        changes["cluster"] = entry["cluster"]
    sources: Sequence[SourceSpec] = (SourceSpec(dataset=entry["dataset"]),) if entry.get("dataset") else task.sources
    common = {key: entry[key] for key in ("splits", "columns") if entry.get(key)}
    changes["sources"] = tuple(spec.model_copy(update=common) for spec in sources)
    return task.model_copy(update=changes)
