"""Writes docs/reference: the reference pages and the JSON Schemas, made from the code; `make reference` runs it.

The pages of recipe and task file come from their pydantic models, the command line's from Typer, the HTTP page from the endpoint's
OpenAPI description, that of the Python API from signatures and docstrings. Nothing here says what a key or a command means: that
stands once, beside the code. A test holds the committed files equal to what this makes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

FOLDER = Path(__file__).parents[1] / "reference"
# Members that are shown of classes that others use too; of the API's own classes all are.
SHOWN = {
    "Run": {"name", "is_trained", "recipe", "status", "model", "adapter", "checkpoints", "report"},
    "Task": {"render", "fields", "is_ranked", "scored_templates", "train_rows"},
}
PUBLIC_NAMES = {"InteractiveRecipe": "Recipe", "InteractiveRun": "Run", "pd.DataFrame": "DataFrame"}
EDITORS = """\
Editors with the YAML language server (VS Code with its YAML extension, Neovim, Emacs, JetBrains) complete and check a {kind} with
its JSON Schema, [{name}.schema.json]({name}.schema.json). Write it beside the file and name it in the first line:

    apprentice {name}-schema > {name}.schema.json

    # yaml-language-server: $schema={name}.schema.json
"""


def reference_files() -> dict[str, str]:
    """The name of each file of the reference → its content."""
    from apprentice.recipe import Recipe
    from apprentice.tasks.schema import Task

    pages = {"recipe": recipe_page, "task": task_page, "cli": cli_page, "http": http_page, "python": python_page}
    schemas = {"recipe": Recipe, "task": Task}
    return {f"{name}.md": page() for name, page in pages.items()} | {
        f"{name}.schema.json": json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in schemas.items()
    }


def main() -> None:
    """Writes the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in reference_files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")


