"""What a verb does that finds itself a job: beside a server it steps back, and its log has whole lines."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axicon.recipe import EvaluateRecipe
from jobs import submitted


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    monkeypatch.setenv(submitted.JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "me"}}))
    monkeypatch.setattr(submitted, "step_back", lambda: None)
    monkeypatch.setattr(submitted, "present", lambda kind: contextlib.nullcontext())

    def beside(servers: list[int]) -> None:
        monkeypatch.setattr(submitted, "living", lambda kind: servers)

    return beside


def test_beside_a_server_a_job_takes_one_thread_and_says_so(
    in_a_job: Callable[[list[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_a_job([77])
    assert submitted.begin("evaluate", EvaluateRecipe()).threads == 1
    assert "job me, recipe " in (said := capsys.readouterr().err)
    assert "1 thread: a server runs on this machine (process 77)" in said
    assert submitted.begin("evaluate", EvaluateRecipe(threads=2)).threads == 2
    in_a_job([])
    assert submitted.begin("evaluate", EvaluateRecipe()).threads is None


def test_a_job_steps_back_as_a_thread_and_as_a_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(submitted, "SESSION", tmp_path / "autogroup")
    monkeypatch.setattr(os, "nice", done.append)
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, _: done.append(policy), raising=False)
    submitted.step_back()
    assert done[0] == 19
    assert done[1:] == ([os.SCHED_IDLE] if hasattr(os, "SCHED_IDLE") else [])
    assert (tmp_path / "autogroup").read_text() == "19"
    monkeypatch.setattr(submitted, "SESSION", tmp_path / "not" / "there")
    submitted.step_back()


def test_outside_a_job_nothing_is_said_or_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitted, "living", lambda kind: [77])
    assert submitted.begin("evaluate", EvaluateRecipe()).threads is None
    assert capsys.readouterr().err == ""


def test_without_a_terminal_there_are_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with monkeypatch.context() as inside:
        for name in submitted.WHOLE_LINES:
            inside.setenv(name, "x")
            inside.delenv(name)
        submitted.keep_lines_whole()
        assert os.environ["TQDM_DISABLE"] == "1"
