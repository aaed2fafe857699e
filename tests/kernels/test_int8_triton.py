"""The Triton kernels of LLM.int8() against the arithmetic of `Int8Linear.forward`.

Without a GPU they run in Triton's interpreter. It has to be switched on before Triton is imported, so it has
a process of its own, and no other test meets it. That they compile for real GPUs is a test apart, since the
interpreter accepts more than the compiler does.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.model.int8 import Int8Linear

pytest.importorskip("triton", reason="Triton is for Linux only")
from axicon.kernels import int8_triton

Run = Callable[[Int8Linear, Tensor], Tensor]
SHAPES = [(n, k) for n in (64, 100) for k in (64, 200)]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()  # starts the process while the variable is set
    with pool:
        yield lambda packed, x: pool.submit(
            int8_triton.int8_linear, x, packed.qweight, packed.absmax, packed.bias, packed.threshold
        ).result(60)


def on_gpu(packed: Int8Linear, x: Tensor) -> Tensor:
    gpu = Int8Linear(*(None if b is None else b.cuda() for b in (packed.qweight, packed.absmax, packed.bias)),
                     packed.threshold)  # type: ignore[arg-type]  # fmt: skip
    return gpu(x.cuda()).cpu()


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_GPU])])
def run(request: pytest.FixtureRequest) -> Run:
    return on_gpu if request.param == "gpu" else request.getfixturevalue("interpreter")


def layer(n: int = 100, k: int = 200, bias: bool = True, threshold: float = 6.0) -> Int8Linear:
    torch.manual_seed(n + k)
    linear = nn.Linear(k, n, bias=bias).requires_grad_(False)
    linear.weight[7] = 0
    return Int8Linear.from_linear(linear, threshold)


def rows(m: int, k: int, outliers: bool, seed: int = 0) -> Tensor:
    """Outliers in two columns that the rows share in part, and scattered ones of their own."""
    generator = torch.Generator().manual_seed(m + k + seed)
    x = torch.randn(m, k, generator=generator)
    if outliers:
        x[:, [3, k - 1]] *= 20
        x[torch.rand(m, k, generator=generator) < 0.02] *= 30
    return x


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 3, 16, 33])
def test_equals_the_reference(run: Run, m: int, n: int, k: int) -> None:
    """Without outliers bit for bit; with them up to the order in which float32 sums are taken."""
    plain, biased = layer(n, k, bias=False), layer(n, k, bias=True)
    first, second = (plain, biased) if n == 64 else (biased, plain)
    x = rows(m, k, outliers=False)
    assert torch.equal(run(first, x), first(x))
    x = rows(m, k, outliers=True)
    assert (x.abs() >= 6).any()
    assert torch.allclose(run(second, x), second(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("threshold", [0, 1e30])
def test_without_an_outlier_path(run: Run, threshold: float) -> None:
    packed = layer(threshold=threshold)
    x = rows(5, 200, outliers=True)
    assert torch.equal(run(packed, x), packed(x))


def test_every_entry_may_be_an_outlier(run: Run) -> None:
    packed = layer(threshold=1e-6)
    x = rows(18, 200, outliers=False)
    assert torch.allclose(run(packed, x), x @ packed.unpack().T + packed.bias, atol=1e-5)


def test_zero_rows_and_rows_of_outliers(run: Run) -> None:
    packed = layer()
    x = torch.zeros(3, 200)
    x[1] = 50.0
    x[2, 0] = -6.0  # the threshold itself is an outlier
    x[2, 1:9] = 0.01  # beside an ordinary entry of 6, these would become zeros
    y = run(packed, x)
    assert torch.equal(run(packed, x[2:])[0], y[2])
    assert torch.equal(y[0], packed.bias)
    assert torch.allclose(y[1:], x[1:] @ packed.unpack().T + packed.bias, rtol=1e-5, atol=1e-4)
    assert torch.equal(y[:, 7], packed.bias[7].expand(3))  # type: ignore[index]


def test_a_row_is_its_own(run: Run) -> None:
    """Bit for bit alone, in a small batch, and in the larger tiles among rows with other outliers."""
    packed = layer()
    x = rows(129, 200, outliers=True)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(1))
    together = run(packed, x)
    assert torch.equal(run(packed, x[order]), together[order])
    assert torch.equal(run(packed, x[20:60]), together[20:60])
    assert torch.equal(run(packed, x[119:]), together[119:])
    assert all(torch.equal(run(packed, x[i : i + 1])[0], together[i]) for i in range(0, 129, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(run: Run, dtype: torch.dtype) -> None:
    """A half step of the dtype on the GPU, a whole one in the interpreter, which cuts bits off."""
    packed = layer()
    x = rows(9, 200, outliers=True).to(dtype)
    x[4] = x[4, 0] / 4
    x[4, 9] = x[4, 0] * 2  # halves of the row's largest magnitude lie on ties
    y = run(packed, x)
    assert y.dtype == dtype
    exact = packed(x.float())
    assert ((y.float() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-4).all()


def test_slices_are_read_where_they_lie(run: Run) -> None:
    packed = layer(64, 200).shard(1, 2, "in")
    assert not packed.qweight.is_contiguous()
    x = rows(4, 200, outliers=True)[:, 100:]
    assert torch.allclose(run(packed, x), packed(x), rtol=1e-5, atol=2e-5)
    assert torch.allclose(run(packed, x.T.contiguous().T), packed(x), rtol=1e-5, atol=2e-5)


def test_extreme_sums_are_exact(run: Run) -> None:
    packed = Int8Linear(torch.full((64, 1536), 127, dtype=torch.int8), torch.full((64,), 127.0), None, 0)
    x = torch.full((2, 1536), -127.0)
    x[1, 1] = 126.0
    sums = x.long() @ packed.qweight.long().T
    assert torch.equal(run(packed, x), sums.float())


def test_what_is_not_finite_stays_visible(run: Run) -> None:
    packed = layer()
    x = rows(3, 200, outliers=True)
    x[0, 5], x[2, 5] = float("nan"), float("inf")
    y = run(packed, x)
    assert y[0].isnan().all()
    assert torch.equal(y[1], run(packed, x[1:2])[0])
    assert not y[2].isfinite().any()


def test_no_rows(run: Run) -> None:
    assert run(layer(), torch.empty(0, 200)).shape == (0, 100)


def test_refusals() -> None:
    packed = layer(64, 64)
    x = rows(1, 64, outliers=False).requires_grad_()
    with pytest.raises(AxiconError, match="inference_mode"):
        int8_triton.int8_linear(x, packed.qweight, packed.absmax, None, 6.0)
    wide = torch.empty(1, int8_triton.MAX_INPUTS + 1, dtype=torch.int8, device="meta")
    with pytest.raises(AxiconError, match="overflow"):
        int8_triton.int8_linear(wide.float(), wide, packed.absmax, None, 6.0)


def test_the_layer_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = layer()
    x: Any = SimpleNamespace(is_cuda=True, requires_grad=False)
    monkeypatch.setattr(int8_triton, "int8_linear", lambda *given: given)
    assert packed(x) == (x, packed.qweight, packed.absmax, packed.bias, 6.0)
    monkeypatch.delitem(sys.modules, "axicon.kernels.int8_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(AxiconError, match=r"need Triton .* pip install triton"):
        packed(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes here")
def test_the_benchmark_wants_a_gpu() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "int8_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "int8_gpu: no CUDA device here; this benchmark measures nothing else\n"


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, with integer tensor-core instructions. The assembler comes with Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"INPUTS": 4096, "OUTLIERS": True}
    compiled(int8_triton.quantise_rows, capability, sizes | {"WORDS": 128}, num_warps=4)
    sizes_of_list = {"INPUTS": 4096, "TILE_ROWS": 16, "ROWS": 16, "WORDS": 128}
    compiled(int8_triton.list_columns, capability, sizes_of_list, num_warps=8)
    for tiles in (int8_triton.DECODE, int8_triton.SMALL):
        shape = {"ROWS": tiles.rows, "COLUMNS": tiles.outputs, "DEPTH": tiles.inputs}
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        ptx = compiled(int8_triton.product, capability, sizes | {"BIAS": True} | shape, **options)
        assert "s32.s8.s8" in ptx
        assert ("wgmma" in ptx) == (capability == 90 and tiles.rows >= 64)


POINTERS = {
    "x_MK": "bf16", "y_MN": "bf16", "bias_N": "bf16", "codes_MK": "i8", "qweight_NK": "i8", "step_M": "fp32",
    "absmax_N": "fp32", "bitmap_MG": "i32", "columns_TL": "i32", "counts_T": "i32",
}  # fmt: skip


def compiled(kernel: Any, capability: int, constants: dict[str, Any], **options: int) -> str:
    """The PTX of a kernel that went through the assembler."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants
        else f"*{POINTERS[name]}" if name in POINTERS
        else "fp32" if name == "threshold" else "i32"
        for name in names
    }  # fmt: skip
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in POINTERS or "stride" in n}
    source = triton.compiler.ASTSource(
        kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned
    )
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    assert len(made.asm["cubin"]) > 1000
    return str(made.asm["ptx"])
