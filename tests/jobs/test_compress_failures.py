"""`axicon compress` where something is there already, is missing, fails or is killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axicon.errors import AxiconError, RunFailed
from axicon.model.artefact import claim
from axicon.model.machine import leave_alone
from axicon.recipe import CompressRecipe
from jobs import compress, stop
from tests import forkserver
from tests.faults import failing, failures
from tests.jobs.compressing import INT8, dense_model, prose, run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("models") / "tiny")


class TestWhatIsThereAlready:
    def test_the_same_recipe_is_done(self, dense: Path, tmp_path: Path) -> None:
        first = run(dense, tmp_path / "small")
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()}
        said = io.StringIO()
        again = run(dense, tmp_path / "small", said, threads=2, measure=True)
        assert "is there already, made by this recipe, and intact" in said.getvalue()
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()} == before
        assert again.metrics == first.metrics
        assert again.details["done"]

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"compressor": INT8 | {"relative": 4.0}}, r"made by llm_int8 with relative=5\.0"),
            ({"dtype": "float32"}, "dtype bfloat16, not float32"),
        ],
    )
    def test_another_recipe_is_refused(
        self, settings: dict[str, Any], says: str, dense: Path, tmp_path: Path
    ) -> None:
        run(dense, tmp_path / "small")
        with pytest.raises(AxiconError, match=rf"holds another model \({says}\); choose another"):
            run(dense, tmp_path / "small", **settings)

    def test_another_model_is_refused(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        other = tmp_path / "other"
        shutil.copytree(dense, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        with pytest.raises(AxiconError, match=rf"made from {dense}, or from another version of it"):
            run(other, tmp_path / "small")

    def test_what_was_not_made_here_is_refused(self, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "notes").mkdir()
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "notes", tmp_path / "file", dense):
            with pytest.raises(AxiconError, match="exists already; choose another directory or remove it"):
                run(dense, out)

    def test_damage_is_not_called_done(self, dense: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small")
        (tmp_path / "small" / "tokenizer.json").write_text("{}")
        with pytest.raises(RunFailed, match=r"is damaged now \(tokenizer.json has 2 bytes.*remove it"):
            run(dense, tmp_path / "small")


class TestRefusals:
    def test_too_little_memory(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("axicon.compress.estimate.available_memory", lambda: 100_000)
        with pytest.raises(AxiconError, match=r"about 0\.03 GiB of memory, 0\.00 GiB are available; stop"):
            run(dense, tmp_path / "small")
        assert not (tmp_path / "small").exists()

    def test_too_little_disk(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type(shutil.disk_usage(tmp_path))(1 << 30, 1 << 30, 1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
        with pytest.raises(AxiconError, match=r"takes about 0\.03 GiB, 0\.00 GiB are free on that disk; "):
            run(dense, tmp_path / "deep" / "small")
        assert not (tmp_path / "deep" / "small").exists()

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"compressor": "gptq4"}, "compressor=gptq4: known are .*llm_int8"),
            ({"compressor": "auto"}, "compressor=auto: known are .*llm_int8"),
            ({"compressor": INT8 | {"treshold": 1}}, "did you mean 'threshold'"),
            ({"model": "./none"}, "no such file or directory"),
            ({"text": "none.txt"}, "none.txt"),
            ({"window": 300}, "window=300: the model knows 256 positions; give window=256"),
            ({"window": 200, "windows": 10**6}, "not 1000000: ask for windows=4"),
        ],
    )
    def test_what_is_wrong_shows_before_the_work(
        self,
        settings: dict[str, Any],
        says: str,
        dense: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(compress, "estimate", lambda *_: pytest.fail("the work began"))
        with pytest.raises(AxiconError, match=says):
            run(dense, tmp_path / "small", **{"text": str(prose(tmp_path)), **settings})

    def test_two_jobs_into_one_directory(self, dense: Path, tmp_path: Path) -> None:
        with claim(tmp_path / "small"):
            start = time.monotonic()
            with pytest.raises(AxiconError, match=rf"another axicon \(process {os.getpid()}\) is making it"):
                run(dense, tmp_path / "small")
            assert time.monotonic() - start < 5
        run(dense, tmp_path / "small")


@pytest.mark.parametrize(("rules", "says"), [
    ({"*.dwn": {"bits": 8}}, r"rules of '\*\.dwn': no product of this model has such a name; they are called "
     r"blocks\.0\.qkv to blocks\.2\.down, with qkv, out, gate_up, down at the end"),
    ({"blocks.2.down": {"group": 48}}, r"group_int4: blocks\.2\.down: a group of 48 does not divide 160"),
])  # fmt: skip
def test_rules_that_do_not_fit_the_model_are_refused_before_the_work(
    rules: dict[str, Any], says: str, dense: Path, tmp_path: Path
) -> None:
    recipe = CompressRecipe.model_validate({
        "model": str(dense), "out": tmp_path / "out", "compressor": {"method": "group_int4", "rules": rules},
    })  # fmt: skip
    with pytest.raises(AxiconError, match=says):
        compress.run(recipe)
    assert list(tmp_path.iterdir()) == []


class TestFailures:
    def test_whatever_fails_there_is_a_whole_model_or_none_and_a_rerun_completes(
        self, dense: Path, tmp_path: Path
    ) -> None:
        run(dense, tmp_path / "want")
        want = json.loads((tmp_path / "want" / "manifest.json").read_text())["files"]
        target, lines = tmp_path / "out" / "small", []
        for failed in failures(lambda: run(dense, target)):
            assert isinstance(failed, AxiconError), failed
            assert "\n" not in str(failed)
            lines.append(str(failed))
            if target.exists():
                run(dense, target)  # intact and called done, or this raises
                shutil.rmtree(target)
            assert list(target.parent.iterdir() if target.parent.exists() else ()) == []
        assert len(lines) > 40
        assert sum("No space left on device" in line for line in lines) > 20
        assert json.loads((target / "manifest.json").read_text())["files"] == want

    def test_killed_or_stopped_anywhere(self, dense: Path, tmp_path: Path) -> None:
        """In processes forked by one that has loaded torch and computed nothing."""
        process = forkserver.started(_kill_at_some_points, dense, tmp_path)
        process.join()
        assert process.exitcode == 0


def _kill_at_some_points(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "small"
    for number in (1, 2, 5, 30, 60, 70):
        assert _forked(lambda n=number: _die_at(n, dense, target)) == -signal.SIGKILL, number
        # A process that is killed cannot clean up: what is left is hidden, and unlocked.
        assert not target.exists()
    assert _forked(lambda: _stop_in_the_middle(dense, target)) == 143
    assert not target.exists()
    assert _forked(lambda: run(dense, target)) == 0
    assert [path.name for path in target.parent.iterdir()] == ["small"]


def _forked(action: Callable[[], object]) -> int:
    leave_alone()  # so that it does not look through all that was imported, each time it returns memory
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def _die_at(number: int, dense: Path, target: Path) -> None:
    with failing(number, kill=True):
        run(dense, target)


def _stop_in_the_middle(dense: Path, target: Path) -> None:
    def stopping(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    compress.write_manifest = stopping  # type: ignore[assignment]
    try:
        with stop.stop_on_signal():
            run(dense, target)
    except stop.Stopped as stopped:
        assert list(target.parent.iterdir()) == []
        os._exit(stopped.exit_code)
