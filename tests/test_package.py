"""The wheel: complete, and able to work outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import plans
import pytest
from shardwright.planner.planfile import save_plan

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "demo", "__pycache__", "*.egg-info", "tests", "benchmarks")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    build = (
        "import os, sys, setuptools.build_meta as b; os.chdir(sys.argv[1]); print(b.build_wheel(sys.argv[2]))"
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", build, str(folder / "source"), str(folder)], check=True, capture_output=True, timeout=120
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def _shardwright(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    program = [sys.executable, "-m", "shardwright.cli.main", *arguments]
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_everything_is_in_it(installed: Path) -> None:
    package = installed / "shardwright"
    for folder in ("planner", "profiles", "passes", "runtime", "cli"):
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        there = {p.relative_to(package) for p in (package / folder).rglob("*") if p.is_file()}
        assert there == here
    (licence,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_it_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    save_plan(plans.plan(), tmp_path / "plan.json")
    where = subprocess.run(
        [sys.executable, "-c", "import shardwright; print(shardwright.__file__)"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))
    done = _shardwright(installed, tmp_path, "report", "plan.json", "-o", "r.html")
    assert done.returncode == 0, done.stderr
    assert "hf:tiny" in (tmp_path / "r.html").read_text()
    assert _shardwright(installed, tmp_path, "clusters", "h100-sxm").returncode == 0
