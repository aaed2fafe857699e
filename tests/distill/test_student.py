"""Students and their matching loss, against closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.distill import student
from axicon.distill.experts import Training, generator, order, train_expert
from axicon.distill.loop import Distillation, Made, Rates
from axicon.distill.networks import Linear, Network
from axicon.distill.student import (
    Matching,
    balance_factor,
    batches,
    matching_loss,
    perturbed,
    stalled,
    student_path,
)
from tests.distill.small import clusters, initial, network


def softmax_problem() -> tuple[Network, Tensor, Tensor, Tensor, Tensor]:
    """A linear softmax model in float64: network, start, target, examples, labels."""
    made = torch.Generator().manual_seed(0)
    net = Network(Linear().module((4,), 3).double())
    start, target = (torch.randn(net.size, generator=made, dtype=torch.float64) for _ in range(2))
    x = torch.randn(6, 4, generator=made, dtype=torch.float64)
    return net, start, target, x, torch.arange(6) % 3


def central(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        move = torch.zeros_like(at).view(-1)
        move[i] = step
        move = move.view(at.shape)
        found.view(-1)[i] = (f(at + move) - f(at - move)) / (2 * step)
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_gradient_through_three_steps_is_that_of_finite_differences(momentum: float) -> None:
    net, start, target, x, y = softmax_problem()
    alpha = torch.tensor(0.3, dtype=torch.float64)
    chosen = [torch.tensor([0, 1, 2]), torch.tensor([3, 4]), torch.arange(6)]

    def loss(x: Tensor, alpha: Tensor) -> Tensor:
        path = student_path(net, start, x, y, alpha, chosen, momentum=momentum)
        return matching_loss(path, start, [], target, Matching(steps=3, epochs=1))

    x, alpha = x.requires_grad_(), alpha.requires_grad_()
    slopes = torch.autograd.grad(loss(x, alpha), (x, alpha))
    found_x = central(lambda at: loss(at, alpha.detach()).detach(), x.detach())
    found_alpha = central(lambda at: loss(x.detach(), at).detach(), alpha.detach())
    torch.testing.assert_close(slopes[0], found_x, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(slopes[1], found_alpha, rtol=1e-5, atol=1e-9)


def test_one_step_of_least_squares_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta_1 = theta_0 - alpha X^T (X theta_0 - y) / n, and the slopes of its squared distance."""

    class Product:
        def __call__(self, flat: Tensor, x: Tensor) -> Tensor:
            return x @ flat

    def half_square(found: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (found - y).square().mean()

    monkeypatch.setattr(student.F, "cross_entropy", half_square)
    made = torch.Generator().manual_seed(1)
    x, start, target = (
        torch.randn(*shape, generator=made, dtype=torch.float64) for shape in ((5, 3), (3,), (3,))
    )
    y = torch.randn(5, generator=made, dtype=torch.float64)
    alpha = torch.tensor(0.2, dtype=torch.float64)
    x, alpha = x.requires_grad_(), alpha.requires_grad_()
    [end] = student_path(Product(), start, x, y, alpha, [torch.arange(5)])  # type: ignore[arg-type]
    residual = x @ start - y
    torch.testing.assert_close(end, start - alpha * x.T @ residual / 5)
    loss = matching_loss([end], start, [], target, Matching(steps=1, epochs=1))
    slope_x, slope_alpha = torch.autograd.grad(loss, (x, alpha))
    with torch.no_grad():
        scale = (start - target).square().sum()
        off = end - target  # d L / d end = 2 off / scale
        want_alpha = -2 * off @ (x.T @ residual / 5) / scale
        want_x = -2 * alpha / (5 * scale) * (torch.outer(residual, off) + torch.outer(x @ off, start))
    torch.testing.assert_close(slope_alpha, want_alpha)
    torch.testing.assert_close(slope_x, want_x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_a_student_on_the_real_batches_arrives_exactly(kind: str, momentum: float) -> None:
    data = clusters(count=24)
    net = network(kind, data)
    path = train_expert(net, data, Training(epochs=2, batch=8, lr=0.05, momentum=momentum), seed=0, expert=0)
    chosen = [rows for epoch in range(2) for rows in order(24, 0, 0, epoch).split(8)]
    walked = student_path(net, path[0], data.x, data.y, torch.tensor(0.05), chosen, momentum=momentum)
    how = Matching(steps=6, epochs=2, intermediate="agg")
    assert float(matching_loss(walked, path[0], [path[1]], path[2], how).detach()) == 0.0


def test_a_student_that_does_not_move_has_a_loss_of_one() -> None:
    data = clusters(count=6)
    net = network("mlp", data)
    start, between, target = (initial(net, seed) for seed in range(3))
    walked = student_path(net, start, data.x, data.y, torch.tensor(0.0), [torch.arange(6)] * 4)
    for kind, want in (("none", 1.0), ("agg", 2.0), ("adaptive", 1.5)):
        how = Matching(steps=4, epochs=2, intermediate=kind)  # type: ignore[arg-type]
        assert float(matching_loss(walked, start, [between], target, how).detach()) == want


def test_intermediate_epochs_are_met_where_they_belong() -> None:
    """Points on a line from 0 to 6: step n is at n, epoch i at 2 i, so every term but one is 0."""
    walked = [torch.tensor([float(n)]) for n in range(1, 7)]
    start, target = torch.tensor([0.0]), torch.tensor([6.0])
    on_the_way = [torch.tensor([2.0]), torch.tensor([4.0])]
    how = Matching(steps=6, epochs=3, intermediate="agg")
    assert float(matching_loss(walked, start, on_the_way, target, how)) == 0.0
    off = [torch.tensor([2.0]), torch.tensor([5.0])]  # step 4 is at 4: (4 - 5)^2 / (0 - 5)^2
    assert float(matching_loss(walked, start, off, target, how)) == pytest.approx(1 / 25)
    growing = Matching(steps=6, epochs=3, intermediate="adaptive")
    assert float(matching_loss(walked, start, off, target, growing)) == pytest.approx(2 / 3 / 25)
    short = walked[1::4]  # 2 steps for 3 epochs: N // M is 0, so only the end counts
    assert float(matching_loss(short, start, off, target, how)) == 0.0


def test_with_one_epoch_all_switches_off_is_mtt_bit_for_bit() -> None:
    data = clusters(count=6)
    net = network("convnet", data)
    start, target = initial(net), initial(net, 1)
    alpha = torch.tensor(0.1)
    flat = start.clone().requires_grad_()
    for _ in range(3):
        [g] = torch.autograd.grad(F.cross_entropy(net(flat, data.x), data.y), flat, create_graph=True)
        flat = flat - alpha * g
    want = (flat - target).square().sum() / (start - target).square().sum()
    walked = student_path(net, start, data.x, data.y, alpha, [torch.arange(6)] * 3)
    for kind in ("none", "agg"):  # with M = 1 there is nothing between
        how = Matching(steps=3, epochs=1, intermediate=kind)  # type: ignore[arg-type]
        assert torch.equal(matching_loss(walked, start, [], target, how), want)
    assert torch.equal(perturbed(net, start, 0.0, generator(0)), start)


def test_balance_factors_as_released() -> None:
    assert balance_factor(10, 20) == pytest.approx(math.log(8, 5)) == pytest.approx(1.2920, abs=1e-4)
    assert 1 / balance_factor(9, 20) == pytest.approx(math.log(9, 5)) == pytest.approx(1.3652, abs=1e-4)
    assert 1 / balance_factor(0, 20) == pytest.approx(1.7959, abs=1e-4)
    data = clusters(count=6)
    net = network("mlp", data)
    start = initial(net)
    rows = [torch.arange(6)]
    plain, scaled = (
        student_path(net, start, data.x, data.y, torch.tensor(0.1), rows, factor=factor)[0]
        for factor in (1.0, 1.5)
    )
    torch.testing.assert_close(scaled - start, 1.5 * (plain - start))


def test_weights_of_convolutions_are_perturbed_within_their_bound_and_nothing_else() -> None:
    net = network("convnet", clusters())
    flat = initial(net)
    moved = perturbed(net, flat, 1.0, generator(0))
    for name, before in net.parameters(flat).items():
        after = net.parameters(moved)[name]
        if before.ndim == 4:
            assert 0 < (after - before).norm() <= before.abs().max()
        else:
            assert torch.equal(after, before)
    assert torch.equal(flat, initial(net))


def test_batches_come_from_the_end_of_a_permutation_so_a_short_one_is_first() -> None:
    found = batches(7, 3, 4, generator(0))
    assert [len(one) for one in found] == [1, 3, 3, 1]
    assert sorted(torch.cat(found[:3]).tolist()) == list(range(7))
    assert [one.tolist() for one in batches(3, None, 2, generator(0))] == [[0, 1, 2]] * 2


def test_pairs_of_epochs_that_stand_still_are_not_drawn() -> None:
    data = clusters(count=6)
    net = network("linear", data)
    flat = initial(net)
    assert stalled(flat, flat + 1e-7)
    assert not stalled(flat, flat + 1e-2)
    path = torch.stack([flat, flat + 1, flat + 1, flat + 1])
    run = Distillation(
        network=net,
        y=data.y,
        trajectories=[path],
        matching=Matching(steps=1, epochs=1, max_start=3),
        rates=Rates(),
        augment=None,
        seed=0,
    )
    assert {run.pick(generator(i))[1] for i in range(20)} == {0}
    assert Made.begin(data.x, 0.1).iterations == 0
