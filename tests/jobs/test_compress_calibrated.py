"""`axicon compress` by a method that looks at data: its sample, its work folder, going on after an end."""

from __future__ import annotations

import copy
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

from axicon.compress import directory
from axicon.compress.calibration import Calibration
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.machine import leave_alone
from axicon.recipe import CompressRecipe, ServeRecipe
from jobs import compress
from jobs.progress import Reporter
from jobs.report import Report
from jobs.stop import Stopped, stop_on_signal
from tests import forkserver
from tests.faults import failing, failures
from tests.jobs.compressing import LAYERS, dense_model

pytestmark = pytest.mark.usefixtures("own_cache")

GPTQ = {"method": "gptq", "group": 32}
OTHERS = [{"method": "awq", "group": 32}, {"method": "smooth_quant", "pairs": "all"}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("models") / "tiny", width=32)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("The lamp went out. She waited for the door. " * 20)
    return path


def run(dense: Path, out: Path, said: io.StringIO | None = None, **settings: Any) -> Report:
    sample = {"windows": 4, "window": 32, **settings.pop("calibration", {})}
    recipe = CompressRecipe.model_validate({
        "model": str(dense), "out": out, "threads": 1, "measure": False, "compressor": GPTQ,
        "calibration": sample, **settings})  # fmt: skip
    return compress.run(recipe, Reporter(said or io.StringIO()))


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class TestWhatIsMade:
    def test_a_model_with_its_sample_in_the_manifest(self, dense: Path, prose: Path, tmp_path: Path) -> None:
        said, out = io.StringIO(), tmp_path / "small"
        run(dense, out, said, calibration={"text": str(prose), "seed": 5})
        assert checkpoint.packed_formats(out) == ("group_int",)
        assert hidden(tmp_path) == []
        found = manifest(out)
        sample = found["calibration"]
        facts = [sample[key] for key in ("windows", "window", "seed", "inputs")]
        assert facts == [4, 32, 5, "sequential"]
        assert len(sample["sha256"]) == len(sample["text_sha256"]) == 64
        assert len(sample["block_errors"]) == LAYERS
        assert all(0 < error < 0.5 for error in sample["block_errors"])
        [link] = found["chain"]
        seen = ("sha256", "block_errors")
        assert link["calibration"] == {key: sample[key] for key in sample if key not in seen}
        digest = sample["text_sha256"][:16]
        looked = (
            f"It looked at 4 windows of 32 tokens from the text with sha256 {digest}… (seed 5, sequential"
        )
        assert looked in (out / "README.md").read_text()
        estimate, blocks = said.getvalue().splitlines()
        assert estimate.startswith("tiny by gptq takes about ")
        assert blocks.startswith(f"blocks {LAYERS}/{LAYERS}, error 0.")

    def test_time_left_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        told: list[tuple[int, int, str]] = []
        advance = compress._with_time_left(lambda *what: told.append(what), 2)
        time.sleep(0.02)
        advance(3, 5, "error 0.1")
        advance(5, 5, "error 0.2")
        assert told == [(3, 5, "error 0.1, about 0 s left"), (5, 5, "error 0.2")]

    def test_the_sample_decides_the_bytes_and_where_states_lie_does_not(
        self, dense: Path, prose: Path, tmp_path: Path
    ) -> None:
        text = {"text": str(prose)}
        samples: dict[str, dict[str, Any]] = {
            "a": text, "b": text | {"activations": "disk"}, "c": text | {"activations": "memory"},
            "seed": text | {"seed": 1}, "dense": text | {"inputs": "dense"}, "more": text | {"windows": 5},
        }  # fmt: skip
        digests = {}
        for name, sample in samples.items():
            run(dense, tmp_path / name, calibration=sample)
            digests[name] = checkpoint.digest(tmp_path / name)
        assert digests["a"] == digests["b"] == digests["c"]
        assert len(set(digests.values())) == 4
        first, second = manifest(tmp_path / "a"), manifest(tmp_path / "b")
        assert first | {"name": ""} == second | {"name": ""}

    def test_without_a_text_the_model_writes_one_from_the_seed(self, dense: Path, tmp_path: Path) -> None:
        said = io.StringIO()
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            run(dense, tmp_path / name, said, calibration={"seed": seed})
        a, b, c = (manifest(tmp_path / name)["calibration"] for name in "abc")
        assert a == b
        assert a["sha256"] != c["sha256"]
        assert (a["text"], a["text_sha256"]) == ("written by the model", None)
        assert "calibration text, tokens 128/128" in said.getvalue()

    def test_what_is_written_has_the_asked_for_size(self, dense: Path, tmp_path: Path) -> None:
        seen: list[Calibration] = []
        real = directory.step

        def watched(*arguments: Any) -> Any:
            seen.append(arguments[3])
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(directory, "step", watched)
            run(dense, tmp_path / "a", calibration={"windows": 40, "window": 16})
        tokens = seen[0].tokens_WT
        assert tokens.shape == (40, 16)
        assert int(tokens.max()) < 272
        assert len({tuple(row.tolist()) for row in tokens}) == 40

    def test_the_same_recipe_is_done_and_another_sample_is_not(
        self, dense: Path, prose: Path, tmp_path: Path
    ) -> None:
        run(dense, tmp_path / "small", calibration={"text": str(prose)})
        shutil.copytree(tmp_path / "small", tmp_path / ".small.work")  # as if killed before it was removed
        again = run(dense, tmp_path / "small", calibration={"text": str(prose), "activations": "disk"})
        assert again.details["done"]
        assert hidden(tmp_path) == []
        with pytest.raises(AxiconError, match="made with another calibration sample"):
            run(dense, tmp_path / "small", calibration={"text": str(prose), "seed": 1})

    def test_it_cannot_be_applied_at_load(self) -> None:
        said = "compressor=gptq looks at data, which is done once: axicon compress"
        with pytest.raises(AxiconError, match=said):
            ServeRecipe(compressor="gptq").build_compressor()


