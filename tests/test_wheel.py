"""The wheel holds what the checkout holds: code, task library, playground, recipes and the Serve entry point."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "apprentice"


def files_under(folder: Path) -> dict[str, bytes]:
    """Path inside `folder` → content, through links, without what Python writes beside the code."""
    paths = [path for path in folder.glob("**/*") if path.is_file() and "__pycache__" not in path.parts]
    paths += [path for link in folder.iterdir() if link.is_symlink() for path in link.glob("**/*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_wheel_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("apprentice-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    expected = {f"apprentice/{name}": content for name, content in files_under(PACKAGE).items()}
    assert {name: content for name, content in packed.items() if name.startswith("apprentice/")} == expected
    recipes = {f"apprentice/recipes/{path.name}" for path in (ROOT / "jobs" / "recipes").glob("*.yaml")}
    assert recipes
    served = {f"apprentice/serve/{name}" for name in ("app.py", "config.yaml", "playground/index.html")}
    assert recipes | served | {"apprentice/py.typed", "apprentice/tasks/library/__init__.py"} <= packed.keys()
    licences = [name for name in packed if name.endswith("licenses/LICENSE")]
    assert len(licences) == 1
    assert not [name for name in packed if not name.startswith(("apprentice/", "apprentice-"))]
