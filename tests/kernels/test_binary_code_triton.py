"""The Triton products of binary codes against `BinaryCodeLinear` and the lookup in torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.kernels.binary_code import lookup_product
from axicon.model.binary_code import BinaryCodeLinear
from tests.kernels import gpu

pytest.importorskip("triton", reason="Triton is for Linux only")
from axicon.kernels import binary_code_triton, group_int_triton

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Product = Callable[[BinaryCodeLinear, Tensor], Tensor]


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_GPU])])
def product(request: pytest.FixtureRequest) -> Product:
    run = gpu.on_gpu if request.param == "gpu" else request.getfixturevalue("interpreter")
    return lambda p, x: run(
        binary_code_triton.binary_code_linear, x, p.planes, p.alpha, p.offset, p.bias, p.group)


def layer(
    bits: int = 3, group: int = 64, n: int = 70, k: int = 192, *, offset: bool = True, bias: bool = True
) -> BinaryCodeLinear:
    made = torch.Generator().manual_seed(bits)
    count = k // group if group else 1
    return BinaryCodeLinear.from_codes(
        torch.randint(0, 2**bits, (n, k), generator=made), torch.rand(n, count, bits, generator=made).half(),
        torch.randn(n, count, generator=made).half() if offset else None,
        torch.randn(n, generator=made) if bias else None, group=group,
    )  # fmt: skip


def rows(m: int, k: int = 192) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def close(got: Tensor, packed: BinaryCodeLinear, x: Tensor) -> bool:
    want = x.double() @ packed.unpack().double().T
    if packed.bias is not None:
        want += packed.bias.double()
    return bool((got.double() - want).norm() / want.norm() < (1e-5 if x.dtype == torch.float32 else 6e-3))


SHAPES = [(64, 192), (128, 256), (32, 192), (96, 192), (16, 160), (8, 40), (0, 192), (0, 100), (12, 60)]


@pytest.mark.parametrize(("group", "k"), SHAPES)
@pytest.mark.parametrize("m", [2, 5])
def test_equals_the_reference(product: Product, m: int, group: int, k: int) -> None:
    """By lookup and by weights: groups of words, of parts of one, whole rows, and of no whole bytes."""
    packed = layer(3, group, k=k, offset=group != 32, bias=k != 192)
    x = rows(m, k)
    assert close(product(packed, x), packed, x)


@pytest.mark.parametrize("m", [1, 3, 4, 17])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes_and_rows(product: Product, bits: int, m: int) -> None:
    packed, x = layer(bits), rows(m)
    y = product(packed, x)
    assert close(y, packed, x)
    looked_up = lookup_product(x, packed.planes, packed.alpha, packed.offset, 64) + packed.bias
    assert torch.allclose(y, looked_up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [1, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(
    request: pytest.FixtureRequest, product: Product, dtype: torch.dtype, m: int
) -> None:
    if dtype == torch.bfloat16 and m > binary_code_triton.FEW_ROWS:
        gpu.skip_bfloat16(request)
    packed, x = layer(), rows(m).to(dtype)
    y = product(packed, x)
    assert y.dtype == dtype
    assert close(y, packed, x)


def test_slices_are_read_as_they_are(product: Product) -> None:
    packed = layer().shard(1, 2, "out")
    assert not packed.planes.is_contiguous()
    x = rows(2, 400)[:, 100:292]
    assert close(product(packed, x), packed, x)
    assert close(product(packed, x.T.contiguous().T), packed, x)


@pytest.mark.parametrize("m", [1, 8])
def test_inputs_are_split_among_programs(product: Product, m: int) -> None:
    packed, x = layer(n=40, k=1024), rows(m, 1024)
    assert close(product(packed, x), packed, x)


def test_no_rows(product: Product) -> None:
    assert product(layer(), torch.empty(0, 192)).shape == (0, 70)


def test_no_gradient() -> None:
    p, x = layer(), rows(1).requires_grad_()
    with pytest.raises(AxiconError, match="inference_mode"):
        binary_code_triton.binary_code_linear(x, p.planes, p.alpha, p.offset, p.bias, 64)


def test_the_layer_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = layer()
    x: Any = SimpleNamespace(is_cuda=True, requires_grad=False)
    monkeypatch.setattr(binary_code_triton, "binary_code_linear", lambda *given: given)
    assert packed(x) == (x, packed.planes, packed.alpha, packed.offset, packed.bias, 64)
    monkeypatch.delitem(sys.modules, "axicon.kernels.binary_code_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(AxiconError, match=r"need Triton .* pip install triton"):
        packed(x)


POINTERS = {
    "x_MK": "bf16", "table_MCV": "fp32", "words_WQN": "i32", "alpha_GQN": "fp16", "offset_GN": "fp16",
    "bias_N": "bf16", "partial_SMN": "fp32", "y_MN": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = binary_code_triton
    common = {"COUNT": 128, "BITS": 3, "GROUP": 64, "WITHIN": True, "OFFSET": True}
    gpu.compiled(kernels.tabulate, capability, POINTERS, {"INPUTS": 4096, "CHUNKS": 16}, num_warps=4)
    looking = {"SPLIT_STEPS": 8, "WORDS": 2, "ROWS": 1, "OUTPUTS": kernels.LOOKUP_OUTPUTS}
    gpu.compiled(kernels.lookup, capability, POINTERS, common | looking, num_warps=4)
    tiles = group_int_triton.SMALL
    shape = {"ROWS": tiles.rows, "COLUMNS": tiles.outputs, "DEPTH": 64}
    rest = {"INPUTS": 4096, "BIAS": True, "SPLIT_STEPS": 64}
    ptx = gpu.compiled(
        kernels.product, capability, POINTERS, common | shape | rest, num_warps=tiles.warps,
        num_stages=tiles.stages)
    assert "mma" in ptx


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes here")
def test_the_benchmark_wants_a_gpu() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "few_bits_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "few_bits_gpu: no CUDA device here; this benchmark measures nothing else\n"
