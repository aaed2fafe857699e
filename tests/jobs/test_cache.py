"""`axicon cache` on a folder made for it, beside processes that use something of it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from axicon.errors import AxiconError
from axicon.kernels import native
from axicon.model import cachedir, checkpoint, interchange
from jobs import __main__ as command
from jobs import cache
from tests.jobs.made import made_from

OLD_S = 40 * 86400
MODEL = f"models/gguf-{'0' * 16}-v{interchange.CONVERTER}/tiny"
NOBODY = 2**22 + 1
"""No process has this number."""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one thing of each kind. The kernels `kernels-now.so` are those of this machine."""
    root = tmp_path / "cache"
    monkeypatch.setenv("AXICON_CACHE", str(root))
    monkeypatch.setattr(native, "library_file", lambda: ("c++", root / "kernels" / "kernels-now.so"))
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF")
    made_from(root / MODEL, [{"name": "tiny.gguf", "sha256": "0", "source": str(source)}])
    made_from(root / "models" / f"gguf-{'1' * 16}-v0" / "old")
    for name in ("now", "before"):
        write(root / "kernels" / f"kernels-{name}.so", 1000)
    write(root / "kernels" / "tmpabc" / "half.so", 10)
    os.utime(root / "kernels" / "tmpabc", (0, 0))
    write(root / "digests.json", 2)
    write(root / f".digests.json.{NOBODY}.01234567.tmp", 3)
    write(root / MODEL / ".." / f".tiny.{NOBODY}.01234567.tmp" / "model.safetensors", 70)
    write(root / "models" / f".gguf-{'0' * 16}-v{interchange.CONVERTER}.lock", 0)
    write(root / "notes.txt", 5)
    return root


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def states() -> dict[str, str]:
    return {item.name: item.state for item in cache.items()}


def test_statistics_of_samples_are_listed_and_stay_while_a_run_has_them_open(root: Path) -> None:
    write(root / "statistics" / "set-0123456789abcdef" / "manifest.json", 20)
    write(root / "statistics" / "set-0123456789abcdef" / "states-00001" / "model.safetensors", 3000)
    [found] = [item for item in cache.items() if item.name.startswith("statistics/")]
    assert (found.state, found.bytes) == ("current", 3020)
    lock = "file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH)"
    with process(lock, found.path / "manifest.json"):
        assert states()[found.name] == "in use"
        assert cache.remove(found) is None
    assert cache.remove(found) == 3020
    assert not found.path.exists()


def left() -> set[str]:
    return set(states())


