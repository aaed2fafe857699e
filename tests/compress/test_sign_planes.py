"""The solver of binary codes: known figures for Gaussian weights, closed forms, and what never worsens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from axicon.compress.grid import Grid
from axicon.compress.sign_planes import Planes, even, fit, greedy, signs, solve


def gaussian(rows: int = 1024, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def errors(weight: Tensor, bits: int, **settings: object) -> Tensor:
    planes, codes = fit(weight, bits, **settings)  # type: ignore[arg-type]
    return (planes.values(codes) - weight).square().mean(1)


@pytest.mark.parametrize(("width", "bits", "want"), [
    (64, 2, (0.126, 0.116, 0.110)), (64, 3, (0.0555, 0.0463, 0.0331)), (64, 4, (0.0302, 0.0215, 0.0100)),
    (128, 2, (0.128, 0.119, 0.114)), (128, 3, (0.0569, 0.0485, 0.0349)), (128, 4, (0.0315, 0.0232, 0.0108)),
])  # fmt: skip
def test_gaussian_weights_from_the_greedy_start(width: int, bits: int, want: tuple[float, ...]) -> None:
    weight = gaussian(2048, width)
    for rounds, error in zip((0, 1, 15), want, strict=True):
        got = errors(weight, bits, rounds=rounds, start="greedy", shifted=False).mean()
        assert got == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_is_worse_than_plain_rounding(bits: int) -> None:
    weight = gaussian()
    rounded = (Grid.fit(weight, bits, "asymmetric").round(weight) - weight).square().mean(1)
    for start in ("rtn", "best"):
        got = errors(weight, bits, start=start)
        assert (got <= rounded * (1 + 1e-6)).all()
        assert got.mean() < 0.85 * rounded.mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("start", ["greedy", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_round_is_worse_than_the_one_before(bits: int, start: str, shifted: bool, weighted: bool) -> None:
    weight = gaussian(64)
    importance = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)).exp() if weighted else None
    counts = torch.ones(1, 1) if importance is None else importance
    found = []
    for rounds in (0, 1, 2, 3, 5, 15):
        planes, codes = fit(
            weight, bits, rounds=rounds, start=start, shifted=shifted, importance_RK=importance)  # type: ignore[arg-type]
        found.append(((planes.values(codes) - weight).square() * counts).sum(1))
    for before, after in itertools.pairwise(found):
        assert (after <= before * (1 + 1e-5)).all()
    assert found[-1].sum() < 0.99 * found[0].sum()


def test_one_round_is_weighted_least_squares() -> None:
    weight, importance = gaussian(5, 32), torch.rand(5, 32, generator=torch.Generator().manual_seed(1))
    _, codes = greedy(weight, importance, 3)
    planes, _ = fit(weight, 3, rounds=1, start="greedy", importance_RK=importance)
    for row in range(5):
        unknown = torch.cat([signs(3)[codes[row].long()], torch.ones(32, 1)], 1).double()
        root = importance[row].double().sqrt()
        want = torch.linalg.lstsq(unknown * root[:, None], weight[row].double() * root).solution
        assert torch.allclose(planes.alpha[row].double(), want[:3].abs().sort().values, atol=1e-5)
        assert float(planes.offset[row]) == pytest.approx(float(want[3]), abs=1e-5)


def test_nearest_is_nearest() -> None:
    planes, _ = fit(gaussian(20), 3)
    weight = gaussian(20, 200)
    want = (planes.levels[:, None, :] - weight[..., None]).abs().min(2).values
    assert torch.equal((planes.values(planes.nearest(weight)) - weight).abs(), want)


def test_one_plane() -> None:
    weight = gaussian(10)
    planes, codes = fit(weight, 1, start="greedy", shifted=False)
    alpha = weight.abs().mean(1, keepdim=True)
    assert torch.allclose(planes.alpha, alpha)
    assert torch.equal(codes == 1, weight >= 0)
    got = (planes.values(codes) - weight).square().mean(1)
    assert torch.allclose(got, weight.square().mean(1) - alpha[:, 0].square(), atol=1e-6)


def test_zero_counts_as_plus() -> None:
    weight = torch.tensor([[0.0, 1.0, -1.0, 0.0]])
    _, codes = greedy(weight, torch.ones_like(weight), 2)
    assert (codes[0, [0, 3]] >= 2).all()
    for start in ("greedy", "rtn", "best"):
        planes, codes = fit(torch.zeros(3, 8), 3, start=start)  # type: ignore[arg-type]
        assert torch.equal(planes.values(codes), torch.zeros(3, 8))


def test_values_on_few_levels_are_found_exactly() -> None:
    made = torch.Generator().manual_seed(2)
    planes = Planes(torch.tensor([[0.2, 0.7]]), torch.tensor([[0.1]]))
    weight = planes.values(torch.randint(0, 4, (1, 64), generator=made))
    assert errors(weight, 2) < 1e-12
    assert errors(weight, 3) < 1e-12


def test_the_order_of_a_group_does_not_matter() -> None:
    weight, turn = gaussian(50), torch.randperm(64, generator=torch.Generator().manual_seed(3))
    planes, codes = fit(weight, 3)
    turned, turned_codes = fit(weight[:, turn], 3)
    assert torch.allclose(turned.values(turned_codes), planes.values(codes)[:, turn], atol=1e-5)


@pytest.mark.parametrize("factor", [1e-4, 8.0])
def test_scales_follow_the_weights(factor: float) -> None:
    weight = gaussian(50)
    planes, codes = fit(weight, 3, start="greedy")
    scaled, scaled_codes = fit(weight * factor, 3, start="greedy")
    assert (codes == scaled_codes).float().mean() > 0.999
    squares = [p.values(c).square().mean() for p, c in ((planes, codes), (scaled, scaled_codes))]
    assert torch.allclose(squares[1], squares[0] * factor**2)
    assert torch.allclose(scaled.alpha / factor, planes.alpha, atol=1e-3)
    assert torch.allclose(scaled.offset / factor, planes.offset, atol=1e-3)


def test_more_bits_and_smaller_groups_are_better() -> None:
    weight = gaussian(512)
    by_bits = [float(errors(weight, bits).mean()) for bits in (1, 2, 3, 4)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_width = [float(errors(weight.reshape(-1, width), 3).mean()) for width in (128, 64, 32, 16)]
    assert by_width == sorted(by_width, reverse=True)


def test_many_rows_are_fitted_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(100)
    planes, codes = fit(weight, 3)
    monkeypatch.setattr("axicon.compress.sign_planes.AT_ONCE", 64 * 7)
    split, split_codes = fit(weight, 3)
    assert torch.equal(codes, split_codes)
    assert torch.allclose(planes.levels, split.levels)


def test_solving() -> None:
    made = torch.Generator().manual_seed(4)
    factor = torch.randn(20, 4, 6, generator=made, dtype=torch.float64)
    matrix, want = factor @ factor.mT, torch.randn(20, 4, generator=made, dtype=torch.float64)
    assert torch.allclose(solve(matrix, (matrix @ want[..., None])[..., 0]), want, atol=1e-6)
    assert torch.equal(solve(torch.zeros(1, 3, 3), torch.zeros(1, 3)), torch.zeros(1, 3))


def test_without_offset_levels_are_symmetric() -> None:
    for start in (greedy(gaussian(4), torch.ones(4, 64), 3), even(gaussian(4), 3, shifted=False)):
        levels = start[0].levels
        assert torch.allclose(levels.sort().values, -levels.sort().values.flip(1), atol=1e-6)
    planes, _ = fit(gaussian(4), 3, shifted=False)
    assert torch.equal(planes.offset, torch.zeros(4, 1))