def recipe_page() -> str:
    """Every key of a recipe, a table a block."""
    from apprentice.recipe import Recipe

    schema = Recipe.model_json_schema()
    parts = [
        "# The recipe",
        "Made from the recipe's own models. An unknown key is refused with the nearest right name; any key can be set on the"
        " command line as `key.path=value`. `apprentice recipe KEY` explains a key.",
        EDITORS.format(kind="recipe", name="recipe").strip(),
    ]
    for path, model in _blocks("", Recipe):
        title = f"`{path}`" if path else "The whole"
        parts += [f"## {title}", (model.__doc__ or "").strip(), _table(path, model, schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def task_page() -> str:
    """Every key of a task file, a table for the task, a source and a template."""
    from apprentice.tasks import schema as task_schema
    from apprentice.tasks.source_spec import SourceSpec

    schema = task_schema.Task.model_json_schema()
    parts = [
        "# The task file",
        "Made from the task's own models; [Your own task](../guides/own_task.md) shows how one is written.",
        EDITORS.format(kind="task file", name="task").strip(),
        inspect.cleandoc(task_schema.__doc__ or ""),
    ]
    for title, path, model in (
        ("The task", "", task_schema.Task),
        ("`sources`", "s", SourceSpec),
        ("`templates`", "t", task_schema.Template),
    ):
        parts += [f"## {title}", (model.__doc__ or "").strip(), _table(path, model, schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The block itself and those below it, each with its dotted path."""
    yield path, model
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            if inner is not model:  # a block may hold others of its own kind
                yield from _blocks(f"{path}.{name}" if path else name, inner)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _table(path: str, model: type[BaseModel], schema: dict[str, Any]) -> str:
    properties = (schema if not path else schema["$defs"][model.__name__])["properties"]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = [f"`{name}`", _type(properties[name]), _default(field), field.description or ""]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text for a table of Markdown: one line, `<root>` no tag, no bar that ends the cell."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _type(shape: dict[str, Any]) -> str:
    """A JSON Schema in a few words."""
    if "$ref" in shape:
        return f"block {shape['$ref'].rsplit('/', 1)[-1]}"
    if "enum" in shape or "const" in shape:
        return ", ".join(f"`{value}`" for value in shape.get("enum", [shape.get("const")]))
    if "anyOf" in shape:
        return " or ".join(_type(option) for option in shape["anyOf"])
    if shape.get("type") == "array":
        return f"list of {_type(shape.get('items') or {})}" if "items" in shape else "list"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " ".join(f"{sign} {shape[key]:g}" for key, sign in limits.items() if key in shape)
    return " ".join(filter(None, [str(shape.get("type", "any")), bounds]))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def cli_page() -> str:
    """Every command with its arguments and options."""
    from apprentice.cli import app

    root = typer.main.get_command(app)
    parts = [
        "# The command line",
        "Exit codes: 0 done, 1 the user can mend it, or Ctrl-C (one sentence), 2 wrong usage, 3 a fault of ours. With `--json`"
        " standard output holds exactly one JSON object, and everything else goes to standard error.",
    ]
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        parts += [f"## `apprentice {name}`", (command.help or "").strip(), _parameters(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parameters(command: Any) -> str:
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        names = " ".join([*parameter.opts, *parameter.secondary_opts])
        shown = parameter.metavar or parameter.name.upper() if parameter.param_type_name == "argument" else names
        default = "needed" if parameter.required else "" if parameter.default in (None, False) else str(parameter.default)
        meaning = (getattr(parameter, "help", "") or "").replace("|", "\\|")
        lines.append(f"| `{shown.replace('|', chr(92) + '|')}` | {default} | {meaning} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def http_page() -> str:
    """Every route of the endpoint, and every field that a request may have."""
    from apprentice.serve.api.application import describe_api

    description = describe_api()
    schemas = description.get("components", {}).get("schemas", {})
    parts = [
        "# The HTTP API",
        "Made from the endpoint's OpenAPI description, which a running endpoint gives at `/openapi.json`.",
    ]
    bodies: dict[str, None] = {}
    lines = ["| route | body | what it does |", "|---|---|---|"]
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            body = json.dumps(route.get("requestBody", {}))
            named = [name for name in schemas if f'/{name}"' in body]
            bodies |= dict.fromkeys(named)
            words = route.get("description") or route.get("summary", "")
            links = ", ".join(f"[{name}](#{name.lower()})" for name in named)
            lines.append(f"| `{method.upper()} {path}` | {links} | {' '.join(words.split()).replace('|', chr(92) + '|')} |")
    parts.append("\n".join(lines))
    for name in bodies:
        fields = ["| field | type | default |", "|---|---|---|"]
        for field, shape in schemas[name].get("properties", {}).items():
            needed = field in schemas[name].get("required", [])
            default = "**needed**" if needed else f"`{json.dumps(shape.get('default'), ensure_ascii=False)}`"
            fields.append(f"| `{field}` | {_type(shape).replace('|', chr(92) + '|')} | {default} |")
        parts += [f"## {name}", " ".join(schemas[name].get("description", "").split()), "\n".join(fields)]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Annotation:
    """A type hint, which a signature shows as it stands in the code."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


def python_page() -> str:
    """Every public name of `import apprentice`, with signature and docstring."""
    import apprentice

    objects = {name: getattr(apprentice, name) for name in apprentice.__all__ if name != "__version__"}
    errors = {name: value for name, value in objects.items() if isinstance(value, type) and issubclass(value, Exception)}
    parts = ["# The Python API", _docstring(apprentice)]
    for name, value in objects.items():
        if name in errors:
            continue
        title = name if inspect.isclass(value) else f"{name}(…)"
        is_plain = inspect.isclass(value) and not dataclasses.is_dataclass(value)
        parts += [f"## `{title}`", "" if is_plain else _code(name, value), _docstring(value)]
        parts += [text for member in _members(name, value) for text in _member_parts(name, value, member)]
    table = ["| error | raised for |", "|---|---|"]
    table += [f"| `{name}` | {_cell(_docstring(value))} |" for name, value in errors.items()]
    page = "\n\n".join(part for part in [*parts, "## Errors", "\n".join(table)] if part) + "\n"
    for name, public in PUBLIC_NAMES.items():
        page = page.replace(name, public)
    return page


def _members(public_name: str, value: Any) -> list[str]:
    """The methods and properties of a class that are shown, in their order in the code."""
    names: dict[str, None] = {}
    for base in value.__mro__ if inspect.isclass(value) else ():
        is_ours = base.__module__.startswith("apprentice.python_api")
        shown = {name: member for name, member in vars(base).items() if is_ours or name in SHOWN.get(public_name, ())}
        names |= dict.fromkeys(name for name, member in shown.items() if not name.startswith("_") and _is_documented(member))
    return list(names)


def _is_documented(member: Any) -> bool:
    function = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
    return inspect.isfunction(function) and bool(function.__doc__)


def _member_parts(owner: str, value: type, name: str) -> list[str]:
    static = inspect.getattr_static(value, name)
    function = getattr(static, "fget", None) or getattr(static, "func", None)
    shown = (
        f"    {owner}.{name}: {inspect.signature(function).return_annotation}"
        if function
        else _code(f"{owner}.{name}", getattr(value, name))
    )
    return [f"### `{owner}.{name}`", shown, _docstring(function or static)]


def _code(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    hints = [
        one.replace(annotation=_Annotation(one.annotation)) if one.annotation is not one.empty else one
        for one in signature.parameters.values()
    ]
    shown = [one for one in hints if one.name != "self"]
    result = signature.return_annotation
    tail = f" -> {result}" if result is not signature.empty else ""
    return f"    {name}{signature.replace(parameters=shown, return_annotation=signature.empty)}{tail}"


def _docstring(value: Any) -> str:
    return inspect.cleandoc(getattr(value, "__doc__", None) or "")


if __name__ == "__main__":
    main()
