"""The two-point estimate against gradients that are known, and parameters that measuring leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch

from axicon.finetune.directions import KeyedDirection, Mask, OfficialDirection
from axicon.finetune.estimate import groups_of, losses, trained
from axicon.finetune.objectives.language import Language
from axicon.finetune.shards import Alone
from axicon.finetune.shifted import shifted
from axicon.finetune.updates.zo_sgd import ZoSGD
from axicon.protocols import Moment
from tests.finetune.small import LLAMA, OPT, Quadratic, Vectors, decoder, empty, source

AT = Moment(3, 11)


def estimate(rule: ZoSGD, model: Vectors, at: Moment) -> torch.Tensor:
    """g z, as one vector."""
    rule.prepare(model)
    scalars = rule.measure(model, Quadratic(), empty(), Alone(), at)
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for group, z, g in rule.estimates(scalars, at):
        for name, p in group.items():
            found[name] += g * z.values(name, p)
    return torch.cat(list(found.values()))


def gradient(model: Vectors) -> torch.Tensor:
    model.zero_grad()
    Quadratic().loss(model, empty(1)).sum().backward()
    return torch.cat([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "official"])
def test_the_estimate_is_the_derivative_along_its_direction(kind: str) -> None:
    model = Vectors(7, 5)
    rule = ZoSGD(direction=kind, eps=1e-3)  # type: ignore[arg-type]
    rule.prepare(model)
    scalars = rule.measure(model, Quadratic(), empty(), Alone(), AT)
    ((group, z, g),) = rule.estimates(scalars, AT)
    slope = torch.cat([z.values(name, p) for name, p in group.items()]).double() @ gradient(model)
    assert g == pytest.approx(float(slope), abs=1e-9)


@pytest.mark.parametrize(("kind", "more"), [("rademacher", -1), ("gaussian", 1)])
def test_its_mean_is_the_gradient(kind: str, more: int) -> None:
    model, count = Vectors(12, 8), 800
    rule = ZoSGD(direction=kind, queries=count, eps=1e-3)  # type: ignore[arg-type]
    want = gradient(model)
    off = (estimate(rule, model, AT) - want).norm() / want.norm()
    expected = ((20 + more) / count) ** 0.5  # of the mean of `count` estimates in 20 dimensions
    assert 0.3 * expected < off < 3 * expected


def test_of_masked_directions_too() -> None:
    """Their mean is the gradient of the elements that move."""
    model, rule = Vectors(12, 8), ZoSGD(queries=800, eps=1e-3, share=0.5)
    found, want = estimate(rule, model, AT), gradient(model)
    moved = found != 0
    assert 3 < int(moved.sum()) < 17
    assert (found - want)[moved].norm() / want[moved].norm() < 0.2


def test_blocks_are_measured_alone() -> None:
    model = Vectors(12, 8)
    rule = ZoSGD(blocks=True, eps=1e-3)
    rule.prepare(model)
    g = rule.measure(model, Quadratic(), empty(), Alone(), AT)["g"]
    want = gradient(model).split([12, 8])
    z = KeyedDirection(AT.key("step", 3, 0))
    slopes = [float(z.values(f"x{i}", part).double() @ part) for i, part in enumerate(want)]
    assert g == pytest.approx(slopes, abs=1e-9)


def test_one_side_comes_near_two_sides() -> None:
    model = Vectors(12, 8)
    off = []
    for eps in (1e-2, 1e-3):
        one, two = (ZoSGD(eps=eps, one_sided=side) for side in (True, False))
        off.append((estimate(one, model, AT) - estimate(two, model, AT)).norm())
    assert off[1] < 0.2 * off[0]


def test_descent_contracts_as_the_theory_says() -> None:
    """lr = 1 / (L (d + 2)), L = 1: f shrinks below a tenth within 3 (d + 2) / mu steps."""
    model = Vectors(10)
    rule = ZoSGD(lr=1 / 12, eps=1e-3)
    rule.prepare(model)
    first = last = rule.step(model, Quadratic(), empty(), Alone(), Moment(0, 1))
    for step in range(1, 360):
        last = rule.step(model, Quadratic(), empty(), Alone(), Moment(step, 1))
    assert last < 0.1 * first


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("piece", [512, 1 << 20])
def test_shifted_computes_as_if_moved(
    config: dict[str, object],
    dtype: torch.dtype,
    sparse: bool,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tied matrices, rows of the embedding, products in pieces, biases, norms; and nothing has moved."""
    monkeypatch.setattr("axicon.finetune.shifted.PIECE", piece)
    model = decoder(config).to(dtype).requires_grad_(True)
    batch, parameters = source().batch(0), trained(model)
    z = KeyedDirection(5, mask=Mask(9, 0.5) if sparse else None)
    moved = copy.deepcopy(model)
    for name, p in moved.named_parameters():
        z.add(name, p.data, p.data, 0.01)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with shifted(model, parameters, z, 0.01):
        got = losses(model, Language(), batch, Alone())
    want = losses(moved, Language(), batch, Alone())
    # A product in pieces sums in another order.
    assert torch.equal(got, want) if piece > 512 else torch.allclose(got, want, rtol=1e-2 / 2**16)
    clean = losses(model, Language(), batch, Alone())
    assert not torch.equal(got, clean)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [p is parameters[name] for name, p in model.named_parameters()] == [True] * len(before)


def test_the_official_stream_is_torchs() -> None:
    model = Vectors(4, 3, dtype=torch.float32)
    z = OfficialDirection(17, trained(model))
    torch.manual_seed(17)
    for name, p in model.named_parameters():
        assert torch.equal(z.values(name, p), torch.normal(mean=0, std=1, size=p.size()))


def test_groups_are_all_that_trains() -> None:
    model = decoder(OPT).requires_grad_(True)
    groups = groups_of(trained(model), blocks=True)
    assert len(groups) == 5  # token and position embeddings, two blocks, the final norm
    assert [name for group in groups for name in group] == list(trained(model))


def test_the_share_of_elements_that_move() -> None:
    mask = Mask(3, 0.1)
    kept = mask.kept("w", 0, 100_000, torch.device("cpu"))
    assert abs(float(kept.float().mean()) - 0.1) < 3 * (0.09 / 100_000) ** 0.5
