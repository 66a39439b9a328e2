"""Safe YAML loading with bounds on size, depth and length of numbers, against documents that expand far beyond their bytes."""

from __future__ import annotations

from typing import Any

import yaml

MAX_NODES = 100_000  # scalars, lists and mappings of a document; those behind an alias count every time
MAX_DEPTH = 64  # of nested lists and mappings
MAX_DIGITS = 100  # characters of a number


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds; raises `yaml.YAMLError` with the line for a document beyond one."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses a document that is nested too deep."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        """Refuses a document with too many values."""
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > MAX_NODES:
            raise yaml.composer.ComposerError(
                None,
                None,
                f"more than {MAX_NODES:,} values, those behind aliases and merge keys counted each time",
                node.start_mark,
            )
        return node

    def bounded_number(self, node: yaml.ScalarNode) -> int | float:
        """The number of a scalar. Refuses one of too many digits."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark)
        return self.construct_yaml_float(node) if node.tag.endswith("float") else self.construct_yaml_int(node)


for _kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainLoader.bounded_number)


def _expanded(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Number of nodes below and including `node`, aliases expanded.

    `sizes` caches the numbers by `id(node)`; None marks a node that is being counted, to detect cycles.
    """
    if id(node) in sizes:
        if (known := sizes[id(node)]) is None:
            raise yaml.composer.ComposerError(None, None, "an alias that holds itself", node.start_mark)
        return known
    sizes[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    total = sizes[id(node)] = 1 + sum(_expanded(part, sizes) for part in parts)
    return total


def load_yaml(text: str) -> Any:
    """The single document in `text` as plain data. Raises `yaml.YAMLError` for invalid YAML, or a document beyond a bound."""
    try:
        return yaml.load(text, Loader=PlainLoader)  # a safe loader  # nosec B506
    except (ValueError, OverflowError) as error:  # raised by PyYAML's constructors, for a date such as 2026-99-99
        raise yaml.YAMLError(f"a value that is none of its kind ({error})") from error
