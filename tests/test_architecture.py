"""The house rules that no linter knows: lengths, names, docstrings, a light command line. Import rules are in pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("src", "jobs", "serve", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
NAMES_OF_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}
# Pictures that stood where the field has a word; docs/decisions/packaging.md says which.
PICTURES = {
    "alone",
    "answers",
    "aside",
    "beginning",
    "companions",
    "crossing",
    "facts",
    "feed",
    "fitting",
    "glance",
    "held",
    "lifeline",
    "member",
    "pace",
    "peers",
    "pieces",
    "pulse",
    "ragged",
    "rehearsal",
    "road",
    "rotation",
    "rounds",
    "story",
    "winning",
}
# Participles tell nothing as names of values.
PARTICIPLES = {"found", "given", "told", "held", "asked", "wanted", "written", "there"}
FILES_WITH_PARTICIPLES = {"evaluate/report/report_schema.py"}  # `found` is a key of report.json
OTHER_ROOMS = ("tests", "benchmarks", "docs", "jobs", "serve")
SHARED_MODULE_NAMES = {"compat"}  # one a room; every other name has one meaning in all rooms
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
RIDDLE = re.compile(r"^(What|Who|Whose|Where|When|How|Which|Whether)\b")

MODULE_OF = {"pyyaml": "yaml"}  # where the package's name is not the module's
NEEDED_BY_OTHERS = {"accelerate", "gguf", "ninja"}  # transformers and DeepSpeed ask for them when they need them
OPTIONAL = {"liger_kernel", "mlflow", "vllm", "wandb"}  # behind extras


def python_files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def too_long(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    lengths = {"the file": (1, len(text.splitlines()), MAX_FILE_LINES)} | {
        f"{node.name}()": (node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1, MAX_FUNCTION_LINES)
        for node in functions(ast.parse(text))
    }
    return [f"{path}:{line}: {what} has {n} lines, more than {most}" for what, (line, n, most) in lengths.items() if n > most]


def test_files_and_functions_are_short() -> None:
    files = python_files(*ROOMS)
    assert len(files) >= 20
    assert [complaint for path in files for complaint in too_long(path)] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        ("def f():\n" + "    x = 1\n" * 59, 0),
        ("def f():\n" + "    x = 1\n" * 60, 1),
        ("class C:\n    async def f(self):\n" + "        x = 1\n" * 60, 1),
    ],
)
def test_the_length_check_counts(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "some.py").write_text(text)
    assert len(too_long(tmp_path / "some.py")) == count


def test_every_module_says_what_it_is() -> None:
    files = python_files(*ROOMS)
    silent = [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []
    assert [str(path) for path in files if path.stem in NAMES_OF_NOTHING] == []


def test_names_and_sentences_need_no_translator() -> None:
    files = python_files("src")
    assert [str(path) for path in files if path.stem in PICTURES] == []
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files}
    assert [f"{path}: begins with a question" for path, text in docstrings.items() if RIDDLE.match(text)] == []
    # Import rules are contracts in pyproject.toml; they need no sentence.
    assert [str(path) for path in files if re.search(r"[Kk]nows nothing\s+of", path.read_text(encoding="utf-8"))] == []


@cache
def sources() -> dict[str, ast.Module]:
    """The parsed files of the package, by their paths in it. They are read only."""
    home = ROOT / "src" / "apprentice"
    return {path.relative_to(home).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in python_files("src")}


def shared_names(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Of (name, file): the names that several files have, with the files."""
    places: dict[str, list[str]] = {}
    for name, file in names:
        places.setdefault(name, []).append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_a_name_has_one_meaning() -> None:
    trees = sources()
    classes = [(node.name, file) for file, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    assert shared_names(classes) == {}
    modules = [(Path(file).stem, file) for file in trees if not file.endswith("__init__.py")]
    assert {name: files for name, files in shared_names(modules).items() if name not in SHARED_MODULE_NAMES} == {}


def test_public_functions_and_classes_have_docstrings() -> None:
    silent = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in sources().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ]
    assert silent == []


def participles_of(tree: ast.Module) -> set[str]:
    """The participles that are names of locals, fields and parameters in a file."""
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return PARTICIPLES & (stored | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)})


def test_values_are_not_named_by_participles() -> None:
    assert participles_of(ast.parse("def f(told):\n    found: int = 1\n    for held in told: pass\n")) == {"found", "held", "told"}
    offenders = {file: names for file, tree in sources().items() if (names := participles_of(tree))}
    assert {file for file in offenders if file not in FILES_WITH_PARTICIPLES} == set(), offenders
    others = {path: participles_of(ast.parse(path.read_text(encoding="utf-8"))) for path in python_files(*OTHER_ROOMS)}
    assert {path: names for path, names in others.items() if names} == {}


