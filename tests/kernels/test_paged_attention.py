"""Attention over pages: the reference in torch against SDPA with masks, the Triton kernels against both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels import paged_attention
from axicon.kernels.paged_attention import Givers, Nodes, Pages, Tiles
from tests.kernels import gpu, paged
from tests.kernels.paged import CHAIN, Case

pytest.importorskip("triton", reason="Triton is for Linux only")
from axicon.kernels import paged_attention_triton

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = {
    "decode": Case(((40, 1), (5, 1), (0, 1), (300, 1)), layers=1),
    "trees": Case(((40, 5), (7, 9), (0, 3)), padding=True, layers=1),
    "full trees": Case(((20, 32), (90, 31)), share=1, groups=1, padding=True, layers=1),
    "sliding": Case(((300, 2), (550, 4)), window=37, width=80, groups=1),
    "chunk": Case(((290, 40), (3, 2)), kind=CHAIN, share=2, groups=1, width=128, layers=1),
    "first chunk": Case(((0, 70),), kind=CHAIN, share=4, groups=1, layers=1, ragged=False),
    "nothing evicted": Case(((290, 4), (3, 2)), ragged=False, window=100, layers=1),
    "many heads": Case(((30, 2),), share=20, groups=1, layers=1),
    "float16": Case(((20, 3),), width=16, dtype=torch.float16, layers=1),
}


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_GPU])])
def run(request: pytest.FixtureRequest) -> gpu.Run:
    return on_gpu if request.param == "gpu" else request.getfixturevalue("interpreter")


def moved(given: Any, where: str) -> Any:
    if isinstance(given, Tensor):
        return given.to(where)
    if isinstance(given, Pages | Nodes | Tiles | Givers):
        return type(given)(*(moved(one, where) for one in given))
    return tuple(moved(one, where) for one in given) if isinstance(given, tuple) else given


def on_gpu(function: Any, *given: object) -> Any:
    return moved(function(*(moved(one, "cuda") for one in given)), "cpu")


def copy(pages: Pages) -> Pages:
    return Pages(*(store.clone() for store in pages))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_sdpa_with_masks(run: gpu.Run, case: Case) -> None:
    layer, scale = case.layers - 1, case.width**-0.5
    staged = run(paged.staged, copy(case.pages), case.nodes, layer, case.k, case.v, True)
    pages = paged.staged(copy(case.pages), case.nodes, layer, case.k, case.v, False)
    for ours, theirs in zip(staged, pages, strict=True):
        assert torch.equal(ours[1:], theirs[1:])  # where padding lies, anything may be
    case.pages = pages
    want = case.oracle(layer)
    given = pages, case.nodes, layer, case.q[layer], scale, case.window
    limit = 1e-3 if case.dtype == torch.float16 else 1e-6
    lse = None
    for out, level in (paged_attention.attend(*given), run(paged.attended, *given)):
        assert error(out[: case.real], want) < limit
        assert out.dtype == case.dtype
        lse = level if lse is None else lse
        torch.testing.assert_close(level[: case.real], lse[: case.real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("carry", [1.0, 0.0, 0.7])
@pytest.mark.parametrize("name", ["decode", "trees", "sliding", "chunk"])
def test_slots_receive_what_committed_nodes_give(run: gpu.Run, name: str, carry: float) -> None:
    """Weighted column sums of the softmax over one path of every second row; other rows' slots stay."""
    case = CASES[name]
    layer, scale = case.layers - 1, case.width**-0.5
    case.stage(layer)
    _, lse_NH = paged_attention.attend(case.pages, case.nodes, layer, case.q[layer], scale, case.window)
    want, givers = case.pages.received_PS.clone().double(), case.givers(carry)
    for span, (_, entry, count, _) in zip(case.spans[::2], givers.jobs_J4.tolist(), strict=True):
        path = case.path(span)
        weights_T1 = givers.weights_C[entry : entry + count, None].double()
        for g in range(case.groups):
            shares, place = case.probabilities(layer, span, g)
            upto = place[: int(case.pages.lengths_RLG[span.row, layer, g]) + path[-1] + 1]
            given = (shares[:, path, : len(upto)] * weights_T1).sum((0, 1))
            want.view(-1)[upto] = carry * want.view(-1)[upto] + given
    windows = torch.tensor([case.window or 0], dtype=torch.int32)
    given = (case.nodes, givers, range(layer, layer + 1), case.q[layer:], lse_NH[None], scale, windows)
    pages = copy(case.pages)
    paged_attention.receive(pages, *given)
    for got in (pages.received_PS, run(paged.received, copy(case.pages), *given)):
        torch.testing.assert_close(got[1:].double(), want[1:], rtol=1e-5, atol=1e-5)


def test_all_layers_receive_at_once(run: gpu.Run) -> None:
    case = Case(((70, 3), (9, 4), (20, 2)), layers=3)
    lse = []
    for layer in range(3):
        case.stage(layer)
        lse.append(paged_attention.attend(case.pages, case.nodes, layer, case.q[layer], 0.125, None)[1])
    windows = torch.tensor([0, 30, 0], dtype=torch.int32)
    given = (case.nodes, case.givers(1.0), range(3), case.q, torch.stack(lse), 0.125, windows)
    pages = copy(case.pages)
    paged_attention.receive(pages, *given)
    torch.testing.assert_close(
        run(paged.received, copy(case.pages), *given)[1:], pages.received_PS[1:], rtol=1e-5, atol=1e-5
    )


