"""The atomic writer: a reader sees a whole directory or none, whatever happens to the writer."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from axicon.errors import AxiconError
from axicon.model import artefact
from axicon.model.artefact import (
    atomic_directory,
    claim,
    exclusive,
    write_atomically,
    write_json,
    write_manifest,
)
from axicon.model.tensorwriter import write_weights
from tests.faults import failing, failures


def test_a_finished_block_becomes_the_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert (target / "sub" / "b").read_text() == "2"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("point", ["written", "synced"])
def test_a_failure_at_any_point_leaves_nothing(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(here: str) -> None:
        if here == point:
            raise RuntimeError(point)

    monkeypatch.setattr(artefact, "reached", fail)
    with pytest.raises(RuntimeError, match=point), atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_rename_leaves_the_whole_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(here: str) -> None:
        if here == "renamed":
            raise KeyboardInterrupt

    monkeypatch.setattr(artefact, "reached", fail)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "model" / "a").read_text() == "1"


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    seen: dict[str, list[int]] = {}
    monkeypatch.setattr(artefact, "reached", lambda point: seen.update({point: list(synced)}))
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        needed = {folder.stat().st_ino, (folder / "a").stat().st_ino}
    assert needed <= set(seen["synced"])
    assert tmp_path.stat().st_ino in seen["renamed"]


def _die_inside(target: Path) -> None:
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_no_directory_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_inside, args=(tmp_path / "model",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [p.name.startswith(".model.") for p in tmp_path.iterdir()] == [True]
    with atomic_directory(tmp_path / "model"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_an_existing_or_unwritable_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AxiconError, match="exists already"), atomic_directory(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(AxiconError, match="cannot write in"), atomic_directory(tmp_path / "file" / "model"):
        pass


def test_of_two_writers_without_a_lock_the_first_wins(tmp_path: Path) -> None:
    fast, slow = (atomic_directory(tmp_path / "model") for _ in range(2))
    for writer, text in ((slow, "slow"), (fast, "fast")):
        (writer.__enter__() / "a").write_text(text)
    fast.__exit__(None, None, None)
    with pytest.raises(AxiconError, match=r"cannot write.*not empty"):
        slow.__exit__(None, None, None)
    assert (tmp_path / "model" / "a").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_the_lock_keeps_others_out(tmp_path: Path) -> None:
    import fcntl

    with exclusive(tmp_path / "lock"), (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make(target: Path) -> None:
    """A directory with everything an artefact has: two weight files, an index, config, manifest."""
    with atomic_directory(target) as folder:
        write_weights(folder, [(name, torch.ones(30)) for name in "abc"], shard_bytes=200)
        write_json(folder / "config.json", {"a": 1})
        write_manifest(folder, name=target.name)


def test_whichever_operation_fails_there_is_a_whole_directory_or_none(tmp_path: Path) -> None:
    make(tmp_path / "want")
    want = {path.name: path.read_bytes() for path in (tmp_path / "want").iterdir() if path.is_file()}
    places = [tmp_path / "0"]
    for failed in failures(lambda: make(places[-1])):
        place = places[-1]
        places.append(tmp_path / str(len(places)))
        assert isinstance(failed, AxiconError)
        assert "\n" not in str(failed)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        if place.exists():
            assert "is whole, but the disk did not confirm" in str(failed)
        else:
            assert "cannot write" in str(failed)
            make(place)
        assert want.keys() == {path.name for path in place.iterdir()}
        assert all((place / name).read_bytes() == want[name] for name in want if name != "manifest.json")
    assert len(places) > 20


def test_a_full_disk_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    lines = [str(failed) for failed in failures(lambda: make(tmp_path / "model"), only=("write",))]
    assert len(lines) > 5
    assert all(
        line == f"cannot write {tmp_path / 'model'}: No space left on device; nothing was left of it, "
        "free some space or choose another place" for line in lines
    )  # fmt: skip


def test_a_small_file_is_the_old_one_or_the_new_one_whatever_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    operations = []
    for failed in failures(lambda: write_atomically(path, "new and longer")):
        assert isinstance(failed, OSError)
        operations.append(failed.filename)
        assert path.read_text() == ("new and longer" if len(operations) > 4 else "old")
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
        path.write_text("old")
    assert operations == ["open", "write", "fsync", "replace", "fsync"]
    assert path.read_text() == "new and longer"


def test_a_writer_killed_anywhere_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """SIGKILL at each operation, in processes forked before they compute anything."""
    for number in range(1, 40):
        process = multiprocessing.get_context("fork").Process(
            target=_killed_at, args=(number, tmp_path / "model")
        )
        process.start()
        process.join()
        if (tmp_path / "model").exists():
            assert {"config.json", "manifest.json"} < {p.name for p in (tmp_path / "model").iterdir()}
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    else:
        pytest.fail("the writer was killed every time")
    assert number > 20
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def _killed_at(number: int, target: Path) -> None:
    with failing(number, kill=True):
        if not target.exists():
            make(target)


def test_two_makers_of_one_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with claim(target):
        with pytest.raises(AxiconError, match=rf"another axicon \(process {os.getpid()}\) is making it"):
            claim(target).__enter__()
        with claim(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with claim(target):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(AxiconError, match="cannot write in"), claim(tmp_path / "file" / "model"):
        pass


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    write_manifest(tmp_path, name="x", parents=[])
    (tmp_path / "report.json").write_text("{}")
    write_manifest(tmp_path, name="x", parents=[])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["files"] == {"a": {
        "bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
