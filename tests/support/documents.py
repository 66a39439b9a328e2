"""Runs the code blocks of a documentation page, in order and in one folder, as a reader would who types them.

What is done with a block depends on its language:

    bash      `apprentice …` in this process on the tests' Ray, `apprentice serve …` until the page ends, all else by bash;
              a block whose title begins with "on a " needs a machine that tests lack: its commands are only parsed
    python    executed; a page has one namespace; with a title: a file of that name too
    text      right after bash or python: what it printed, where … stands for anything
    yaml      with a title: a file of that name, and it must be a recipe or a task; without: part of one, and it must fit
    csv, jsonl, json, jinja   with a title: a file of that name

Knows nothing of pytest.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
ELSEWHERE = "on a "  # how the title of a block begins that is only parsed
FILES = ("csv", "json", "jsonl", "jinja")
MODEL = "smollm2-135m-instruct"  # the pages' model; tests may take a tiny one
ADDRESS = "127.0.0.1:8000"  # the endpoint's in the pages; tests take a free port


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of `page`, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match[3])
        body = re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE)
        blocks.append(Block(match[2], title[1] if title else "", body, text[: match.start()].count("\n") + 1))
    return blocks


def commands_in(text: str) -> list[str]:
    """The commands of a bash block: continued lines joined, comments and empty lines left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := re.split(r"(?:^|\s)#", line)[0].strip())]


@dataclass
class Reader:
    """Somebody who works through one page in `folder`, with the model in `model` (if given) in place of the page's."""

    folder: Path
    model: Path | None = None
    printed: str = ""
    names: dict[str, Any] = field(default_factory=dict)
    address: str = ADDRESS
    done: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reader]:
        """Endpoints that blocks start end with the page."""
        with contextlib.ExitStack() as self._open, contextlib.chdir(self.folder):
            yield self

    def run(self, block: Block) -> None:
        """Raises `AssertionError`, or what the block's code raises, where the block is not true."""
        if block.language in FILES or (block.language in ("yaml", "python") and block.title):
            Path(block.title).write_text(self._there(block.text), encoding="utf-8")
        if block.language == "yaml":
            check_yaml(block, self.folder)
        elif block.language == "bash":
            self.printed = "".join(self._command(line, block.title) for line in commands_in(block.text))
        elif block.language == "python":
            self.printed = self._python(block)
        elif block.language == "text":
            if self.model is not None:
                self.printed = self.printed.replace(str(self.model), MODEL)
            assert matches(block.text, self.printed), f"line {block.line} shows\n{block.text}\nbut it is\n{self.printed}"
        else:
            assert block.language in FILES, f"line {block.line}: nothing is known of {block.language!r} blocks"
        self.done.append(block.language)

    def _python(self, block: Block) -> str:
        out = io.StringIO()
        source = self._there(block.text)
        with contextlib.redirect_stdout(out):
            exec(compile(source, f"block at line {block.line}", "exec"), self.names)
        return out.getvalue()

    def _command(self, line: str, title: str) -> str:
        line = self._there(line)
        words = shlex.split(line)
        if title.startswith(ELSEWHERE):
            check_command(words)
            return ""
        if words[:2] == ["apprentice", "serve"]:
            return self._serve(words[2:])
        if words[0] == "!" and words[1] == "apprentice":
            return apprentice(words[2:], fails=True)
        if words[0] == "apprentice":
            return apprentice(self._addressed(words[1:]))
        shown = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, timeout=300)
        assert shown.returncode == 0, f"{line}\n{shown.stdout}{shown.stderr}"
        return shown.stdout

    def _there(self, text: str) -> str:
        """`text` with the endpoint and the model that are there."""
        return text.replace(ADDRESS, self.address).replace(MODEL, str(self.model or MODEL))

    def _addressed(self, words: list[str]) -> list[str]:
        return [*words, "--url", f"http://{self.address}"] if words[0] == "ask" and "--url" not in words else words

    def _serve(self, words: list[str]) -> str:
        from apprentice import pipeline

        options = dict(check_command(["apprentice", "serve", *words]).params)
        running = pipeline.run_endpoint(**options | {"port": 0}, progress=lambda stage, values: None)
        self.address = self._open.enter_context(running).removeprefix("http://")
        return ""


def apprentice(words: list[str], *, fails: bool = False) -> str:
    """Standard output of `apprentice …`, in this process. Raises `AssertionError` unless its exit code is 0 (1 if it `fails`)."""
    from unittest.mock import patch

    from apprentice import cli

    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["apprentice", *words]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    assert code == int(fails), f"apprentice {shlex.join(words)}: exit code {code}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def check_command(words: list[str]) -> Any:
    """The parsed command line where it is ours; anything else must be a program that the pages may name."""
    import typer

    from apprentice.cli import app

    if words[0] != "apprentice":
        assert words[0] in ("ray", "kubectl", "serve", "make", "docker", "export", "lm_eval", "pip"), (
            f"nothing is known of {words[0]!r}"
        )
        return None
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in commands, f"there is no `apprentice {words[1]}`"
    return commands[words[1]].make_context(words[1], words[2:])


def check_yaml(block: Block, folder: Path) -> None:
    """A recipe, a task, or a part of one."""
    from apprentice.recipe import Recipe
    from apprentice.tasks.schema import Task

    content = yaml.safe_load(block.text)
    is_task = bool(content.keys() & {"templates", "sources", "cluster", "choices", "metrics", "answer"})
    if block.title:
        whole = content
    else:
        whole = _merged(json.loads(json.dumps(_TASK if is_task else _RECIPE)), content)
        if is_task and "answer" in content:
            whole = {key: value for key, value in whole.items() if key not in ("choices", "label")}
    (Task if is_task else Recipe).model_validate(whole)


def matches(shown: str, printed: str) -> bool:
    """Whether `printed` is what a page shows; … stands for anything, white space at the ends of lines for nothing."""
    pieces = ["\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (shown, printed)]
    pattern = ".*?".join(re.escape(piece) for piece in pieces[0].split("…"))
    return re.fullmatch(pattern, pieces[1], re.DOTALL) is not None


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        inner = base.get(key)
        base[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return base


_RECIPE: dict[str, Any] = {
    "name": "part",
    "model": {"base": "smollm2-135m-instruct"},
    "data": {"tasks": ["quickstart"]},
    "training": {"steps": 10},
}
_TASK: dict[str, Any] = {
    "name": "part",
    "cluster": "own",
    "sources": [{"files": {"train": "rows.csv"}}],
    "choices": ["no", "yes"],
    "label": "label",
    "metrics": ["accuracy"],
    "templates": [{"name": "ask", "instruction": "Yes or no?", "input": "{{ text }}"}],
}


def refresh(page: Path) -> None:
    """Writes into the page's empty `text` blocks what the block before them prints."""
    import tempfile

    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, Reader(Path(folder)).reading() as reader:
        for block in blocks_of(page):
            if block.language == "text" and not block.text.strip():
                text = text.replace("```text\n```", f"```text\n{reader.printed.rstrip()}\n```", 1)
            else:
                reader.run(block)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":  # python -m tests.support.documents docs/how_it_works.md
    refresh(Path(sys.argv[1]).absolute())