def test_a_row_is_its_own(run: gpu.Run) -> None:
    """Bit for bit alone and in a batch: slots are cut among programs at fixed places."""
    together = Case(((600, 2), (33, 2), (290, 2)), layers=1, groups=1)
    out, _ = run(paged.attended, together.pages, together.nodes, 0, together.q[0], 0.125, None)
    for span in together.spans:
        packed = paged.pack([0] * 2, [paged.Span(span.row, 0, 2, span.positions, span.parents, False)],
                            [span.row], [together.rows[span.row][0]], together.share)  # fmt: skip
        _, _, nodes = packed.views(torch.from_numpy(packed.flat))
        q = together.q[0, span.start : span.stop].clone()
        alone, _ = run(paged.attended, together.pages, nodes, 0, q, 0.125, None)
        assert torch.equal(alone, out[span.start : span.stop])


def test_queries_and_keys_are_read_as_they_lie(run: gpu.Run) -> None:
    case = CASES["decode"]
    n, heads = len(case.q[0]), case.groups * case.share
    both = torch.randn(n, heads + 2 * case.groups, case.width, generator=torch.Generator().manual_seed(1))
    q, k, v = both.split([heads, case.groups, case.groups], 1)
    pages = run(paged.staged, copy(case.pages), case.nodes, 0, k, v, True)
    want = paged.staged(copy(case.pages), case.nodes, 0, k, v, False)
    assert torch.equal(pages.keys_PSK[1:], want.keys_PSK[1:])
    out, _ = run(paged.attended, want, case.nodes, 0, q, 0.125, None)
    spread, _ = run(
        paged.attended, want, case.nodes, 0, q.transpose(0, 2).contiguous().transpose(0, 2), 0.125, None
    )
    assert torch.equal(out, spread)
    assert error(out, paged_attention.attend(want, case.nodes, 0, q, 0.125, None)[0].double()) < 1e-6


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("width", [64, 80, 128])
def test_bfloat16(width: int) -> None:
    """Which the interpreter cannot multiply."""
    case = Case(
        ((400, 3), (1200, 16), (0, 1), (40, 200)), kind=CHAIN, width=width, layers=1, dtype=torch.bfloat16
    )
    case.stage(0)
    want = case.oracle(0)
    given = case.pages, case.nodes, 0, case.q[0], width**-0.5, None
    out, _ = on_gpu(paged.attended, *given)
    assert error(out, want) < 1e-2
    assert torch.equal(on_gpu(paged.attended, *given)[0], out)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "axicon.kernels.paged_attention_triton")
    monkeypatch.delattr("axicon.kernels.paged_attention_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(AxiconError, match=r"needs Triton.*pip install triton"):
        paged_attention.kernels()


INTS = ("positions_PS", "table_RLGM", "lengths_RLG", "tiles_T4", "ancestors_NW", "positions_N", "rows_N",
        "offsets_N", "jobs_J4", "nodes_C", "windows_L")  # fmt: skip
FLOATS = (
    "received_PS",
    "carry_J",
    "weights_C",
    "out",
    "lse",
    "part_STGMK",
    "level_STGM",
    "lse_NH",
    "lse_LNH",
)
STREAM = ("q_NHK", "k_NGK", "v_NGK", "keys_PSK", "values_PSK", "q_LNHK", "out_NHK")
COMMON: dict[str, Any] = {"GROUPS": 3, "SHARE": 3}
REST: dict[str, Any] = {"LAYERS": 30, "SLOTS": 16}


def pointers(dtype: str) -> dict[str, str]:
    return dict.fromkeys(INTS, "i32") | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(STREAM, dtype)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys come in pieces of 16 bytes, and the shared memory of small devices holds it all."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = paged_attention_triton
    kinds = [(80, "bf16", 16, 256, True), (128, "bf16", 64, 1024, False)]
    if capability == 80:
        kinds.append((128, "fp32", 32, 256, False))
    for width, dtype, rows, split, window in kinds:
        shape = {"WIDTH": width, "WIDE": 128, "ROWS": rows}
        here = {"WORDS": 8 if split == 1024 else 1, "SCALE": width**-0.5, "WINDOW": window, "ALONE": False,
                "SPLIT": split, "BLOCK": 32 if dtype == "fp32" else 64}  # fmt: skip
        ptx = gpu.compiled(
            kernels.attend_part,
            capability,
            pointers(dtype),
            COMMON | REST | shape | here,
            99 << 10,
            num_warps=4 if rows <= 32 else 8,
            num_stages=2 if dtype == "fp32" else 3,
        )
        assert "cp.async.cg.shared.global" in ptx
        assert ("mma" in ptx) == (dtype == "bf16")
    shape = {"WIDTH": 64, "WIDE": 64}
    gpu.compiled(
        kernels.merge, capability, pointers("bf16"), COMMON | shape | {"SPLITS": 8, "ROWS": 16}, num_warps=4
    )
    gpu.compiled(
        kernels.stage_node,
        capability,
        pointers("bf16"),
        REST | shape | {"GROUPS": 3, "HEADS": 4},
        num_warps=4,
    )
    here = {"WORDS": 1, "SCALE": 0.125, "ROWS": 16, "BLOCK": 64}
    ptx = gpu.compiled(
        kernels.receive_slots, capability, pointers("bf16"), COMMON | REST | shape | here, num_warps=4
    )
    assert "mma" in ptx


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes here")
def test_the_benchmark_wants_a_gpu() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "attention_gpu: no CUDA device here; this benchmark measures nothing else\n"
