from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axicon.model import presence


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(presence, "FOLDER", tmp_path / "here")
    return tmp_path / "here"


def test_a_server_is_there_for_as_long_as_it_serves(folder: Path) -> None:
    assert presence.living("server") == []
    with presence.present("server"):
        assert presence.living("server") == [os.getpid()]
        assert presence.living("job") == []
        assert folder.stat().st_mode & 0o077 == 0
    assert presence.living("server") == []
    assert list(folder.iterdir()) == []


def test_a_killed_server_is_gone_and_its_file_is_tidied_up(folder: Path) -> None:
    code = (
        "import pathlib, sys, time; from axicon.model import presence\n"
        "presence.FOLDER = pathlib.Path(sys.argv[1])\n"
        "with presence.present('server'): print('up', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        assert presence.living("server") == [server.pid]
        server.kill()
    assert list(folder.iterdir()) != []
    assert presence.living("server") == []
    assert list(folder.iterdir()) == []


def test_a_folder_of_somebody_else_is_neither_believed_nor_fatal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.symlink_to(folder.parent)
    with presence.present("server"):
        assert presence.living("server") == []
    assert "others take no account of this server" in caplog.text
