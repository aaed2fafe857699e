"""LLM.int8 arithmetic against closed forms and float64; bounds from the rounding steps, magnitudes from the
paper's recipe."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor, nn

from axicon.kernels import int8_matmul, native
from axicon.model.int8 import Int8Linear, quantise_rows


def linear(seed: int = 0, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(256, 64, bias=bias).requires_grad_(False)
    layer.weight.normal_(0, 0.05)
    return layer


def through_kernels(packed: Int8Linear, x: Tensor) -> Tensor:
    try:
        library = native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    descriptor, kept = packed.native(library)
    descriptor.weight = kept[0].data_ptr()
    y = torch.empty(len(x), packed.outputs)
    library.axicon_linear(ctypes.addressof(descriptor), x.contiguous().data_ptr(), len(x), y.data_ptr(), 2)
    return y


PATHS = {"torch": lambda packed, x: packed(x), "kernels": through_kernels}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("path", PATHS)
def test_integer_part_is_exact(path: str) -> None:
    packed = Int8Linear.from_linear(linear(bias=True), threshold=0)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1))
    q, scale, _ = quantise_rows(x, 0)
    dot = q.long() @ packed.qweight.long().T
    want = dot.double() * scale.double() * packed.absmax.double() / 16129 + packed.bias.double()  # type: ignore[union-attr]
    assert torch.allclose(PATHS[path](packed, x).double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("product", int8_matmul.PRODUCTS)
def test_products_are_exact_at_the_extremes(product: str) -> None:
    weight = torch.full((32, 1536), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.full((3, 1536), -127, dtype=torch.int8)
    x[1] = 127
    x[2, ::2] = 1
    try:
        got = int8_matmul.PRODUCTS[product](weight)(x)
    except (RuntimeError, AttributeError) as reason:
        pytest.skip(f"{product} is not available: {reason}")
    want = x.long() @ weight.long().T
    # Above 2^24 a float32 has no room for every integer: one rounding is allowed there, none below.
    probe, rows = int8_matmul.probe()
    right = torch.equal(int8_matmul.PRODUCTS[product](probe)(rows), int8_matmul.exact_product(probe)(rows))
    assert torch.equal(got, want.float()) == right, "the probe does not tell"
    assert right or product == "onednn"
    assert right or int8_matmul.choose() == "exact"


def test_round_trip_is_within_half_a_step() -> None:
    layer = linear()
    packed = Int8Linear.from_linear(layer)
    step = packed.absmax[:, None] / 127
    assert ((packed.unpack() - layer.weight).abs() <= step / 2 + 1e-7).all()
    assert (packed.qweight.abs().amax(1) == 127).all()


@pytest.mark.parametrize("path", PATHS)
def test_error_bound_without_outliers(path: str) -> None:
    layer = linear()
    packed = Int8Linear.from_linear(layer)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    error = (PATHS[path](packed, x) - layer(x)).abs()
    dw, dx = packed.absmax / 127, x.abs().amax(1, keepdim=True) / 127
    bound = x.abs().sum(1, keepdim=True) * dw / 2 + layer.weight.abs().sum(1) * dx / 2 + 256 * dx * dw / 4
    assert (error <= bound + 1e-6).all()
    assert 0.0090 < relative(PATHS[path](packed, x), layer(x)) < 0.0107


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", range(5))
def test_outliers_are_what_the_threshold_saves(path: str, seed: int) -> None:
    layer = linear(seed=seed)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(seed))
    x[:, [17, 200]] *= 25
    error = {t: relative(PATHS[path](Int8Linear.from_linear(layer, t), x), layer(x)) for t in (0.0, 6.0)}
    assert error[0.0] / error[6.0] >= 2.5


@pytest.mark.parametrize("path", PATHS)
def test_relative_outliers(path: str) -> None:
    """Rows of any size: what a fixed threshold misses in small ones, a relative one finds in all alike."""
    layer = linear()
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(7)) * 0.01
    x[:, [17, 200]] *= 25
    run, packed = PATHS[path], Int8Linear.from_linear(layer, 6.0, 5.0)
    error = {r: relative(run(Int8Linear.from_linear(layer, 6.0, r), x), layer(x)) for r in (0.0, 5.0)}
    assert error[0.0] / error[5.0] >= 2.5
    assert torch.allclose(run(packed, x * 64), run(packed, x) * 64, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(packed, torch.zeros(1, 256)), torch.zeros(1, 64))


@pytest.mark.parametrize("path", PATHS)
def test_thresholds_at_both_ends(path: str) -> None:
    layer = linear()
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    run = PATHS[path]
    assert torch.equal(run(Int8Linear.from_linear(layer, 1e30), x), run(Int8Linear.from_linear(layer, 0), x))
    packed = Int8Linear.from_linear(layer, 1e-6)
    assert torch.allclose(run(packed, x), x @ packed.unpack().T, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_is_its_own(path: str) -> None:
    """Bit for bit alone and among rows with other outliers."""
    packed = Int8Linear.from_linear(linear())
    x = torch.randn(19, 256, generator=torch.Generator().manual_seed(4)) * 3
    run = PATHS[path]
    together = run(packed, x)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(5))
    if path == "kernels":
        assert torch.equal(run(packed, x[order]), together[order])
        assert all(torch.equal(run(packed, x[i : i + 1])[0], together[i]) for i in range(19))
    else:
        assert torch.allclose(run(packed, x[order]), together[order], atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_zero_rows_and_rows_of_outliers(path: str) -> None:
    layer = linear(bias=True)
    layer.weight[3] = 0
    packed = Int8Linear.from_linear(layer)
    x = torch.zeros(2, 256)
    x[1] = 50.0
    y = PATHS[path](packed, x)
    assert torch.equal(y[0], layer.bias)
    assert torch.allclose(y[1], x[1] @ packed.unpack().T + layer.bias, rtol=1e-5, atol=1e-4)
    assert y[1, 3] == layer.bias[3]


def test_state_round_trip_and_bytes() -> None:
    packed = Int8Linear.from_linear(linear(bias=True))
    other = Int8Linear.from_linear(linear(seed=9, bias=True))
    other.load_state_dict(packed.state_dict())
    x = torch.randn(4, 256)
    assert torch.equal(other(x), packed(x))
    assert sum(b.nbytes for b in packed.buffers()) == 64 * 256 + 4 * 64 + 4 * 64


def test_sharded_equals_whole() -> None:
    packed = Int8Linear.from_linear(linear(bias=True))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(6))
    by_out = torch.cat([packed.shard(r, 4, "out")(x) for r in range(4)], dim=1)
    assert torch.equal(by_out, packed(x))
    by_in = sum(packed.shard(r, 2, "in")(x[:, 128 * r : 128 * (r + 1)]) for r in range(2))
    assert relative(by_in, packed(x)) < 0.02  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not divide"):
        packed.shard(0, 3, "out")
