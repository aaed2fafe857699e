"""Samples, hidden states in memory and on disk, and what the walk shows each block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from axicon.compress.awq import AWQ
from axicon.compress.calibration import (
    Calibration,
    OnDisk,
    choose_windows,
    embedded,
    sequences,
    through,
)
from axicon.compress.directory import compress_blocks, write_calibrated
from axicon.compress.gptq import GPTQ
from axicon.compress.smooth_quant import SmoothQuant
from axicon.compress.walk import compress, step, walk
from axicon.compress.work import Work, work_folder
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.decoder import Block, Decoder
from axicon.protocols import Compressor
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = torch.randint(0, 97, (5, 24), generator=torch.Generator().manual_seed(1))


class TestSample:
    def test_whole_windows_without_repetition(self) -> None:
        found = choose_windows(torch.arange(103), 7, 10, 3, "the text")
        assert found.shape == (7, 10)
        assert {int(row[0]) for row in found} <= set(range(0, 100, 10))
        assert len({int(row[0]) for row in found}) == 7
        assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 10)) for row in found)
        assert torch.equal(found, choose_windows(torch.arange(103), 7, 10, 3, "the text"))
        assert not torch.equal(found, choose_windows(torch.arange(103), 7, 10, 4, "the text"))

    @pytest.mark.parametrize(("tokens", "says"), [
        (57, "the text has 57 tokens, which is 5 windows of 10 tokens and not 6: ask for windows=5"),
        (9, "which is 0 windows of 10 tokens and not 6: take a shorter window"), (0, "has 0 tokens"),
    ])  # fmt: skip
    def test_a_short_text_is_refused(self, tokens: int, says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            choose_windows(torch.arange(tokens), 6, 10, 0, "the text")

    def test_digest(self) -> None:
        digests = {Calibration(t).sha256 for t in (TOKENS, TOKENS + 1, TOKENS.view(1, -1))}
        assert len(digests) == 3
        assert Calibration(TOKENS).sha256 == Calibration(TOKENS.int(), dense=True).sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_on_disk_are_the_states(dtype: torch.dtype, tmp_path: Path) -> None:
    states = [torch.randn(1, 3, 5).to(dtype) for _ in range(4)]
    kept = OnDisk.write(tmp_path / "states", iter(states))
    (tmp_path / "states").rename(tmp_path / "moved")
    (tmp_path / "moved").unlink()
    assert len(kept) == 4
    assert all(torch.equal(a, b) for a, b in zip(kept, states, strict=True))
    assert torch.equal(kept[-1], states[3])
    assert [len(part) for part in (kept[1:3], kept[:1])] == [2, 1]
    with pytest.raises(IndexError):
        kept[4]


def test_states_cut_short_are_refused(tmp_path: Path) -> None:
    OnDisk.write(tmp_path / "states", [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="24 bytes, windows have 36"):
        OnDisk(tmp_path / "states", (3, 3), torch.float32)


@pytest.mark.parametrize("variant", ["llama_grouped", "opt", "opt_350m", "mistral_window", "neox", "qwen3"])
def test_blocks_one_by_one_are_the_model(variant: str, tmp_path: Path) -> None:
    saved(variant, tmp_path / "dense")
    model = checkpoint.load(tmp_path / "dense", dtype=torch.float32)
    states: Sequence[Tensor] = embedded(model, TOKENS)
    for block in model.blocks:
        assert isinstance(block, Block)
        states = through(block, states)
    got = torch.stack([model.head(x[0]) for x in states])
    assert torch.allclose(got, model.logits(TOKENS), atol=1e-4)


@dataclass
class Halves:
    """Halves every product and remembers what it was shown."""

    shown: list[list[Tensor]] = field(default_factory=list)
    needs_inputs = True

    def begin(self, model: Decoder) -> None: ...

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.shown.append([x.clone() for x in inputs])
        block.out.weight.mul_(0.5)
        block.down.weight.mul_(0.5)
        return through(block, inputs)

    def finish(self, model: Decoder) -> None: ...


@pytest.mark.parametrize("dense", [False, True])
def test_what_a_block_is_shown(dense: bool, tmp_path: Path) -> None:
    saved("llama_grouped", tmp_path / "dense")
    model = checkpoint.load(tmp_path / "dense", dtype=torch.float32)
    before, method = copy.deepcopy(model), Halves()
    compress(method, model, Calibration(TOKENS, dense=dense))
    shown = embedded(before, TOKENS)
    for index, (old, new) in enumerate(zip(before.blocks, model.blocks, strict=True)):
        assert isinstance(old, Block)
        assert isinstance(new, Block)
        assert all(torch.equal(a, b) for a, b in zip(method.shown[index], shown, strict=True))
        shown = [sequences(old if dense else new, x) for x in shown]


def test_the_error_of_a_block_is_against_the_dense_one(tmp_path: Path) -> None:
    saved("llama_grouped", tmp_path / "dense")
    model = checkpoint.load(tmp_path / "dense", dtype=torch.float32)
    before = copy.deepcopy(model)
    _, errors = step(Halves(), model, (), Calibration(TOKENS))
    x = embedded(before, TOKENS)[0]
    for error, old, new in zip(errors, before.blocks, model.blocks, strict=True):
        assert isinstance(old, Block)
        assert isinstance(new, Block)
        want = sequences(old, x)
        x = sequences(new, x)
        assert error == pytest.approx(float((x - want).norm() / want.norm()), rel=1e-5)


def test_states_that_are_no_numbers_name_the_block(tmp_path: Path) -> None:
    saved("llama_grouped", tmp_path / "dense")
    model = checkpoint.load(tmp_path / "dense", dtype=torch.float32)
    model.blocks[1].mlp_norm.weight[0] = torch.inf
    for dense in (False, True):
        with pytest.raises(AxiconError, match=r"the output of blocks\.1 holds NaN .* calibration window 0"):
            walk(Halves(), [copy.deepcopy(model)], Calibration(TOKENS, dense=dense))


def test_without_a_sample_it_does_not_start(tmp_path: Path) -> None:
    saved("llama_grouped", tmp_path / "dense")
    with pytest.raises(ValueError, match="needs calibration inputs"):
        compress(GPTQ(), checkpoint.load(tmp_path / "dense"))


@pytest.mark.parametrize("variant", ["llama_tied", "opt_350m", "opt_projected", "neox", "neox_tied"])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_block_by_block_from_disk_is_the_model_in_memory(
    variant: str, on_disk: bool, dense: bool, tmp_path: Path
) -> None:
    saved(variant, tmp_path / "dense")
    method = GPTQ(group=16, rules={"blocks.1.qkv": "skip", "*.down": {"bits": 8}})
    goes_on_from_the_folder(method, tmp_path, Calibration(TOKENS, dense=dense), on_disk)


@pytest.mark.parametrize("variant", ["llama_grouped", "opt", "neox"])
@pytest.mark.parametrize("method", [AWQ(group=16), SmoothQuant(pairs="all")], ids=["awq", "smooth_quant"])
def test_norms_and_biases_that_a_method_changes_are_kept(
    method: Compressor, variant: str, tmp_path: Path
) -> None:
    """The others of a block stay on the way; states are computed again from them."""
    saved(variant, tmp_path / "dense")
    goes_on_from_the_folder(method, tmp_path, Calibration(TOKENS), on_disk=False)
    dense, got = (checkpoint.load(tmp_path / name).state_dict() for name in ("dense", "small"))
    both = got.keys() & dense.keys()
    changed = {name.split(".", 2)[2] for name in both if not got[name].equal(dense[name])}
    norms = {"attention_norm.weight", "mlp_norm.weight"}
    biases = {name.replace("weight", "bias") for name in norms}
    assert changed >= norms
    assert changed >= (set() if variant == "llama_grouped" else biases)


def goes_on_from_the_folder(
    method: Compressor, folder: Path, calibration: Calibration, on_disk: bool
) -> None:
    """Block by block, with a new object after every one, and compare with the model compressed in memory."""
    want = compress(method, checkpoint.load(folder / "dense"), calibration)
    target, dtype = folder / "small", torch.bfloat16
    for done in range(3):
        work = Work(work_folder(target), {"plan": 1})
        assert (work.done, work.cleared) == (done, False)

        class Enough(Exception): ...

        def one(*_: object) -> None:
            raise Enough

        with pytest.raises(Enough):
            compress_blocks(
                method, folder / "dense", work, calibration, dtype=dtype, on_disk=on_disk, progress=one)
    kept = list(work.folder.rglob("states"))
    assert len(kept) == 0
    target.mkdir()
    write_calibrated(folder / "dense", target, work, dtype=dtype)
    got = checkpoint.load(target)
    assert got.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.state_dict().items())
    assert torch.equal(got.logits(TOKENS), want.logits(TOKENS))


def test_blocks_of_another_plan_are_removed(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", {"plan": 1})
    with work.block():
        pass
    work.keep_sample(TOKENS)
    again = Work(tmp_path / "work", {"plan": 1})
    assert again.done == 1
    sample = again.sample()
    assert sample is not None
    assert torch.equal(sample, TOKENS)
    other = Work(tmp_path / "work", {"plan": 2})
    assert (other.done, other.cleared, other.sample()) == (0, True, None)


def test_a_sample_of_another_plan_is_no_finished_block(tmp_path: Path) -> None:
    Work(tmp_path / "work", {"plan": 1}).keep_sample(TOKENS)
    other = Work(tmp_path / "work", {"plan": 2})
    assert (other.cleared, other.sample()) == (False, None)