def run(*words: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(command.axicon, ["cache", *words], input=typed)


@contextmanager
def process(script: str, path: Path) -> Iterator[int]:
    """A living process that ran `script`, with the path as sys.argv[1], and now waits."""
    whole = f"import fcntl, mmap, sys\n{script}\nprint('ready', flush=True)\nsys.stdin.read()"
    arguments = [sys.executable, "-S", "-c", whole, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
        child.communicate()


OPEN = "file = open(sys.argv[1])"
MAP = "file = open(sys.argv[1], 'rb'); seen = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); file.close()"
LOCK = "file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX)"


def test_everything_is_listed_with_what_it_is(root: Path) -> None:
    old = f"models/gguf-{'1' * 16}-v0/old"
    temporary = str(Path(MODEL).with_name(f".tiny.{NOBODY}.01234567.tmp"))
    assert states() == {
        MODEL: "current",
        old: "obsolete",
        temporary: "leftover",
        f"models/.gguf-{'0' * 16}-v{interchange.CONVERTER}.lock": "leftover",
        "kernels/kernels-now.so": "current",
        "kernels/kernels-before.so": "obsolete",
        "kernels/tmpabc": "leftover",
        "digests.json": "current",
        f".digests.json.{NOBODY}.01234567.tmp": "leftover",
        "notes.txt": "foreign",
    }
    (model,) = (item for item in cache.items() if item.name == MODEL)
    assert model.bytes == sum(file.stat().st_size for file in (root / MODEL).iterdir())
    shown = run().output
    assert all(name in shown for name in states())
    assert "`axicon cache clean` would free" in shown
    listed = {one["name"]: one["state"] for one in json.loads(run("--json").output)}
    assert listed == states()


def test_clean_removes_what_is_of_no_use(root: Path) -> None:
    expected = sum(item.bytes for item in cache.items() if item.state in ("obsolete", "leftover"))
    result = run("clean", "--yes")
    assert result.exit_code == 0
    assert f"\n{expected} bytes freed" in result.output
    assert left() == {MODEL, "kernels/kernels-now.so", "digests.json", "notes.txt"}
    assert not (root / "models" / f"gguf-{'1' * 16}-v0").exists()
    assert run("clean").output == "nothing to remove\n"


def test_all_leaves_what_is_not_ours_and_what_cannot_be_made_again(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").unlink()
    (model,) = (item for item in cache.items() if item.name == MODEL)
    assert model.about == f"cannot be made again: {tmp_path / 'tiny.gguf'} is gone"
    assert run("clean", "--all", "--yes").exit_code == 0
    assert left() == {MODEL, "notes.txt"}
    assert run("clean", "tiny", "notes.txt", "--yes").exit_code == 0
    assert left() <= {"digests.json"}  # of the embedded model, whose place was looked for


@pytest.mark.parametrize("name", [MODEL, "tiny", "models", "models/", "ti*"])
def test_names_are_paths_last_parts_folders_or_patterns(name: str) -> None:
    picked = {item.name for item in cache.chosen(cache.items(), [name])}
    assert MODEL in picked
    assert not picked & {"digests.json", "kernels/kernels-now.so"}


def test_a_name_that_fits_nothing_is_one_line() -> None:
    with pytest.raises(AxiconError, match="tinny: nothing in the cache has this name"):
        cache.chosen(cache.items(), ["tinny"])


def test_older_than_means_unused_for_so_long(root: Path) -> None:
    long_ago = time.time() - OLD_S
    for file in [root / MODEL, *(root / MODEL).iterdir()]:
        os.utime(file, (long_ago, long_ago))
    picked = {item.name for item in cache.chosen(cache.items(), older_than=39)}
    assert MODEL in picked
    assert "kernels/kernels-now.so" not in picked
    os.utime(root / MODEL / "config.json", (time.time(), long_ago))
    assert MODEL not in {item.name for item in cache.chosen(cache.items(), older_than=39)}


def test_dry_run_and_no_at_the_question_remove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = left()
    assert "to remove" in run("clean", "--dry-run").output
    assert isinstance(run("clean").exception, AxiconError)  # nobody to be asked
    monkeypatch.setattr("jobs.verbs.artefacts._somebody_is_there", lambda: True)
    refused = run("clean", typed="n\n")
    assert "Remove them? [y/N]" in refused.output
    assert left() == before
    assert run("clean", typed="y\n").exit_code == 0
    assert left() < before


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (OPEN, f"{MODEL}/manifest.json"),
        (MAP, f"{MODEL}/model.safetensors"),
        (MAP, "kernels/kernels-before.so"),
        (LOCK, f"models/.gguf-{'0' * 16}-v{interchange.CONVERTER}.lock"),
    ],
)
def test_what_a_living_process_uses_stays(root: Path, script: str, name: str) -> None:
    before = cache.items()
    with process(script, root / name) as pid:
        (item,) = (item for item in cache.items() if item.state == "in use")
        assert name.startswith(item.name)
        assert item.about == f"in use by process {pid}"
        assert f"{item.name} stays: in use by process {pid}" in run("clean", item.name, "--yes").output
        # Also where it began to use it after the list was made.
        (known,) = (old for old in before if old.name == item.name)
        assert cache.remove(known) is None
        assert (root / name).exists()
    assert cache.remove(known) == known.bytes
    assert not (root / known.name).exists()


def test_a_conversion_in_progress_keeps_its_model(root: Path) -> None:
    lock = root / "models" / f".gguf-{'0' * 16}-v{interchange.CONVERTER}.lock"
    (model,) = (item for item in cache.items() if item.name == MODEL)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cache.remove(model) is None
    assert cache.remove(model) == model.bytes


def test_a_half_written_one_belongs_to_its_living_writer(root: Path) -> None:
    writing = root / "models" / f"gguf-{'0' * 16}-v1" / f".tiny.{os.getppid()}.01234567.tmp"
    write(writing / "model.safetensors", 9)
    assert states()[str(writing.relative_to(root))] == "in use"


def test_who_reads_a_model_of_the_cache_holds_it(root: Path) -> None:
    folder = checkpoint.resolve(root / MODEL)
    assert folder == (root / MODEL).resolve()
    try:
        (model,) = (item for item in cache.items() if item.name == MODEL)
        assert cache.remove(model) is None
    finally:
        cachedir.release()
    assert cache.remove(model) == model.bytes
    with pytest.raises(AxiconError, match="no such file or directory"):
        checkpoint.resolve(root / MODEL)


def test_an_empty_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_CACHE", str(tmp_path / "none"))
    assert run().output == f"{tmp_path / 'none'} is empty\n"
    assert not (tmp_path / "none").exists()


def test_answers_of_a_model_are_listed_one_by_one(root: Path) -> None:
    write(root / "answers" / "0123456789abcdef-01234567.json", 10)
    assert states()["answers/0123456789abcdef-01234567.json"] == "current"
