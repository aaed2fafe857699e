"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("axicon", "actors", "services", "jobs")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def sources() -> list[Path]:
    return [path for path in tracked(*PRODUCT) if path.suffix == ".py"]


def test_the_lock_pins_everything_by_hash_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    unpinned = [
        entry.splitlines()[0] for entry in entries if "==" not in entry or "--hash=sha256:" not in entry
    ]
    assert not unpinned
    assert not (ROOT / "uv.lock").exists()


def test_the_lock_holds_what_pyproject_asks_for_and_nothing_that_never_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *(item for extra in project["project"]["optional-dependencies"].values() for item in extra),
        *(item for group in project["dependency-groups"].values() for item in group),
    ]
    names = {re.match(r"[A-Za-z0-9._-]+", item)[0].lower().replace("_", "-") for item in wanted}
    locked = dict(
        re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    assert names - locked.keys() == set()
    assert locked.keys() & {"llm", "llama-cpp-python"} == set()


BANNED = {
    ("pickle", None), ("cloudpickle", None), ("dill", None), ("marshal", None), ("shelve", None),
    ("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("joblib", None),
}  # fmt: skip


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_product_code_runs_no_foreign_code(path: Path) -> None:
    """No pickle, no `torch.load`, no `yaml.load`, no `eval` or `exec`, no `trust_remote_code=True`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if (name.name.partition(".")[0], None) in BANNED]
        elif isinstance(node, ast.ImportFrom) and (str(node.module).partition(".")[0], None) in BANNED:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [ast.unparse(node)] if (node.value.id, node.attr) in BANNED else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in ("eval", "exec", "compile", "__import__") else []
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found += [] if ast.unparse(node.value) == "False" else ["trust_remote_code"]
    assert not found


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(?:TO" + "DO|FIX" + "ME|XX" + r"X|raise NotImplemented" + r"Error)\b")
    found = [
        str(p) for p in tracked("*.py", "*.md") if p.name != "CHANGELOG.md" and marks.search(p.read_text())
    ]
    assert not found


def test_no_path_of_a_machine_and_no_package_host() -> None:
    hosts = ("python" + "hosted", "pypi" + ".org", "npmjs" + ".org", "deb" + "ian.org")
    paths = re.compile(r"(?<![\w.])/(?:ro" + r"ot|wo" + r"rk|fa" + r"rm)/")
    found = []
    for path in tracked(
        "*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.lock", "Makefile", ".ci/*", "*.html", "*.js"
    ):
        text = path.read_text()
        if paths.search(text) or any(host in text for host in hosts):
            found.append(str(path.relative_to(ROOT)))
    assert not found


LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
QUOTED = re.compile(r"`((?:axicon|actors|services|jobs|recipes|tests|benchmarks|examples|docs)/[\w./-]*)`")


@pytest.mark.parametrize("path", tracked("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_real_files(path: Path) -> None:
    text = path.read_text()
    missing = [name for name in LINK.findall(text) if not (path.parent / name).exists()]
    missing += [name for name in QUOTED.findall(text) if not (ROOT / name).exists()]
    assert not missing


def test_every_paper_the_code_cites_is_in_the_list_of_papers() -> None:
    paper = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
    listed = set(paper.findall((ROOT / "docs" / "papers.md").read_text()))
    cited = {name for path in sources() for name in paper.findall(path.read_text())}
    assert cited
    assert cited - listed == set()


def test_every_folder_of_the_product_is_a_package() -> None:
    """Without `__init__.py` a folder imports all the same, but the layers contract does not see it."""
    folders = {path.parent for path in sources()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
