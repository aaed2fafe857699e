"""Statistics shared between runs: equal bytes with and without, one computation for many, damage, room."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jobs.calibration
from axicon.compress import COMPRESSORS, calibration, walk
from axicon.compress.calibration import Calibration
from axicon.compress.chain import Chain
from axicon.compress.directory import compress_blocks, write_calibrated
from axicon.compress.gptq import GPTQ
from axicon.compress.shared import Shared, SharedFolder
from axicon.compress.sparse_gpt import SparseGPT
from axicon.compress.work import Work
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.artefact import read_manifest
from axicon.model.decoder import Block
from axicon.protocols import Compressor
from axicon.recipe import CompressRecipe
from jobs import compress
from jobs.calibration import shared_set
from jobs.progress import Reporter
from tests.contracts.methods import made
from tests.faults import failures
from tests.parity.variants import saved
from tests.services.fake_engine import byte_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = torch.randint(0, 97, (5, 24), generator=torch.Generator().manual_seed(1))
SAMPLE = Calibration(TOKENS, dense=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "awq": {"group": 16, "tokens": 24},
    "binary_code": {"bits": 2, "group": 16, "compensate": True, "rounds": 1},
    "gptq": {"group": 16, "act_order": True},
    "smooth_quant": {"pairs": "all"},
}
LEFT_OUT = ("slice_gpt", "reconstruct")
"""Slicing is refused under dense inputs; reconstruction adds up nothing, and trains for seconds."""
CASES = {name: made(name, **SETTINGS.get(name, {})) for name in COMPRESSORS if name not in LEFT_OUT}
CALIBRATED = [name for name, method in CASES.items() if method.needs_inputs]
"""Every other method that looks at data."""
LATER: dict[str, Compressor] = {
    "true_sequential": GPTQ(group=16, true_sequential=True),
    "chain": Chain(("sparse_gpt", "gptq"), (SparseGPT(), GPTQ(group=16))),
    "rules": GPTQ(group=16, rules={"blocks.0.*": "skip", "*.down": {"bits": 8}}),
}
"""That look at a block again once it is changed, or at a part of it."""
WINDOWS, LAYERS = 5, 3


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    saved("llama_grouped", tmp_path / "dense")
    return tmp_path / "dense"


def opened(folder: Path, dense: Path, sample: Calibration = SAMPLE, most: int = 1 << 30) -> Shared:
    return shared_set(SharedFolder(folder, most), dense, sample, torch.float32)


def result(dense: Path, out: Path, method: Compressor, folder: Path | None, **more: Any) -> str:
    """The digest of what a method makes."""
    out.mkdir()
    work = Work(out.with_suffix(".work"), {})
    with contextlib.ExitStack() as ends:
        one = (
            None if folder is None else ends.enter_context(contextlib.closing(opened(folder, dense, **more)))
        )
        compress_blocks(method, dense, work, SAMPLE, dtype=torch.float32, on_disk=False, shared=one)
    write_calibrated(dense, out, work, dtype=torch.float32)
    return checkpoint.digest(out)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks, for every window that went through one."""
    seen: list[int] = []
    real = calibration.sequences

    def watched(block: Block, x_BTD: Tensor) -> Tensor:
        seen.append(block.index)
        return real(block, x_BTD)

    monkeypatch.setattr(calibration, "sequences", watched)
    monkeypatch.setattr(walk, "sequences", watched)
    return seen


