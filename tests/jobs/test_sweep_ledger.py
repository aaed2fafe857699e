"""The ledger: what a torn line, a damaged one and a full disk leave."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from axicon.errors import AxiconError, RunFailed
from jobs import sweep_ledger
from jobs.sweep_ledger import Ledger, Trial, read


def filled(path: Path) -> bytes:
    with Ledger(path, {"base": {"n": 1}}) as ledger:
        one = Trial("0001", {"x": 1.5}, "ab" * 32, started="2026-01-01T00:00:00+00:00")
        ledger.started(one)
        one.status, one.metrics, one.seconds = "finished", {"loss": 0.25}, 1.0
        ledger.ended(one)
        ledger.started(Trial("0002", {"x": 2.5}, "cd" * 32))
    return path.read_bytes()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = filled(path)
    assert [json.loads(line).get("status") for line in content.splitlines()] == [
        None, "running", "finished", "running"
    ]  # fmt: skip
    header, trials, end = read(path)
    assert header["base"] == {"n": 1}
    assert trials["0001"].metrics == {"loss": 0.25}
    assert (trials["0001"].ended, trials["0002"].ended, end) == (True, False, len(content))


def test_a_torn_last_line_is_none_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = filled(path)
    before = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in (before + 1, (before + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with Ledger(path, {}) as ledger:
            assert list(ledger.trials) == ["0001"]
            ledger.started(Trial("0002", {"x": 2.5}, "cd" * 32))
        assert path.read_bytes() == content


def test_damage_before_the_last_line_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = filled(path).splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"trial": \n', *lines[2:]]))
    with pytest.raises(AxiconError, match="line 2: damaged"):
        read(path)
    path.write_text('{"axicon_ledger": 9}\n')
    with pytest.raises(AxiconError, match="version 9; update axicon"):
        read(path)
    path.write_text('{"axicon_log": 1}\n')
    with pytest.raises(AxiconError, match="no ledger of a sweep"):
        read(path)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    content = filled(path)

    def full(descriptor: int, text: bytes) -> None:
        os.write(descriptor, text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger(path, {}) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(sweep_ledger, "write_all", full)
            with pytest.raises(RunFailed, match="No space left on device; free some space and run the same"):
                ledger.started(Trial("0003", {}, ""))
        assert path.read_bytes() == content
        ledger.started(Trial("0003", {}, ""))
    assert list(read(path)[1]) == ["0001", "0002", "0003"]
