"""Expert trajectories: what is stored, in which order data are seen, and the switches of AST."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axicon.distill.experts import (
    Training,
    generator,
    loss_factor,
    movement,
    order,
    penalty,
    train_expert,
)
from axicon.errors import RunFailed
from tests.distill.small import clusters, initial, network


def test_every_epoch_is_kept_and_none_is_an_alias() -> None:
    data = clusters()
    net = network("mlp", data)
    path = train_expert(net, data, Training(epochs=4, batch=8), seed=1, expert=2)
    assert path.shape == (5, net.size)
    assert torch.equal(path[0], net.initial(generator(1, "expert", 2)))
    assert (path.diff(dim=0).norm(dim=1) > 1e-3).all()
    assert torch.equal(path, train_expert(net, data, Training(epochs=4, batch=8), seed=1, expert=2))
    assert not torch.equal(path[0], train_expert(net, data, Training(epochs=1), seed=1, expert=3)[0])


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_an_epoch_is_replayed_from_its_snapshot_by_the_order_of_its_data(kind: str) -> None:
    data = clusters()
    net = network(kind, data)
    how = Training(epochs=3, batch=16, lr=0.05, weight_decay=1e-2)
    path = train_expert(net, data, how, seed=0, expert=1)
    module = net.module.requires_grad_(True)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(net.parameters(path[2])[name])
    for chosen in order(len(data), 0, 1, 2).split(16):
        loss = F.cross_entropy(module(data.x[chosen]), data.y[chosen])
        gradients = torch.autograd.grad(loss, [*module.parameters()])
        with torch.no_grad():
            for p, g in zip(module.parameters(), gradients, strict=True):
                p -= 0.05 * (g + 1e-2 * p)
    replayed = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(replayed, path[3], rtol=1e-5, atol=1e-6)


def test_momentum_is_torchs_and_begins_again_where_the_rate_falls() -> None:
    """Epochs // 2 + 1 counted from 0 is the last one before that, as the released code has it."""
    data = clusters(count=16)
    net = network("linear", data)
    how = Training(epochs=4, batch=16, lr=0.1, momentum=0.9, decay=0.5)
    path = train_expert(net, data, how, seed=0, expert=0)
    flat, lr = path[0].clone(), 0.1
    moving = torch.zeros_like(flat)
    for epoch in range(4):
        flat = flat.detach().requires_grad_()
        chosen = order(16, 0, 0, epoch)
        [g] = torch.autograd.grad(F.cross_entropy(net(flat, data.x[chosen]), data.y[chosen]), flat)
        moving = 0.9 * moving + g
        flat = flat.detach() - lr * moving
        if epoch == 4 // 2 + 1:
            lr, moving = lr * 0.5, torch.zeros_like(moving)
        torch.testing.assert_close(flat, path[epoch + 1])
    falls = Training(epochs=5, batch=16, lr=0.1, momentum=0.9, decay=0.5)
    path = train_expert(net, data, falls, seed=0, expert=0)
    at = path[4].clone().requires_grad_()
    chosen = order(16, 0, 0, 4)
    [g] = torch.autograd.grad(F.cross_entropy(net(at, data.x[chosen]), data.y[chosen]), at)
    torch.testing.assert_close(path[5], path[4] - 0.05 * g)


def test_the_clipping_loss_grows_to_one_over_ten_epochs() -> None:
    assert [round(loss_factor(e), 2) for e in range(12)] == [
        0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0
    ]  # fmt: skip
    data = clusters(count=16)
    net = network("linear", data)
    full, half = (
        train_expert(net, data, Training(epochs=1, batch=16, clip_loss=on), seed=0, expert=0)
        for on in (False, True)
    )
    torch.testing.assert_close(half[1] - half[0], 0.5 * (full[1] - full[0]))


def test_the_penalty_of_a_linear_model_in_closed_form() -> None:
    """Of logits W x + b the slope of their sum is the column sums of W, everywhere."""
    data = clusters()
    net = network("linear", data)
    flat = initial(net)
    columns = net.parameters(flat)["1.weight"].sum(dim=0)  # (pixels,): one channel, so its norm is its size
    per_pixel = (columns.abs() - 1).square().mean()
    torch.testing.assert_close(penalty(net, flat.requires_grad_(), data.x, "pixel"), per_pixel)
    per_example = (columns.norm() - 1).square()
    torch.testing.assert_close(penalty(net, flat, data.x, "example"), per_example)


def test_the_penalty_is_not_scaled_by_the_clipping_loss() -> None:
    data = clusters(count=16)
    net = network("linear", data)

    def step(**more: float | bool) -> torch.Tensor:
        path = train_expert(net, data, Training(epochs=1, batch=16, **more), seed=0, expert=0)
        return path[1] - path[0]

    by_penalty = step(grad_penalty=2.0) - step()
    torch.testing.assert_close(
        step(clip_loss=True, grad_penalty=2.0), 0.5 * step() + by_penalty, rtol=1e-4, atol=1e-6
    )
    assert by_penalty.abs().max() > 1e-3


def test_movement_is_the_longest_of_an_epoch() -> None:
    assert movement(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])) == 5.0


def test_an_expert_that_diverges_stops_with_advice() -> None:
    data = clusters()
    with pytest.raises(RunFailed, match=r"expert 0 is not finite after epoch 2: take a smaller experts\.lr"):
        train_expert(network("mlp", data), data, Training(epochs=2, lr=1e30), seed=0, expert=0)
