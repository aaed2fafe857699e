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
from axicon.model.artefact import atomic_directory, exclusive, write_manifest, write_weights
from axicon.model.tensorfile import TensorFile


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


def test_shards_are_filled_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def tensor(name: str) -> torch.Tensor:
        made.append(name)
        return torch.full((10,), float(name), dtype=torch.float32)

    write_weights(tmp_path, dict.fromkeys("43210", 40), tensor, shard_bytes=100)
    assert made == ["0", "1", "2", "3", "4"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["4"] == "model-00003-of-00003.safetensors"
    assert index["metadata"]["total_size"] == 200
    for name, file in index["weight_map"].items():
        assert TensorFile(tmp_path / file).tensor(name).tolist() == [float(name)] * 10


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    write_manifest(tmp_path, name="x", parents=[])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["files"] == {"a": {
        "bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}
