"""The Triton product of kept weights against `TiledSparseLinear` on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from axicon.model.tiled_sparse import COLUMNS, TiledSparseLinear
from tests.kernels import gpu

pytest.importorskip("triton", reason="Triton is for Linux only")
from axicon.kernels import sparse_triton

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Product = Callable[[TiledSparseLinear, Tensor], Tensor]


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_GPU])])
def product(request: pytest.FixtureRequest) -> Product:
    run = gpu.on_gpu if request.param == "gpu" else request.getfixturevalue("interpreter")
    return lambda p, x: run(sparse_triton.tiled_sparse_linear, x, p.bitmap, p.start, p.values, p.bias)


def layer(density: float, outputs: int = 70, inputs: int = 300, *, bias: bool = True) -> TiledSparseLinear:
    made = torch.Generator().manual_seed(outputs)
    mask = torch.rand(outputs, inputs, generator=made) < density
    added = torch.randn(outputs, generator=made) if bias else None
    return TiledSparseLinear.from_weight(torch.randn(outputs, inputs, generator=made), mask, added)


def rows(count: int, inputs: int = 300) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


def close(got: Tensor, packed: TiledSparseLinear, x: Tensor) -> bool:
    want = x.double() @ packed.unpack().double().T
    if packed.bias is not None:
        want += packed.bias.double()
    limit = 1e-5 if x.dtype == torch.float32 else 4e-3
    return bool((got.double() - want).norm() <= limit * want.norm())


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_any_density_is_whole(product: Product, density: float) -> None:
    packed = layer(density)
    assert close(product(packed, rows(3)), packed, rows(3))


@pytest.mark.parametrize("count", [1, 16, 17, 70])
@pytest.mark.parametrize("inputs", [100, 1024])
def test_row_counts_and_inputs_that_are_split(product: Product, count: int, inputs: int) -> None:
    packed, x = layer(0.25, inputs=inputs, bias=count != 16), rows(count, inputs)
    assert close(product(packed, x), packed, x)


def test_half_precision_and_rows_that_lie_apart(product: Product) -> None:
    packed = layer(0.3, bias=False)
    packed.values = packed.values.half()
    x = rows(5, 600)[:, ::2].half()
    assert close(product(packed, x), packed, x)


def test_no_rows(product: Product) -> None:
    assert product(layer(0.2), rows(0)).shape == (0, 70)


def test_tiles_are_as_stored() -> None:
    assert sparse_triton.COLUMNS == COLUMNS
