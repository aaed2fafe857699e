"""Which real examples a distillation begins from."""

from __future__ import annotations

import pytest
import torch

from axicon.distill.choose import at_random, logits, nearest_to_centres
from tests.distill.small import clusters, initial, network

pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra `distill`")


@pytest.mark.parametrize("ipc", [1, 5, 10, 25])
def test_as_many_different_examples_of_the_right_class_as_asked_for(ipc: int) -> None:
    data = clusters(count=120)
    net = network("mlp", data)
    seen = logits(net, initial(net), data)
    for chosen in (
        nearest_to_centres(seen, data.y, 3, ipc, seed=0),
        at_random(data.y, 3, ipc, seed=0),
    ):
        assert len(set(chosen.tolist())) == len(chosen) == 3 * ipc
        assert data.y[chosen].tolist() == [label for label in range(3) for _ in range(ipc)]


def test_the_centre_of_a_class_stands_for_it() -> None:
    """With one per class it is the example nearest to the mean; with two groups, one of each."""
    features = torch.tensor([[0.0], [1.0], [2.1], [10.0], [11.0], [12.5]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    assert nearest_to_centres(features, y, 2, 1, seed=0).tolist() == [1, 4]
    groups = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
    chosen = nearest_to_centres(groups, torch.zeros(6, dtype=torch.int64), 1, 2, seed=0)
    assert sorted(chosen.tolist()) == [1, 4]


def test_choices_are_a_function_of_the_seed() -> None:
    y = torch.arange(60) % 3
    assert torch.equal(at_random(y, 3, 4, 1), at_random(y, 3, 4, 1))
    assert not torch.equal(at_random(y, 3, 4, 1), at_random(y, 3, 4, 2))


def test_logits_come_in_pieces_with_the_values_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clusters(count=30)
    net = network("mlp", data)
    flat = initial(net)
    monkeypatch.setattr("axicon.distill.choose.AT_ONCE", 7)
    torch.testing.assert_close(logits(net, flat, data), net(flat, data.x))
