"""MkDocs hook: the reference pages, written from the code when the documentation is built.

The recipe's page comes from its pydantic models, the command line's from Typer, the HTTP page from the endpoint's OpenAPI
description. Nothing here says what a key or a command means: that stands once, beside the code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def on_files(files: Files, config: Any) -> Files:
    """Adds the three pages to what MkDocs found in `docs/`."""
    for name, page in {"recipe": recipe_page, "cli": cli_page, "http": http_page}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def recipe_page() -> str:
    """Every key of a recipe, a table a block."""
    from apprentice.recipe import Recipe

    schema = Recipe.model_json_schema()
    parts = [
        "# The recipe",
        "Made from the recipe's own models. An unknown key is refused with the nearest right name; any key can be set on the"
        " command line as `key.path=value`. `apprentice recipe-schema` prints the JSON Schema for editors.",
    ]
    for path, model in _blocks("", Recipe):
        title = f"`{path}`" if path else "The whole"
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
