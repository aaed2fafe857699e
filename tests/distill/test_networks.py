"""Networks as functions of one vector."""

from __future__ import annotations

import pytest
import torch

from axicon.distill.networks import MLP, ConvNet, Network
from axicon.errors import AxiconError
from tests.distill.small import clusters, initial, network


@pytest.mark.parametrize("kind", ["convnet", "mlp", "linear"])
def test_a_vector_is_the_module(kind: str) -> None:
    data = clusters()
    net = network(kind, data)
    flat = initial(net)
    assert net.size == flat.numel() == sum(p.numel() for p in net.module.parameters())
    with torch.no_grad():
        for name, p in net.module.named_parameters():
            p.copy_(net.parameters(flat)[name])
    assert torch.equal(net(flat, data.x), net.module(data.x))
    # and another vector is another function, whatever the module holds
    assert not torch.equal(net(flat + 1, data.x), net.module(data.x))


def test_gradients_are_those_of_the_module() -> None:
    data = clusters()
    net = network("convnet", data)
    flat = initial(net).requires_grad_()
    [gradient] = torch.autograd.grad(net(flat, data.x).square().sum(), flat)
    module = net.module.requires_grad_(True)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(net.parameters(flat)[name])
    module(data.x).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(net.parameters(gradient)[name], p.grad)


def test_initial_values_are_a_function_of_the_seed_and_norms_begin_at_one() -> None:
    net = network("convnet", clusters())
    assert torch.equal(initial(net, 3), initial(net, 3))
    assert not torch.equal(initial(net, 3), initial(net, 4))
    parts = net.parameters(initial(net))
    assert torch.equal(parts["1.weight"], torch.ones(5))
    assert torch.equal(parts["1.bias"], torch.zeros(5))
    assert parts["4.weight"].abs().max() <= 1 / (5 * 9) ** 0.5


def test_only_weights_of_convolutions_have_a_place_of_their_own() -> None:
    net = network("convnet", clusters())
    flat = initial(net)
    found = [flat[place] for place in net.convolutions()]
    parts = net.parameters(flat)
    assert [f.tolist() for f in found] == [parts[n].flatten().tolist() for n in ("0.weight", "4.weight")]
    assert network("mlp", clusters()).convolutions() == []


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(AxiconError, match="halving 4 x 4 so often leaves nothing"):
        ConvNet(depth=3).module((1, 4, 4), 2)
    with pytest.raises(AxiconError, match="wants images, these examples are vectors of 7"):
        ConvNet().module((7,), 2)
    assert Network(MLP(width=3, depth=2).module((7,), 2)).size == 7 * 3 + 3 + 3 * 3 + 3 + 3 * 2 + 2
