"""GPTQ against plain rounding, against the paper's equations done slowly, and at its edges."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from axicon.compress import moments
from axicon.compress.calibration import Calibration
from axicon.compress.columns import inverse_factor
from axicon.compress.gptq import GPTQ
from axicon.compress.grid import Grid, Kind, groups_of, packed
from axicon.compress.moments import Hessian
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.group_int import GroupIntLinear
from axicon.model.shape import ModelShape
from tests.compress.cases import correlated, error, hessian, linear


def plain(weight: Tensor, bits: int, group: int, kind: Kind = "asymmetric") -> GroupIntLinear:
    grid = Grid.fit(groups_of(weight, group), bits, kind)
    return packed(grid.codes(groups_of(weight, group)).view_as(weight), grid, None, group)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "absmax"])
@pytest.mark.parametrize("settings", [
    {"group": 16}, {"group": -1}, {"group": 16, "act_order": True, "static_groups": True},
    {"group": -1, "act_order": True}, {"group": 16, "block_size": 7}, {"group": 16, "static_groups": True},
])  # fmt: skip
def test_with_a_diagonal_hessian_it_is_plain_rounding(settings: dict[str, int], kind: Kind) -> None:
    _, weight = correlated(0)
    diagonal = torch.linspace(1, 5, 64).diag()
    got = GPTQ(bits=3, grid=kind, **settings).round(linear(weight), diagonal)
    want = plain(weight, 3, settings["group"], kind)
    assert torch.equal(got.unpack(), want.unpack())
    assert torch.equal(got.qweight, want.qweight)


@pytest.mark.parametrize("bits", [3, 4])
def test_it_beats_plain_rounding_on_correlated_inputs_every_time(bits: int) -> None:
    methods = [GPTQ(bits=bits, group=16, block_size=32), GPTQ(bits=bits, group=16, act_order=True),
               GPTQ(bits=bits, group=16, act_order=True, static_groups=True)]  # fmt: skip
    for seed in range(20):
        x, weight = correlated(seed)
        simple = error(x, weight, plain(weight, bits, 16).unpack())
        for method in methods:
            assert error(x, weight, method.round(linear(weight), hessian(x)).unpack()) < 0.45 * simple


def slowly(weight: Tensor, h: Tensor, grid: Grid, damping: float) -> Tensor:
    """Equation 2 of the paper, column after column with the inverse of what is left of H, in float64."""
    h = h.double() + damping * h.diagonal().mean() * torch.eye(len(h))
    w, values = weight.double().clone(), torch.empty_like(weight)
    for j in range(len(h)):
        values[:, j] = grid.round(w[:, j, None].float())[:, 0]
        inverse = h[j:, j:].inverse()
        w[:, j:] -= ((w[:, j] - values[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return values


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_it_is_the_papers_recursion(block_size: int) -> None:
    x, weight = correlated(1)
    want = slowly(weight, hessian(x), Grid.fit(weight, 4, "asymmetric"), 0.01)
    got = GPTQ(bits=4, block_size=block_size).round(linear(weight), hessian(x)).unpack()
    # A weight within rounding of the middle between two codes may go either way, and others follow it.
    assert (got - want).abs().gt(1e-5).double().mean() < 0.02
    assert torch.equal(got[:, :3], want[:, :3])


def test_the_last_code_is_the_best_there_is_for_the_ones_before() -> None:
    x, weight = correlated(2)
    x, weight = x[:, :4], weight[:, :4]
    got = GPTQ(bits=2, damping=0.0).round(linear(weight), hessian(x))
    chosen = got.codes()[:, 3].long()
    losses = []
    for code in range(4):
        w = got.unpack()
        zero = torch.zeros(48) if got.zero is None else got.zero[:, 0].float()
        w[:, 3] = got.scale[:, 0].float() * (code - zero)
        losses.append((x @ (weight - w).T).square().sum(0))
    assert torch.equal(torch.stack(losses).argmin(0), chosen)


def test_groups_are_fitted_to_updated_weights() -> None:
    x, weight = correlated(3)
    by_block = [
        GPTQ(bits=4, group=16, block_size=size).round(linear(weight), hessian(x)) for size in (16, 64)
    ]
    assert torch.equal(by_block[0].scale, by_block[1].scale)
    assert (by_block[0].unpack() - by_block[1].unpack()).abs().gt(1e-5).double().mean() < 0.02


def test_order_of_columns() -> None:
    x, weight = correlated(4)
    static = GPTQ(group=16, act_order=True, static_groups=True).round(linear(weight), hessian(x))
    assert static.order is None
    assert torch.equal(static.scale, plain(weight, 4, 16).scale)
    moved = GPTQ(group=16, act_order=True).round(linear(weight), hessian(x))
    assert moved.order is not None
    assert torch.equal(moved.order.long(), hessian(x).diagonal().argsort(descending=True, stable=True))
    assert torch.allclose(moved(x), x @ moved.unpack().T, atol=1e-4)
    assert (moved.unpack() - weight).abs().max() < 2 * weight.abs().max() / 15


def test_search_does_not_err_more_on_the_weights() -> None:
    _, weight = correlated(5)
    eye = torch.eye(64)
    errors = [
        float((GPTQ(bits=3, search=search).round(linear(weight), eye.clone()).unpack() - weight).abs()
              .pow(2.4).sum())
        for search in (False, True)
    ]  # fmt: skip
    assert errors[1] < 0.9 * errors[0]


def test_dead_columns_become_zero() -> None:
    x, weight = correlated(6)
    x[:, [3, 40]] = 0
    for method in (GPTQ(group=16), GPTQ(group=16, act_order=True), GPTQ(grid="symmetric")):
        got = method.round(linear(weight), hessian(x)).unpack()
        assert not got[:, [3, 40]].any()
        assert error(x, weight, got) < 0.01


def test_a_hessian_of_low_rank_is_damped() -> None:
    _, weight = correlated(7)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for damping in (0.01, 0.0):
        got = GPTQ(damping=damping).round(linear(weight), hessian(x)).unpack()
        assert got.isfinite().all()
        assert error(x, weight, got) < 0.01


def test_without_a_factor_it_is_plain_rounding_and_said(caplog: pytest.LogCaptureFixture) -> None:
    assert inverse_factor(-torch.eye(4), 0.01) is None
    _, weight = correlated(8)
    with caplog.at_level(logging.WARNING, "axicon"):
        got = GPTQ().round(linear(weight), -torch.eye(64), "blocks.0.qkv")
    assert torch.equal(got.unpack(), plain(weight, 4, -1).unpack())
    assert "blocks.0.qkv is rounded plainly" in caplog.text


def test_batches_add_up_and_copies_change_nothing() -> None:
    x, _ = correlated(9)
    parts, twice = Hessian(64), Hessian(64)
    for part in x.split(100):
        parts.add(part)
    for _ in range(2):
        twice.add(x)
    want = hessian(x)
    assert torch.allclose(want, 2 * x.T @ x / len(x), rtol=1e-5)
    for other in (parts.matrix("x"), twice.matrix("x")):
        assert torch.allclose(other, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("strip", [1, 24, 32, 64])
def test_strips_of_the_hessian_make_the_whole(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    monkeypatch.setattr(moments, "STRIP", strip)
    x, _ = correlated(10)
    got = hessian(x)
    assert torch.equal(got, got.T)
    assert torch.allclose(got, 2 * x.T @ x / len(x), rtol=1e-5, atol=1e-5 * float(got.abs().max()))


def decoder() -> Decoder:
    torch.manual_seed(0)
    config = {"model_type": "llama", "vocab_size": 90, "num_hidden_layers": 2, "hidden_size": 64,
              "intermediate_size": 96, "num_attention_heads": 2, "max_position_embeddings": 64}
    return Decoder(ModelShape.from_config(config)).requires_grad_(False)


SAMPLE = Calibration(torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(1)))


class TestInAModel:
    def test_rules(self) -> None:
        rules = {"*.down": {"bits": 8, "grid": "symmetric"}, "blocks.0.*": "skip"}
        model = compress(GPTQ(bits=3, group=32, rules=rules), decoder(), SAMPLE)
        assert type(model.blocks[0].down) is nn.Linear
        down, qkv = model.blocks[1].down, model.blocks[1].qkv
        assert (down.bits, down.asymmetric, qkv.bits, qkv.asymmetric) == (8, False, 3, True)

    def test_true_sequential_looks_at_rounded_products(self) -> None:
        models = [compress(GPTQ(bits=2, true_sequential=value), decoder(), SAMPLE) for value in (False, True)]
        first, second = (model.blocks[0] for model in models)
        assert torch.equal(first.qkv.qweight, second.qkv.qweight)  # it is first, and sees the same
        assert not torch.equal(first.down.qweight, second.down.qweight)

    def test_a_weight_that_is_no_number_names_the_product(self) -> None:
        model = decoder()
        model.blocks[1].out.weight[0, 0] = torch.nan
        with pytest.raises(AxiconError, match=r"gptq: blocks\.1\.out holds NaN or infinite weights"):
            compress(GPTQ(), model, SAMPLE)

    def test_inputs_that_are_no_numbers_name_the_product(self) -> None:
        model = decoder()
        model.blocks[0].attention_norm.weight.fill_(torch.inf)
        said = r"gptq: blocks\.0\.qkv: its inputs hold NaN or infinite values"
        with pytest.raises(AxiconError, match=said):
            compress(GPTQ(), model, SAMPLE)

    def test_a_group_that_does_not_divide_names_the_product(self) -> None:
        with pytest.raises(AxiconError, match=r"gptq: blocks\.0\.down: a group of 64 does not divide 96"):
            compress(GPTQ(group=64), decoder(), SAMPLE)

    @pytest.mark.parametrize(("settings", "says"), [
        ({"bits": 9}, "bits=9: must be from 2 to 8"), ({"damping": -1.0}, "at least 0"),
        ({"rules": {"*": {"damping": 1.0}}}, "known are bits, group, grid"),
    ])  # fmt: skip
    def test_settings_out_of_range(self, settings: dict[str, float], says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            GPTQ(**settings)
