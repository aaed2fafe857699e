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

from jobs import cluster


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


def test_everything_ray_might_share_is_in_the_folder(tmp_path: Path) -> None:
    env = cluster.environment(cluster.read(), tmp_path)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="adopting orphans is a feature of Linux")
def test_orphans_are_found_and_ended_even_if_they_ignore_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    stubborn = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-c', {stubborn!r}], stdout=subprocess.DEVNULL); print(p.pid)"
    )
    with cluster._adopting_orphans():
        done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, check=True)
        pid = int(done.stdout)
        while not ready.exists():
            time.sleep(0.01)
        found = [process for process in cluster._descendants() if process.pid == pid]
        assert found, "the orphan was lost"
        cluster.end(found, patience_s=0.3)
    assert not psutil.pid_exists(pid)


def test_ray_imported_too_early_is_a_defect() -> None:
    import ray  # noqa: F401

    with pytest.raises(RuntimeError, match="before ray is imported"), cluster.local_ray(cluster.read()):
        pass
