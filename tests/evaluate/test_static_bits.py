"""Few bits with fixed scales: the grid, its ranges, and what one outlier does to them."""

from __future__ import annotations

import pytest
import torch

from axicon.evaluate.static_bits import Range, round_weight, sqnr, static_bits
from axicon.model.decoder import Decoder
from tests.finetune.small import LLAMA, OPT, decoder


def gaussian(count: int = 100_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_a_gaussian_keeps_40_decibels_and_one_outlier_takes_20_of_them() -> None:
    x, plain, spoiled, saved = gaussian(), Range(), Range(), Range(percentile=99.99)
    plain.see(x)
    assert sqnr(x, plain.round(x)) == pytest.approx(40, abs=2)
    outlier = x.clone()
    outlier[7] = 100.0
    spoiled.see(outlier)
    assert sqnr(x, spoiled.round(x)) < sqnr(x, plain.round(x)) - 20
    saved.see(outlier)
    within = (x > saved.low) & (x < saved.high)
    assert within.float().mean() > 0.999
    assert sqnr(x[within], saved.round(x[within])) > 40


def test_the_grid_by_hand() -> None:
    own = Range()
    own.see(torch.tensor([-1.0, 4.1]))
    step = 5.1 / 255
    got = own.round(torch.tensor([0.0, 0.0101, -7.0, 9.0]))
    assert got.tolist() == pytest.approx([0.0, step, -1.0, 4.1])
    assert round_weight(torch.tensor([[-2.54, 0.011, 0.0]])).tolist()[0] == pytest.approx([-2.54, 0.02, 0.0])
    assert not round_weight(torch.zeros(2, 2)).any()
    few = Range(bits=2)
    few.see(torch.tensor([0.0, 3.0]))
    assert few.round(torch.tensor([0.4, 1.4, 2.6])).tolist() == [0.0, 1.0, 3.0]
    assert round_weight(torch.tensor([0.4, -3.0]), bits=3).tolist() == [0.0, -3.0]


def test_ranges_are_running_means_and_hold_nought() -> None:
    own = Range()
    for high in (10.0, 20.0):
        own.see(torch.tensor([2.0, high]))
    assert (own.low, own.high) == pytest.approx((2.0, 11.0))
    assert float(own.round(torch.tensor([0.0]))) == 0.0


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@torch.no_grad()
def test_a_model_loses_little_until_it_has_an_outlier(config: dict[str, object]) -> None:
    tokens = torch.randint(0, 64, (4, 30), generator=torch.Generator().manual_seed(1))
    sample = [tokens[:2].tolist(), tokens[2:].tolist()]

    def loss(model: Decoder) -> float:
        exact = model.logits(tokens)
        found = static_bits(model, sample)
        assert torch.equal(model.logits(tokens), exact), "the model itself is as it was"
        return float((found.logits(tokens) - exact).norm() / exact.norm())

    model = decoder(config)
    plain = loss(model)
    assert 0 < plain < 0.1
    model.blocks[0].mlp_norm.weight[3] = 300.0  # type: ignore[union-attr,index]
    model.blocks[0].get_submodule("gate_up" if model.shape.blocks[0].gated else "up").weight[:, 3] /= 300  # type: ignore[operator]
    assert loss(model) > 3 * plain
