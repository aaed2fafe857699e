"""The files that say where clusters run, and talking to what they name."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from axicon.errors import AxiconError
from jobs import running


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AXICON_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "clusters"


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a cluster's holder and holds nothing."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "jobs.holder"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def cluster(pid: int, name: str = "one") -> running.Running:
    return running.Running(
        name=name,
        pid=pid,
        dashboard="http://127.0.0.1:1",
        gcs="127.0.0.1:2",
        folder="/tmp/ax-x",
        token_path="/tmp/ax-x/token",
        cluster_file="/tmp/cluster.yaml",
        started="2026-01-01T00:00:00+00:00",
        storage="/tmp/storage",
    )


def test_what_is_written_is_read_and_for_this_user_alone(
    holder: subprocess.Popen[bytes], folder: Path
) -> None:
    running.write(cluster(holder.pid))
    assert running.read("one") == running.find() == running.find("one") == cluster(holder.pid)
    assert stat.S_IMODE((folder / "one.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["one.json"]
    keys = {"name", "pid", "dashboard", "gcs", "folder", "token_path", "cluster_file", "started"}
    assert keys <= json.loads((folder / "one.json").read_text()).keys()


def test_the_folder_follows_xdg_without_a_word_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXICON_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert running.path_of("one") == Path("/elsewhere/axicon/clusters/one.json")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert running.path_of("one") == Path("~/.local/state/axicon/clusters/one.json").expanduser()


def test_a_file_whose_process_is_gone_is_removed(holder: subprocess.Popen[bytes], folder: Path) -> None:
    running.write(cluster(holder.pid))
    holder.kill()
    holder.wait()
    assert running.read("one") is None
    assert not (folder / "one.json").exists()


def test_a_process_id_that_was_given_again_does_not_count(folder: Path) -> None:
    running.write(cluster(os.getpid()))
    assert list(running.clusters()) == []
    assert not (folder / "one.json").exists()


def test_a_cluster_that_is_not_there_is_one_line(holder: subprocess.Popen[bytes]) -> None:
    with pytest.raises(AxiconError, match="no cluster is running here; start one with `axicon up`"):
        running.find()
    with pytest.raises(AxiconError, match="no cluster two is running here; start it with `axicon up`"):
        running.find("two")
    running.write(cluster(holder.pid))
    with pytest.raises(AxiconError, match="no cluster two is running here; running here: one"):
        running.find("two")


def test_with_several_one_has_to_be_named(holder: subprocess.Popen[bytes]) -> None:
    for name in ("one", "two"):
        running.write(cluster(holder.pid, name))
    assert running.find("two").name == "two"
    with pytest.raises(AxiconError, match="name one of one, two"):
        running.find()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(AxiconError, match="cannot be a cluster's name"):
        running.path_of(name)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "one"}'])
def test_a_broken_file_is_one_line(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(text)
    with pytest.raises(AxiconError, match="cannot be read") as caught:
        running.find("one")
    assert "\n" not in str(caught.value)


def test_its_environment_names_no_secret(holder: subprocess.Popen[bytes]) -> None:
    env = replace(cluster(holder.pid), token_path="/t").env()
    assert env == {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/t",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1",
    }
