"""What the documents show is real: every command parses, every file, target and option that is named exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from apprentice.cli import app
from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "apprentice"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "code_map.md", ROOT / "cluster" / "README.md"]


def blocks(file: Path) -> list[str]:
    """The lines of all `bash` blocks of a document, comments removed."""
    texts = re.findall(r"```bash\n(.*?)```", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [words for block in texts for line in block.splitlines() if (words := line.split("  #")[0].strip())]


COMMANDS = [(file.relative_to(ROOT).as_posix(), line) for file in DOCUMENTS for line in blocks(file)]


def test_there_are_commands():
    assert len([line for _, line in COMMANDS if line.startswith("apprentice ")]) >= 6
    assert len([line for _, line in COMMANDS if line.startswith("ray job submit ")]) >= 2


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=lambda value: value[:40])
def test_a_shown_command_can_be_given(document: str, line: str):
    program, *words = shlex.split(line)
    if program == "apprentice":
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        assert words[0] in commands
        commands[words[0]].make_context(words[0], words[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[0] in targets
    elif program in ("kubectl", "docker"):
        files = [value for flag, value in pairwise(words) if flag in ("-k", "-f")]
        assert files or "-n" in words
        assert all((ROOT / file).exists() for file in files), files
    elif program == "export":
        assert words == ["RAY_AUTH_MODE=token"]
    else:
        assert program == "ray", f"{document} shows {program!r}; say here how it is checked"
        assert words[0] in ("start", "job", "up", "get-auth-token")
    for word in words:
        if word.startswith(("jobs/", "src/", "serve/", "tests/", "cluster/")):
            assert (ROOT / word).exists(), word


def test_rays_commands_show_the_token():
    """Tried: `ray start` takes the token that lies there by itself, and `ray job submit` then stops without the mode."""
    pages = [*DOCUMENTS, ROOT / "docs" / "guides" / "clusters.md"]
    shown = [block for file in pages for block in re.findall(r"```bash[^\n]*\n(.*?)```", file.read_text(), flags=re.DOTALL)]
    guarded = [block for block in shown if re.search(r"^ray (start|job)", block, flags=re.MULTILINE)]
    assert len(guarded) >= 4
    for block in guarded:
        assert block.startswith("export RAY_AUTH_MODE=token\n"), block


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_files_and_links_that_are_named_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    homes = [ROOT, PACKAGE]  # the maps name files of the package without its path
    rooms = "|".join(sorted({path.name for home in homes for path in home.iterdir() if path.is_dir() and path.name[0] not in "._"}))
    named = re.findall(rf"`((?:{rooms})/[\w./-]*)`", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert named or linked or document.parent.name == "cluster"
    for path in named:
        assert any((home / path).exists() for home in homes), path
    for link in linked:
        assert (document.parent / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_has_no_gaps():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark in ("DEMO_OUTPUT", "CLAIMS", "BENCH", "DATE"):
        assert mark not in text, mark


def test_make_without_a_target_lists_the_targets():
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "check", "bench", "peers"):
        assert f"make {target}" in shown


def test_benchmarks_print_figures_and_nothing_else_on_standard_output():
    code = "import os; from benchmarks import figures; figures.claim_stdout();"
    code += "print('a library'); os.system('echo another process'); figures.report('a.figure', 1.23456, unit='ms')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '{"figure": "a.figure", "value": 1.2346, "unit": "ms"}\n'
    assert "a library" in done.stderr
    assert "another process" in done.stderr
    for file in (ROOT / "benchmarks").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "__main__" in text and "import claim_stdout" in text:
            assert text.index("    claim_stdout()\n") < text.rindex("    main("), file