class TestRefusals:
    @pytest.mark.parametrize(
        ("sample", "says"),
        [
            ({"text": "none.txt"}, "none.txt"),
            ({"text": "EMPTY"}, "empty.txt: holds no text"),
            ({"windows": 500}, r"prose.txt has \d+ tokens, which is 27 windows of 32 tokens and not 500"),
            ({"window": 257}, r"calibration.window=257: the model knows 256 positions; give calibration.win"),
        ],
    )
    def test_what_is_wrong_shows_before_the_work(
        self, sample: dict[str, Any], says: str, dense: Path, prose: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(compress, "_make_calibrated", lambda *_: pytest.fail("the work began"))
        (tmp_path / "empty.txt").write_text("\n \n")
        sample = {"text": str(prose)} | sample
        if sample["text"] == "EMPTY":
            sample["text"] = str(tmp_path / "empty.txt")
        with pytest.raises(AxiconError, match=says) as caught:
            run(dense, tmp_path / "small", calibration=sample)
        assert "\n" not in str(caught.value)

    def test_too_little_memory_or_disk(
        self, dense: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sample = {"text": str(prose)}
        with monkeypatch.context() as patched:
            patched.setattr("axicon.compress.estimate.available_memory", lambda: 100_000)
            with pytest.raises(AxiconError, match=r"about 0\.03 GiB of memory, 0\.00 GiB are available"):
                run(dense, tmp_path / "small", calibration=sample)
        usage = type(shutil.disk_usage(tmp_path))(1 << 30, 1 << 30, 1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
        with pytest.raises(AxiconError, match=r"takes about 0\.06 GiB, 0\.00 GiB are free on that disk"):
            run(dense, tmp_path / "small", calibration=sample)

    def test_states_go_to_disk_when_they_would_fill_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compress, "available_memory", lambda: 1000)
        recipe = CompressRecipe()
        assert not compress._on_disk(recipe, 600, 200)
        assert compress._on_disk(recipe, 600, 201)
        for asked in ("memory", "disk"):
            recipe = CompressRecipe(calibration={"activations": asked})
            assert compress._on_disk(recipe, 600, 200) == (asked == "disk")

    def test_a_packed_model_is_refused(self, dense: Path, prose: Path, tmp_path: Path) -> None:
        run(dense, tmp_path / "small", calibration={"text": str(prose)})
        with pytest.raises(AxiconError, match=r"compressed already \(group_int\)"):
            run(tmp_path / "small", tmp_path / "smaller", calibration={"text": str(prose)})

    def test_a_group_that_does_not_divide(self, dense: Path, prose: Path, tmp_path: Path) -> None:
        said = r"gptq: blocks\.\d\.qkv: a group of 64 does not divide 32 inputs"
        with pytest.raises(AxiconError, match=said):
            run(dense, tmp_path / "small", compressor=GPTQ | {"group": 64}, calibration={"text": str(prose)})


@pytest.mark.parametrize("activations", ["disk", "memory"])
class TestEnds:
    """Whatever ends a run, the same command goes on from the finished blocks, to the same bytes."""

    def test_every_failure_of_the_disk(
        self, activations: str, dense: Path, prose: Path, tmp_path: Path
    ) -> None:
        sample = {"text": str(prose), "activations": activations}
        run(dense, tmp_path / "want", calibration=sample)
        want = manifest(tmp_path / "want")["files"]
        target, said, quiet = tmp_path / "out" / "small", [], 0
        count = _operations(lambda: run(dense, target, calibration=sample))
        shutil.rmtree(target)
        # A run that goes on has fewer operations, so the n-th of a whole run is asked for with nothing kept.
        for number in range(1, count + 1, 7 if activations == "disk" else 17):
            try:
                with failing(number):
                    run(dense, target, calibration=sample)
                quiet += 1  # the cache of digests, which nobody needs
            except AxiconError as error:
                said.append(str(error))
            run(dense, target, calibration=sample)
            assert manifest(target)["files"] == want
            assert [path.name for path in target.parent.iterdir()] == ["small"]
            shutil.rmtree(target)
        assert not any("\n" in text for text in said)
        kept = sum("; mend that and run the same command" in text for text in said)
        assert kept > (5 if activations == "disk" else 1)
        assert quiet < 2

    def test_failures_one_after_the_other(
        self, activations: str, dense: Path, prose: Path, tmp_path: Path
    ) -> None:
        sample = {"text": str(prose), "activations": activations}
        run(dense, tmp_path / "want", calibration=sample)
        target, numbers = tmp_path / "out" / "small", []
        for failed in failures(lambda: run(dense, target, calibration=sample)):
            numbers.append(str(failed))
            if target.exists():  # whole, but its name was not confirmed
                break
        run(dense, target, calibration=sample)
        assert manifest(target)["files"] == manifest(tmp_path / "want")["files"]
        assert any("No space left on device" in line for line in numbers)

    def test_killed_or_stopped_anywhere(
        self, activations: str, dense: Path, prose: Path, tmp_path: Path
    ) -> None:
        """In processes forked by one that has loaded torch and computed nothing."""
        process = forkserver.started(_end_at_some_points, activations, dense, prose, tmp_path)
        process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize("method", OTHERS, ids=lambda method: method["method"])
def test_other_methods_killed(method: dict[str, Any], dense: Path, prose: Path, tmp_path: Path) -> None:
    """Their scaled norms are in the finished blocks, from which the states of the next are computed again."""
    process = forkserver.started(_kill_at_some_points, method, dense, prose, tmp_path)
    process.join()
    assert process.exitcode == 0


def _kill_at_some_points(method: dict[str, Any], dense: Path, prose: Path, tmp_path: Path) -> None:
    settings = {"compressor": method, "calibration": {"text": str(prose), "activations": "memory"}}
    assert _forked(lambda: run(dense, tmp_path / "want", **copy.deepcopy(settings))) == 0
    target = tmp_path / "out" / "small"

    def die(number: int) -> None:
        with failing(number, kill=True):
            run(dense, target, **copy.deepcopy(settings))

    for number in (20, 30):
        assert _forked(lambda n=number: die(n)) == -signal.SIGKILL, number
        assert not target.exists()
    assert _forked(lambda: run(dense, target, **copy.deepcopy(settings))) == 0
    assert manifest(target)["files"] == manifest(tmp_path / "want")["files"]


def _operations(action: Callable[[], object]) -> int:
    with failing(10**6) as count:
        action()
    return count()


def _end_at_some_points(activations: str, dense: Path, prose: Path, tmp_path: Path) -> None:
    sample = {"text": str(prose), "activations": activations}
    assert _forked(lambda: run(dense, tmp_path / "want", calibration=sample)) == 0
    want = manifest(tmp_path / "want")["files"]
    target = tmp_path / "out" / "small"
    for number in (1, 4, 12, 25, 45, 70, 90) if activations == "disk" else (4, 25, 70):
        assert _forked(lambda n=number: _die_at(n, dense, target, sample)) == -signal.SIGKILL, number
        assert not target.exists()
        assert _forked(lambda: run(dense, target, calibration=sample)) == 0
        assert manifest(target)["files"] == want
        assert [path.name for path in target.parent.iterdir()] == ["small"]
        shutil.rmtree(target)
    for number in (12, 30, 30, 30):  # again and again, each time a little further
        assert _forked(lambda n=number: _die_at(n, dense, target, sample)) == -signal.SIGKILL, number
    assert _forked(lambda: _stop_after_one_more(dense, target, sample)) == 143
    said = tmp_path / "said"
    assert _forked(lambda: _run_and_tell(dense, target, sample, said)) == 0
    assert "going on after 2 finished blocks" in said.read_text()
    assert manifest(target)["files"] == want


def _forked(action: Callable[[], object]) -> int:
    leave_alone()  # so that it does not look through all that was imported, each time it returns memory
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def _die_at(number: int, dense: Path, target: Path, sample: dict[str, Any]) -> None:
    with failing(number, kill=True):
        run(dense, target, calibration=sample)


def _run_and_tell(dense: Path, target: Path, sample: dict[str, Any], said: Path) -> None:
    stream = io.StringIO()
    run(dense, target, stream, calibration=sample)
    said.write_text(stream.getvalue())


def _stop_after_one_more(dense: Path, target: Path, sample: dict[str, Any]) -> None:
    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            if arguments[1].first == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        return step

    directory.step = stopping(directory.step)  # type: ignore[assignment]
    try:
        with stop_on_signal():
            run(dense, target, calibration=sample)
    except Stopped as stopped:
        told = stopped.kept.startswith("finished blocks kept in ") and ": 2; run" in stopped.kept
        os._exit(stopped.exit_code if told else 1)