def own_private_names(tree: ast.Module) -> set[str]:
    """The private names that a file defines: functions, classes, variables, fields, attributes of `self`."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def private_api(tree: ast.Module, own: set[str]) -> list[str]:
    """Uses of names that another package keeps to itself: imports, attributes, `getattr` and the like, operators of oneDNN."""

    def private(name: object) -> bool:
        return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in own | OF_NAMED_TUPLES

    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            uses += [alias.name for alias in node.names if any(map(private, alias.name.split(".")))]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            uses += [node.module] if any(map(private, parts)) else []
        elif isinstance(node, ast.Attribute):
            uses += [ast.unparse(node)] if private(node.attr) or ast.unparse(node) == "torch.ops.mkldnn" else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr"}:
            uses += [ast.unparse(node) for argument in node.args[1:2] if private(getattr(argument, "value", None))]
    return uses


def test_private_api_of_others_is_used_in_compat_alone() -> None:
    text = "from ray._private import a\nimport x._y\nz._w\ngetattr(z, '_v', 0)\ntorch.ops.mkldnn._linear\nself._own\nt._replace()\n"
    assert len(private_api(ast.parse(text), {"_own"})) == 6
    trees = sources()
    own = {name for tree in trees.values() for name in own_private_names(tree) if name.startswith("_")}
    own -= {"_attn_implementation", "_experts_implementation"}  # transformers'
    offenders = {file: uses for file, tree in trees.items() if not file.endswith("compat.py") and (uses := private_api(tree, own))}
    assert offenders == {}


def test_tests_mirror_the_source() -> None:
    rooms = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    rooms -= {Path("kept_runs"), Path("gpu")}  # tests of all rooms, on old run folders and on a GPU
    homes = [ROOT / "src" / "apprentice", ROOT]  # tests/cluster is about cluster/, tests/docs about docs/
    homeless = [str(room) for room in rooms if not any((home / room).is_dir() for home in homes)]
    assert len(rooms) > 1
    assert homeless == []


def names_in(body: Iterable[ast.AST]) -> set[str]:
    """The names that the statements of a module or class bind, those in its `if`, `try` and `with` too."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            names |= names_in(ast.iter_child_nodes(node))
    return names


@cache
def names_of_modules() -> dict[str, set[str]]:
    """`apprentice.storage` → what can be imported from it; classes are there too, with their attributes."""
    modules: dict[str, set[str]] = {}
    for file, tree in sources().items():
        module = ".".join(["apprentice", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        modules[module] = names_in(tree.body)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                own = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
                modules[f"{module}.{node.name}"] = names_in(node.body) | own
    for module in list(modules):
        room, _, name = module.rpartition(".")
        if room:
            modules[room].add(name)
    return modules


PATCHES = {"setattr", "delattr", "patch", "import_module"}
IMPORT_IN_TEXT = re.compile(r"^\s*from (apprentice[\w.]*) import (\w+(?: as \w+)?(?:, \w+(?: as \w+)?)*)", re.MULTILINE)


def names_used(tree: ast.Module) -> Iterator[str]:
    """The dotted names of `apprentice` that a file imports, itself or in a program's text, reads from modules, or patches."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "apprentice":
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("apprentice."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, names in IMPORT_IN_TEXT.findall(node.value):
                yield from (f"{module}.{name.split()[0]}" for name in names.split(", "))
    modules = names_of_modules()
    aliases = {alias: name for alias, name in aliases.items() if name in modules and not name.rpartition(".")[2][0].isupper()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATCHES:
            first, second = [getattr(argument, "value", None) for argument in (*node.args, None, None)][:2]
            if isinstance(first, str) and first.startswith("apprentice."):
                yield first
            elif node.args and isinstance(node.args[0], ast.Name) and node.args[0].id in aliases and isinstance(second, str):
                yield f"{aliases[node.args[0].id]}.{second}"


def test_what_tests_use_of_the_package_is_there() -> None:
    """mypy does not read tests, and some of them run by hand or on a GPU only: a name that has moved shows here."""
    modules = names_of_modules()
    text = "x = 1; from apprentice.storage import Folder, none\nfrom apprentice import cli\nfrom apprentice.train import loop\n"
    text += "cli.main\ncli.gone\npatch('apprentice.console.Screen.lost')\nsetattr(loop, 'away', 1)\n"
    text += "PROGRAM = 'from apprentice.jobs import lost as x'"

    def missing(tree: ast.Module) -> list[str]:
        places = {name: name.rpartition(".") for name in names_used(tree) if not name.endswith("__")}
        return sorted(name for name, (module, _, last) in places.items() if last not in modules.get(module, ()))

    wrong = ["cli.gone", "console.Screen.lost", "jobs.lost", "storage.none", "train.loop.away"]
    assert missing(ast.parse(text)) == [f"apprentice.{name}" for name in wrong]
    files = python_files("tests", "benchmarks")
    lost = {path: names for path in files if (names := missing(ast.parse(path.read_text(encoding="utf-8"))))}
    assert lost == {}


def test_help_is_light() -> None:
    """`apprentice --help` must not wait for PyTorch, Ray or transformers."""
    program = (
        "import sys\n"
        "sys.argv = ['apprentice', '--help']\n"
        "from apprentice.cli import main\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "print('exit', code or 0)\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'datasets', 'pandas', 'matplotlib'}\n"
        "print('heavy', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == ["exit 0", "heavy []"]
    assert "quickstart" in done.stdout


def top_level_imports(room: str) -> set[str]:
    """The packages that the files of `room` import, anywhere in them."""
    packages: set[str] = set()
    for path in python_files(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                packages.add(node.module.split(".")[0])
    return packages - set(sys.stdlib_module_names) - {"apprentice"}


def test_dependencies_are_declared_used_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = top_level_imports("src")
    modules = {name: MODULE_OF.get(name, name.replace("-", "_")) for name in package_names(project["dependencies"])}
    unused = {name for name, module in modules.items() if module not in imported}
    assert sorted(unused - NEEDED_BY_OTHERS) == []
    assert sorted(imported - set(modules.values()) - OPTIONAL) == []
    reasons = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Why each dependency")[1].split("## ")[0]
    explained = set(re.findall(r"[\w-]+", " ".join(re.findall(r"^\| ([^|]+) \|", reasons, re.MULTILINE))))
    extras = package_names([line for lines in project["optional-dependencies"].values() for line in lines])
    assert sorted((set(modules) | extras) - explained) == []


def package_names(requirements: list[str]) -> set[str]:
    """`ray[data]>=2.60` is `ray`."""
    return {re.split(r"[\[<>=]", line)[0] for line in requirements}