class TestBytes:
    @pytest.mark.parametrize("name", [*CALIBRATED, *LATER])
    def test_are_equal_with_and_without(
        self, name: str, dense: Path, tmp_path: Path, passes: list[int]
    ) -> None:
        method, folder = (CASES | LATER)[name], tmp_path / "shared"
        want = result(dense, tmp_path / "alone", method, None)
        passes.clear()
        assert result(dense, tmp_path / "first", method, folder) == want
        first = len(passes)
        passes.clear()
        assert result(dense, tmp_path / "second", method, folder) == want
        assert first >= len(passes) + WINDOWS * (LAYERS - 1)
        # One window of dense and compressed output is still looked at, by which a block's error is known.
        more = {"awq": 1, "chain": WINDOWS, "true_sequential": 3 * WINDOWS}.get(name, 0)
        assert [passes.count(i) for i in range(LAYERS)] == [2 + more] * LAYERS

    def test_are_those_of_other_methods_too(self, dense: Path, tmp_path: Path, passes: list[int]) -> None:
        """GPTQ reads what SparseGPT has left, and adds nothing."""
        folder = tmp_path / "shared"
        want = result(dense, tmp_path / "alone", CASES["gptq"], None)
        result(dense, tmp_path / "before", CASES["sparse_gpt"], folder)
        passes.clear()
        there = sorted(folder.rglob("*.safetensors"))
        assert result(dense, tmp_path / "after", CASES["gptq"], folder) == want
        assert passes == [0, 0, 1, 1, 2, 2]
        assert there == sorted(folder.rglob("*.safetensors"))

    def test_of_several_processes_at_once_are_those_of_one(self, dense: Path, tmp_path: Path) -> None:
        names = ("gptq", "awq", "wanda")
        want = {name: result(dense, tmp_path / name, CASES[name], None) for name in names}
        context = multiprocessing.get_context("fork")
        found = context.SimpleQueue()

        def make(name: str, number: int) -> None:
            torch.set_num_threads(1)
            out = tmp_path / f"{name}-{number}"
            found.put((name, result(dense, out, CASES[name], tmp_path / "shared")))

        processes = [context.Process(target=make, args=(name, i)) for name in names for i in range(2)]
        for one in processes:
            one.start()
        for one in processes:
            one.join()
        assert [one.exitcode for one in processes] == [0] * 6
        assert sorted(found.get() for _ in processes) == sorted([*want.items()] * 2)
        assert not list((tmp_path / "shared").rglob(".*.tmp"))

    def test_a_stopped_run_goes_on_with_what_is_there(self, dense: Path, tmp_path: Path) -> None:
        method, folder = CASES["gptq"], tmp_path / "shared"
        want = result(dense, tmp_path / "alone", method, None)
        out = tmp_path / "stopped"
        work = Work(out.with_suffix(".work"), {})

        class Stop(Exception): ...

        def stop(done: int, total: int, note: str) -> None:
            raise Stop

        with contextlib.closing(opened(folder, dense)) as one, pytest.raises(Stop):
            compress_blocks(
                method, dense, work, SAMPLE, dtype=torch.float32, on_disk=False, shared=one, progress=stop
            )
        assert result(dense, out, method, folder) == want

    @pytest.mark.parametrize("other", [TOKENS + 1, TOKENS[:4]])
    def test_another_sample_is_another_set(self, other: Tensor, dense: Path, tmp_path: Path) -> None:
        names = []
        for sample in (SAMPLE, Calibration(other, dense=True)):
            with contextlib.closing(opened(tmp_path / "shared", dense, sample)) as one:
                names.append(one.name)
        assert len(set(names)) == 2


def numbers(value: float) -> list[tuple[str, Tensor]]:
    return [("a", torch.full((1000,), value)), ("b", torch.arange(3))]


