"""The shape of the repository: what may import what, what the command line offers, how long things may get."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("errors", "garbage", "planner", "profiles", "passes", "job", "again", "runtime", "api", "cli")
"""Each may import itself and those before it."""
SHOWN = {("planner/plan.py", "cli.report.notebook"), ("planner/plan.py", "cli.edited")}
"""(file, what it imports when called): plans show themselves in notebooks and play their steps; layers above know their models."""
FOLDERS = ("planner", "profiles", "passes", "runtime", "cli")
FILES = sorted(
    path for path in [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))]
)  # fmt: skip
TESTS = sorted((ROOT / "tests").rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name inside the package, or of another package with a leading dot missing; whether it is ours)."""
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1]
            if node.module:
                yield ".".join([*base, node.module]), True
            else:
                yield from ((".".join([*base, alias.name]), True) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way(path: Path) -> None:
    layer = _layer(path)
    if layer == "__init__":
        return  # resolves names lazily
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for name, ours in _imports(path):
        if (str(path.relative_to(ROOT)), name) in SHOWN:
            continue
        if ours:
            assert name.split(".")[0] in allowed, f"{layer} imports {name}"
        else:
            assert name.split(".")[0] != "shardwright", f"import {name} relatively"


@pytest.mark.parametrize("path", [f for f in FILES if _layer(f) in ("planner", "errors")], ids=str)
def test_planner_imports_no_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name, ours in _imports(path) if not ours} & {"torch", "transformers"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_sizes(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
def test_test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_docstrings_of_what_is_public(path: Path) -> None:
    tree = _tree(path)
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_nothing_is_left_open() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "raise NotImplemented" + "Error")))
    for path in [*FILES, *TESTS]:
        found = words.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found.group() if found else ''}"


def test_no_path_of_one_machine() -> None:
    for path in _texts():
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                assert not re.search(r"(?<![\w.:/])/(home|work|root|Users|mnt|opt)/\w", line), f"{path.name}:{number}"


def test_no_package_host() -> None:
    for path in _texts():
        text = path.read_text(encoding="utf-8")
        assert not re.search("index" + r"-url|--find" + "-links", text), path.name


def test_no_switch_by_environment() -> None:
    """Options are arguments. What torchrun sets may be read, and what gloo reads may be set for it; everything else may not."""
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
             "GLOO_SOCKET_IFNAME", "XDG_CACHE_HOME", "LOCALAPPDATA", "SHARDWRIGHT_CACHE"}  # fmt: skip
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        read = re.findall(r"""(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]|getenv\()\s*["'](\w+)["']""", text)
        assert set(read) <= known, path.name


def test_no_global_statement() -> None:
    for path in FILES:
        assert not any(isinstance(node, ast.Global) for node in ast.walk(_tree(path))), path.name


def test_every_folder_is_in_the_wheel() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        name.removeprefix("shardwright").removeprefix(".").replace(".", "/") or "." for name in settings["packages"]
    }
    found = {str(path.parent.relative_to(ROOT)) for path in FILES}
    assert listed == found
    data = [p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".toml", ".json", ".html", ".css", ".js")]
    patterns = [(k.removeprefix("shardwright.").replace(".", "/"), v) for k, v in settings["package-data"].items()]
    for path in data:
        assert any(path in set((ROOT / folder).glob(p)) for folder, ps in patterns for p in ps), path


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {re.split(r"[<>=!~ ]", d)[0].lower() for d in asked} == pinned


@pytest.mark.parametrize(
    "arguments", [["--help"], ["clusters"], ["clusters", "h100-sxm"], ["diff", "a", "b"], ["--version"]]
)
def test_light_commands_import_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from shardwright.cli.main import main\n"
        f"sys.argv = ['shardwright', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ortools', 'transformers', 'numpy')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()[-500:]


def _texts() -> list[Path]:
    """Everything a person wrote: sources, tests, docs, build files."""
    named = [ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt", ".gitignore", ".ci/run")]
    docs = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    data = [p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in (".toml", ".html", ".css", ".js")]
    return [*FILES, *(t for t in TESTS if t.name != "test_layout.py"), *named, *docs, *data]


def test_sources_are_utf8() -> None:
    for path in FILES:
        with tokenize.open(path) as file:
            assert file.encoding == "utf-8"
