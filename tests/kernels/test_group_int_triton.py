"""The Triton product of group codes against `GroupIntLinear` on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.group_int import GroupIntLinear
from tests.kernels import gpu

pytest.importorskip("triton", reason="Triton is for Linux only")
from axicon.kernels import group_int_triton, partial_sums

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Product = Callable[[GroupIntLinear, Tensor], Tensor]


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_GPU])])
def product(request: pytest.FixtureRequest) -> Product:
    run = gpu.on_gpu if request.param == "gpu" else request.getfixturevalue("interpreter")
    return lambda p, x: run(
        group_int_triton.group_int_linear, x, p.qweight, p.scale, p.zero, p.bias, p.bits, p.group)


def layer(
    bits: int = 4, group: int = 64, n: int = 70, k: int = 192, *, zero: bool = True, bias: bool = True
) -> GroupIntLinear:
    made = torch.Generator().manual_seed(bits)
    count = k // group if group else 1
    return GroupIntLinear.from_codes(
        torch.randint(0, 2**bits, (n, k), generator=made), torch.rand(n, count, generator=made).half(),
        torch.randint(0, 2**bits, (n, count), generator=made) if zero else None,
        torch.randn(n, generator=made) if bias else None, bits=bits, group=group,
    )  # fmt: skip


def rows(m: int, k: int = 192) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def close(got: Tensor, packed: GroupIntLinear, x: Tensor) -> bool:
    want = x.double() @ packed.unpack().double().T
    if packed.bias is not None:
        want += packed.bias.double()
    return bool((got.double() - want).norm() / want.norm() < (1e-5 if x.dtype == torch.float32 else 4e-3))


SHAPES = [(64, 192), (128, 256), (16, 192), (24, 192), (0, 192), (0, 100), (8, 40)]


@pytest.mark.parametrize(("group", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8, 3])
def test_equals_the_reference(product: Product, bits: int, group: int, k: int) -> None:
    """Groups as wide as a tile, wider, narrower, not fitting it, whole rows; inputs that fill no tile."""
    packed = layer(bits, group, k=k, zero=group != 64, bias=k != 192)
    x = rows(3, k)
    assert close(product(packed, x), packed, x)


@pytest.mark.parametrize("m", [1, 16, 17, 130])
def test_any_number_of_rows(product: Product, m: int) -> None:
    packed, x = layer(), rows(m)
    y = product(packed, x)
    assert close(y, packed, x)
    assert torch.allclose(y, packed(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 5, 6, 7])
def test_other_bits(product: Product, bits: int) -> None:
    packed, x = layer(bits), rows(2)
    assert close(product(packed, x), packed, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(request: pytest.FixtureRequest, product: Product, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        gpu.skip_bfloat16(request)
    packed, x = layer(), rows(5).to(dtype)
    y = product(packed, x)
    assert y.dtype == dtype
    assert close(y, packed, x)


def test_slices_are_read_where_they_lie(product: Product) -> None:
    packed = layer().shard(1, 3, "in")
    assert not packed.qweight.is_contiguous()
    x = rows(4)[:, 64:128]
    assert close(product(packed, x), packed, x)
    assert close(product(packed, x.T.contiguous().T), packed, x)


def test_inputs_are_split_among_programs(product: Product) -> None:
    packed, x = layer(n=40, k=1024), rows(2, 1024)
    assert partial_sums.splits_for(1, 1024 // 64) == 8
    assert close(product(packed, x), packed, x)


def test_no_rows(product: Product) -> None:
    assert product(layer(), torch.empty(0, 192)).shape == (0, 70)


@pytest.mark.parametrize(
    ("tiles", "steps", "want"), [(1, 1, 1), (1, 8, 4), (100, 64, 2), (1000, 64, 1), (1, 99, 16)])
def test_splits(tiles: int, steps: int, want: int) -> None:
    assert partial_sums.splits_for(tiles, steps) == want


def test_no_gradient() -> None:
    p, x = layer(), rows(1).requires_grad_()
    with pytest.raises(AxiconError, match="inference_mode"):
        group_int_triton.group_int_linear(x, p.qweight, p.scale, p.zero, p.bias, 4, 64)


def test_the_layer_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = layer()
    x: Any = SimpleNamespace(is_cuda=True, requires_grad=False)
    monkeypatch.setattr(group_int_triton, "group_int_linear", lambda *given: given)
    assert packed(x) == (x, packed.qweight, packed.scale, packed.zero, packed.bias, 4, 64)
    monkeypatch.delitem(sys.modules, "axicon.kernels.group_int_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(AxiconError, match=r"need Triton .* pip install triton"):
        packed(x)


POINTERS = {"x_MK": "bf16", "qweight": "u8", "scale_NG": "fp16", "zero_NG": "u8", "bias_N": "bf16"}


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for tiles, bits, target in ((group_int_triton.DECODE, 4, "fp32"), (group_int_triton.LARGE, 3, "bf16")):
        shape = {"ROWS": tiles.rows, "COLUMNS": tiles.outputs, "DEPTH": 64}
        rest = {"INPUTS": 4096, "BITS": bits, "GROUP": 64, "WITHIN": True, "ZEROS": True, "BIAS": True,
                "SPLIT_STEPS": 16}  # fmt: skip
        ptx = gpu.compiled(
            group_int_triton.product, capability, POINTERS | {"y_MN": target}, shape | rest,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        assert "bf16" in ptx
        assert "mma" in ptx
    pointers = {"partial_SMN": "fp32", "bias_N": "bf16", "y_MN": "bf16"}
    constants = {"PARTS": 8, "BIAS": True, "BLOCK": 1024}
    gpu.compiled(partial_sums._add_up, capability, pointers, constants, num_warps=4)
