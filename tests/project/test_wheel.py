"""What is installed: four packages under exactly their names, with the files they read."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import axicon

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"axicon", "actors", "services", "jobs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_top_level_is_four_packages(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_every_tracked_file_of_the_packages_is_in_it(names: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *sorted(PACKAGES)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert len(tracked) > 50
    assert set(tracked) <= names


def test_recipes_are_in_it(names: set[str]) -> None:
    recipes = {f"jobs/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert "jobs/recipes/llm_int8.yaml" in recipes
    assert recipes <= names


INSTALLED = """
import json
from jobs import cluster_file, command, parcel
with parcel.working_folder(None) as folder:
    sent = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
print(json.dumps([str(cluster_file.shipped()), str(command.shipped("llm_int8.yaml")), sent]))
"""


def test_without_a_checkout_jobs_take_the_installed_packages_along(
    wheel: Path, names: set[str], tmp_path: Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    cluster, recipe, sent = json.loads(done.stdout)
    assert cluster == str(site / "jobs" / "cluster.yaml")
    assert recipe == str(site / "jobs" / "recipes" / "llm_int8.yaml")
    assert set(sent) == {name for name in names if name.partition("/")[0] in PACKAGES}


def test_nothing_but_the_project_is_in_it(names: set[str]) -> None:
    assert not [name for name in names if "/tests/" in name or "__pycache__" in name or name.endswith(".so")]


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert axicon.__version__ == project["version"]
    assert importlib.metadata.version("axicon") == project["version"]