def no_need() -> list[tuple[str, Tensor]]:
    raise AssertionError("it is there")


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> SharedFolder:
        return SharedFolder(tmp_path / "shared", 1 << 20)

    def test_an_entry_is_made_once(self, folder: SharedFolder) -> None:
        for found in (folder.entry("x", lambda: numbers(1), 4000), folder.entry("x", no_need, 4000)):
            assert found[0].tolist() == [1] * 1000
            assert found.tensors()["b"].tolist() == [0, 1, 2]

    @pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
    @pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
    def test_damage_is_seen_and_made_good(self, file: str, damage: str, folder: SharedFolder) -> None:
        folder.entry("x", lambda: numbers(1), 4000)
        path = folder.path / "x" / file
        content = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes(content[:-1] + b"?" if damage == "changed" else content[: len(content) // 2])
        assert folder.read("x") is None
        assert folder.entry("x", lambda: numbers(2), 4000)[0][0] == 2
        assert folder.entry("x", no_need, 4000)[0][0] == 2

    def test_the_second_to_ask_waits_for_the_first(self, folder: SharedFolder) -> None:
        began = threading.Event()

        def slowly() -> list[tuple[str, Tensor]]:
            began.set()
            time.sleep(0.1)
            return numbers(1)

        first = threading.Thread(target=lambda: folder.entry("x", slowly, 4000))
        first.start()
        began.wait()
        found = folder.entry("x", no_need, 4000)
        first.join()
        assert found[0][0] == 1

    def test_who_is_killed_in_the_middle_leaves_nothing(self, folder: SharedFolder) -> None:
        def half() -> Iterator[tuple[str, Tensor]]:
            yield numbers(1)[0]
            os._exit(9)

        child = multiprocessing.get_context("fork").Process(target=lambda: folder.entry("x", half, 4000))
        child.start()
        child.join()
        assert child.exitcode == 9
        assert folder.entry("x", lambda: numbers(2), 4000)[0][0] == 2
        assert not list(folder.path.glob(".*.tmp"))

    def test_a_disk_that_fails_anywhere_leaves_all_or_nothing(self, folder: SharedFolder) -> None:
        def action() -> None:
            folder.entry("x", lambda: numbers(1), 4000)

        for raised in failures(action):
            assert isinstance(raised, AxiconError)
            found = folder.read("x")
            assert found is None or found[0].tolist() == [1] * 1000
            shutil.rmtree(folder.path / "x", ignore_errors=True)
        folder.entry("x", no_need, 4000)

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(AxiconError, match=r"calibration\.shared=.*/file: cannot be written"):
            SharedFolder(tmp_path / "file", 1)


class TestRoom:
    def test_sets_that_nobody_has_open_go_first(self, dense: Path, tmp_path: Path) -> None:
        samples = [Calibration(TOKENS + i, dense=True) for i in range(3)]
        places = []
        for sample in samples[:2]:
            with contextlib.closing(opened(tmp_path / "shared", dense, sample)) as one:
                places.append(one.folder.path / one.name)
                one.folder.write(f"{one.name}/x", numbers(1), 4000)
        os.utime(places[1] / "manifest.json", (0, 0))  # the longest unused
        held = opened(tmp_path / "shared", dense, samples[0])
        size = sum(path.stat().st_size for path in (tmp_path / "shared").rglob("*.*") if path.is_file())
        room = SharedFolder(tmp_path / "shared", size + 1000)
        room.make_room(1000)
        assert all(place.exists() for place in places)
        room.make_room(2000)
        assert [place.exists() for place in places] == [True, False]
        with pytest.raises(AxiconError, match=r"shared_gib=.*; allow more, take a smaller sample"):
            room.make_room(size)
        assert places[0].exists()
        held.close()
        room.make_room(size + 1000)
        assert not places[0].exists()

    def test_a_full_disk_is_known_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = SharedFolder(tmp_path / "shared", 1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 7, 3))
        folder.make_room(3)
        with pytest.raises(AxiconError, match="are free on that disk; free some or choose another folder"):
            folder.make_room(4)

    def test_too_little_is_known_before_the_work(self, dense: Path, tmp_path: Path) -> None:
        with pytest.raises(AxiconError, match="GiB more would be"):
            opened(tmp_path / "shared", dense, most=5 * 24 * 4)


class TestCommand:
    """`axicon compress` with `calibration.shared`."""

    def run(self, model: Path, out: Path, **sample: Any) -> str:
        said = io.StringIO()
        recipe = CompressRecipe.model_validate({
            "model": str(model), "out": out, "threads": 1, "measure": False,
            "compressor": {"method": "gptq", "group": 16},
            "calibration": {"windows": 4, "window": 32, "inputs": "dense", **sample},
        })  # fmt: skip
        compress.run(recipe, Reporter(said))
        return said.getvalue()

    @pytest.mark.parametrize("written", [True, False])
    def test_neither_bytes_nor_manifest_tell(
        self, written: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sample too is shared, read from a text or written by the model."""
        byte_tokenizer().save_pretrained(dense)
        (tmp_path / "prose.txt").write_text("THE LAMP WENT OUT. SHE WAITED FOR THE DOOR. " * 20)
        sample = {} if written else {"text": str(tmp_path / "prose.txt")}
        self.run(dense, tmp_path / "alone", **sample)
        self.run(dense, tmp_path / "first", shared=tmp_path / "shared", **sample)
        for name in ("tokenise", "written"):
            monkeypatch.setattr(jobs.calibration, name, no_need)
        self.run(dense, tmp_path / "second", shared=tmp_path / "shared", **sample)
        manifests = [read_manifest(tmp_path / name) or {} for name in ("alone", "first", "second")]
        assert manifests[0] | {"name": ""} == manifests[1] | {"name": ""} == manifests[2] | {"name": ""}

    def test_sequential_shares_the_sample_and_says_so(self, dense: Path, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(dense)
        said = self.run(dense, tmp_path / "out", shared=tmp_path / "shared", inputs="sequential")
        assert "inputs=sequential the sample is all that runs have in common" in said
        names = [path.name.partition("-")[0] for path in (tmp_path / "shared").iterdir() if path.is_dir()]
        assert names == ["sample"]
