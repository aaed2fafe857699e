"""`axicon doctor` finds what is broken and unsafe, and says the way out."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from jobs import __main__ as command
from jobs import doctor
from jobs.doctor import Finding

Usage = namedtuple("Usage", "total used free")
Address = namedtuple("Address", "ip port")
Connection = namedtuple("Connection", "laddr status pid")


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


def test_a_healthy_machine_is_not_broken_and_every_complaint_has_a_way_out() -> None:
    findings = doctor.examine()
    assert {"versions", "processor", "kernels", "memory", "cache", "ports", "exposure", "keys"} <= {
        finding.topic for finding in findings
    }
    assert "broken" not in levels(findings)
    assert all(finding.do for finding in findings if finding.level != "ok")


@pytest.mark.parametrize(("flags", "noted"), [({"avx2"}, True), ({"avx2", "avx512f"}, False), (set(), False)])
def test_a_processor_that_is_slow_in_bfloat16_is_noted(
    flags: set[str], noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axicon.kernels.native.cpu_flags", lambda: frozenset(flags))
    assert ("bfloat16" in {finding.topic for finding in doctor.processor()}) == noted


def test_text_and_json_say_the_same() -> None:
    findings = [Finding("ok", "a", "well"), Finding("unsafe", "topic", "open", "close it")]
    assert doctor.as_text(findings).splitlines() == [
        "ok      a      well",
        "UNSAFE  topic  open",
        "               -> close it",
    ]
    assert [Finding(**entry) for entry in json.loads(doctor.as_json(findings))] == findings


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("unsafe", 0), ("broken", 1)])
def test_the_exit_code_says_whether_something_is_broken(
    level: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Finding(level, "x", "y", "z")]),))
    result = CliRunner().invoke(command.axicon, ["doctor", "--json"])
    assert result.exit_code == code
    assert json.loads(result.output)[0]["level"] == level


def test_too_little_memory_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axicon.model.machine.available_memory", lambda: 2**30)
    assert "broken" in levels(list(doctor.memory()))


def test_little_shared_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    assert any("--shm-size" in finding.do for finding in doctor.memory())


def test_a_cache_others_may_write_is_unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXICON_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    assert "unsafe" in levels(list(doctor.files()))
    tmp_path.chmod(0o700)
    assert "unsafe" not in levels(list(doctor.files()))


def test_a_token_others_may_read_and_a_token_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert [f.do for f in doctor.secrets() if f.level == "unsafe"] == [f"chmod 600 {token}"]
    token.chmod(0o600)
    assert "unsafe" not in levels(list(doctor.secrets()))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "unsafe" in levels(list(doctor.secrets()))


@pytest.mark.parametrize(
    ("ip", "name", "level"),
    [
        ("0.0.0.0", "raylet", "unsafe"),
        ("::", "ray::ServeReplica:a", "unsafe"),
        ("192.0.2.1", "haproxy", "unsafe"),
        ("::ffff:127.0.0.1", "gcs_server", "ok"),
        ("127.0.0.1", "haproxy", "ok"),
        ("0.0.0.0", "sshd", "ok"),
    ],
)
def test_servers_of_ray_that_others_reach_are_unsafe(
    ip: str, name: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = [Connection(Address(ip, 1), "LISTEN", 7), Connection(Address("0.0.0.0", 2), "ESTABLISHED", 7)]
    monkeypatch.setattr(psutil, "net_connections", lambda kind: listening)
    monkeypatch.setattr(psutil, "Process", lambda pid: type("P", (), {"name": lambda self: name})())
    assert levels(list(doctor.exposure())) == {level}


def test_a_missing_package_is_broken_and_a_missing_extra_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-extra": "nothing"})
    findings = {finding.level: finding for finding in doctor.versions()}
    assert findings["broken"].do == "run `make setup`"
    assert "no-such-extra" in findings["note"].what
