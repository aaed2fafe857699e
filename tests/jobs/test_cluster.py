"""The private Ray of `axicon serve`, as far as it can be seen without starting one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from jobs import cluster, cluster_file, reaper


def test_free_ports_are_different_and_free() -> None:
    import socket

    ports = cluster.free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_the_folder_is_private_and_its_path_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / "a-folder-for-temporary-files-with-a-long-name"
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = cluster.private_folder()
    try:
        assert folder.stat().st_mode & 0o077 == 0
        assert len(str(folder)) <= cluster.LONGEST_BASE + len("/ax-12345678")
    finally:
        folder.rmdir()


def test_socket_paths_fit_even_in_the_longest_folder(tmp_path: Path) -> None:
    folder = Path("/" + "x" * (cluster.LONGEST_BASE - 1)) / "ax-12345678"
    env = cluster.environment(cluster_file.read().metadata, folder)
    node = "0" * 56
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        path = Path(env[name])
        assert len(str(path.parent / node / path.name)) <= 97
    assert len(f"{folder}/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107


def test_everything_ray_might_share_is_in_the_folder(tmp_path: Path) -> None:
    env = cluster.environment(cluster_file.read().metadata, tmp_path)
    assert env["RAY_TMPDIR"] == str(tmp_path)
    assert env["RAY_AUTH_MODE"] == "token"
    assert Path(env["RAY_AUTH_TOKEN_PATH"]).parent == tmp_path
    assert not [value for value in env.values() if value.startswith("/tmp/haproxy-serve")]


def test_variables_are_restored_and_foreign_addresses_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("AXICON_TEST_KEPT", "1")
    before = dict(os.environ)
    with cluster._variables({"RAY_AUTH_MODE": "token", "AXICON_TEST_NEW": "1"}):
        assert "RAY_ADDRESS" not in os.environ
        assert os.environ["AXICON_TEST_NEW"] == os.environ["AXICON_TEST_KEPT"] == "1"
    assert dict(os.environ) == before


STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
log = open(pathlib.Path(sys.argv[1]) / "log", "w")
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def stubborn_orphan(folder: Path) -> psutil.Process:
    """A process whose parent is gone, that ignores SIGTERM, and that has a file in `folder` open."""
    parent = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid)"
    command = [sys.executable, "-c", parent, sys.executable, "-c", STUBBORN, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    return psutil.Process(int(done.stdout))


def test_the_reaper_ends_who_uses_the_folder_when_its_input_ends(tmp_path: Path) -> None:
    folder, other = tmp_path / "ours", tmp_path / "ours-not"
    folder.mkdir()
    other.mkdir()
    ours, theirs = stubborn_orphan(folder), stubborn_orphan(other)
    try:
        with cluster._reaped(folder):
            assert ours.is_running()
        assert not ours.is_running()
        assert not folder.exists()
        assert theirs.is_running()
        assert other.exists()
    finally:
        reaper.end([ours, theirs], patience_s=0)


POLITE = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "asked").touch(), sys.exit()))
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_ending_is_polite_first(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", POLITE, str(tmp_path)])
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    reaper.end([psutil.Process(process.pid)])
    assert process.poll() is not None
    assert (tmp_path / "asked").exists()


def test_the_command_itself_is_spared(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w"):
        assert os.getpid() in {process.pid for process in reaper.users_of(tmp_path, spared=set())}
        assert reaper.users_of(tmp_path, spared={os.getpid()}) == []
        with cluster._reaped(tmp_path):
            pass
    assert not tmp_path.exists()


def test_ray_imported_too_early_is_a_defect() -> None:
    import ray  # noqa: F401

    with (
        pytest.raises(RuntimeError, match="before ray is imported"),
        cluster.local_ray(cluster_file.read().metadata),
    ):
        pass
