"""Line numbers of the templates in a task file, for messages."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path

import yaml


@cache
def template_lines(file: str) -> dict[str, int]:
    """Template name → 1-based line of its name in a YAML file of templates; empty if the file cannot be read."""
    lines: dict[str, int] = {}
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        waiting = [yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.SequenceNode):
                waiting += node.value
            elif isinstance(node, yaml.MappingNode):
                lines |= {value.value: key.start_mark.line + 1 for key, value in node.value if key.value == "name"}
                waiting += [value for _, value in node.value]
    return lines
