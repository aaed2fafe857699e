"""Binary codes as a method: plain rounding beaten without data and with it, the loop, and its edges."""

from __future__ import annotations

import pytest
import torch

from axicon.compress.binary_code import BinaryCode
from axicon.compress.calibration import Calibration
from axicon.compress.columns import inverse_factor
from axicon.compress.gptq import GPTQ
from axicon.compress.grid import Grid, groups_of
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.binary_code import BinaryCodeLinear
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape
from tests.compress.cases import correlated, error, hessian, linear

LOOP = {"compensate": True, "importance": "hessian_diag"}
ORDERED = LOOP | {"act_order": True}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_of_the_way_is_better(bits: int, seed: int) -> None:
    """Plain rounding, binary codes, with the inputs' squares, in the loop; and better there than GPTQ."""
    x, weight = correlated(seed)

    def of(**settings: object) -> float:
        method = BinaryCode(bits=bits, group=16, **settings)  # type: ignore[arg-type]
        return error(x, weight, method.fit(linear(weight), hessian(x)).unpack())

    grid = Grid.fit(groups_of(weight, 16), bits, "asymmetric")
    rounded = error(x, weight, grid.round(groups_of(weight, 16)).view_as(weight))
    gptq = error(x, weight, GPTQ(bits=bits, group=16).round(linear(weight), hessian(x)).unpack())
    plain, weighted, loop, ordered = of(), of(importance="hessian_diag"), of(**LOOP), of(**ORDERED)
    assert plain < 0.8 * rounded
    assert weighted < 0.8 * plain
    assert loop < 0.7 * weighted
    assert loop < 0.8 * gptq
    assert ordered < 0.7 * weighted


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("offset", ["fit", "none"])
def test_without_correlations_the_loop_changes_nothing(group: int, offset: str) -> None:
    _, weight = correlated(0)
    settings = {"bits": 3, "group": group, "offset": offset}
    plain = BinaryCode(**settings).fit(linear(weight))  # type: ignore[arg-type]
    loop = BinaryCode(compensate=True, **settings).fit(linear(weight), torch.linspace(1, 5, 64).diag())  # type: ignore[arg-type]
    assert torch.equal(plain.unpack(), loop.unpack())
    assert (plain.offset is None) == (offset == "none")
    assert torch.equal(plain.planes, loop.planes)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_the_loop_against_the_equations(block_size: int) -> None:
    """Column by column: the group's levels when its first column comes, the nearest of them, and the error
    over the factor's diagonal times the factor's row taken from all that follow."""
    x, weight = correlated(1)
    method = BinaryCode(bits=2, group=16, block_size=block_size, **LOOP)  # type: ignore[arg-type]
    got = method.fit(linear(weight), hessian(x)).unpack()
    factor, rest, want = inverse_factor(hessian(x), 0.01), weight.clone(), torch.empty_like(weight)
    assert factor is not None
    for k in range(64):
        if k % 16 == 0:
            importance = factor.diagonal()[k : k + 16].square().reciprocal()[None]
            planes = method._planes(rest[:, k : k + 16].contiguous(), importance)
        want[:, k] = (planes.levels - rest[:, k, None]).abs().argmin(1)
        want[:, k] = planes.levels.gather(1, want[:, k, None].long())[:, 0]
        rest[:, k:] -= ((rest[:, k] - want[:, k]) / factor[k, k])[:, None] * factor[k, k:]
    assert torch.isclose(got, want, atol=1e-5).float().mean() > 0.99
    assert error(x, weight, got) == pytest.approx(error(x, weight, want), rel=0.02)


@pytest.mark.parametrize("group", [16, -1])
def test_the_ordered_loop_against_the_equations(group: int) -> None:
    """Levels of all groups beforehand; then the columns by the size of their inputs, the largest first."""
    x, weight = correlated(1)
    x[:, 7] = 0
    method = BinaryCode(bits=2, group=group, block_size=7, **ORDERED)  # type: ignore[arg-type]
    got = method.fit(linear(weight), hessian(x)).unpack()
    weight[:, 7] = 0
    matrix, width = hessian(x), group if group > 0 else 64
    planes = method._planes(groups_of(weight, group), method._importance(weight, matrix))
    levels = planes.levels.view(48, 64 // width, 4)
    matrix[7, 7] = 1
    order = matrix.diagonal().argsort(descending=True).tolist()
    factor = inverse_factor(matrix[order][:, order], 0.01)
    rest, want = weight.clone(), torch.empty_like(weight)
    assert factor is not None
    for place, k in enumerate(order):
        nearest = (levels[:, k // width] - rest[:, k, None]).abs().argmin(1, keepdim=True)
        want[:, k] = levels[:, k // width].gather(1, nearest)[:, 0]
        off = (rest[:, k] - want[:, k]) / factor[place, place]
        rest[:, order[place:]] -= off[:, None] * factor[place, place:]
    assert torch.isclose(got, want, atol=1e-5).float().mean() > 0.99
    assert error(x, weight, got) == pytest.approx(error(x, weight, want), rel=0.02)


def test_magnitudes_as_importance_favour_large_weights() -> None:
    _, weight = correlated(2)
    large = weight.abs() > 2
    def lost(importance: str) -> float:
        method = BinaryCode(bits=2, group=16, importance=importance)  # type: ignore[arg-type]
        return float((method.fit(linear(weight)).unpack() - weight)[large].square().sum())

    assert lost("magnitude") < 0.9 * lost("none")


def test_columns_without_inputs_become_something_small() -> None:
    x, weight = correlated(0)
    x[:, 5] = 0
    got = BinaryCode(bits=3, group=16, **LOOP).fit(linear(weight), hessian(x)).unpack()  # type: ignore[arg-type]
    assert error(x, weight, got) < 0.05
    assert got.isfinite().all()


def test_inputs_without_rank_are_damped(caplog: pytest.LogCaptureFixture) -> None:
    _, weight = correlated(0)
    loop = BinaryCode(bits=3, group=16, damping=0.0, compensate=True)
    assert loop.fit(linear(weight), torch.ones(64, 64), "blocks.0.out").unpack().isfinite().all()
    assert loop.fit(linear(weight), -torch.ones(64, 64), "blocks.0.out").unpack().isfinite().all()
    assert "blocks.0.out has nothing made good" in caplog.text


CONFIG = {
    "model_type": "llama", "vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0)))


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)


def test_rules_and_the_head() -> None:
    rules = {"*.down": {"bits": 2, "group": 32}, "blocks.0.out": "skip"}
    method = BinaryCode(bits=3, group=16, head="int8", rules=rules, **LOOP)  # type: ignore[arg-type]
    model = compress(method, decoder(), SAMPLE)
    found = {name: (m.bits, m.group) for name, m in model.named_modules() if isinstance(m, BinaryCodeLinear)}
    assert found == {
        "blocks.0.qkv": (3, 16), "blocks.0.gate_up": (3, 16), "blocks.0.down": (2, 32),
        "blocks.1.qkv": (3, 16), "blocks.1.out": (3, 16), "blocks.1.gate_up": (3, 16),
        "blocks.1.down": (2, 32),
    }  # fmt: skip


@pytest.mark.parametrize(("settings", "needs"), [
    ({}, False), ({"importance": "magnitude"}, False), ({"importance": "hessian_diag"}, True),
    ({"compensate": True}, True),
])  # fmt: skip
def test_only_some_settings_look_at_data(settings: dict[str, object], needs: bool) -> None:
    method = BinaryCode(bits=3, group=16, **settings)  # type: ignore[arg-type]
    assert method.needs_inputs == needs
    compress(method, decoder(), SAMPLE if needs else None)


@pytest.mark.parametrize(("settings", "says"), [
    ({"bits": 5}, "bits=5: known are 2, 3 and 4"), ({"rounds": -1}, "at least 0"),
    ({"block_size": 0}, "at least"),
    ({"compensate": True, "importance": "magnitude"}, "none or hessian_diag"),
    ({"act_order": True}, "needs compensate"),
    ({"rules": {"*": {"rounds": 3}}}, "unknown key 'rounds'"), ({"rules": {"*": {"bits": 8}}}, "bits=8"),
])  # fmt: skip
def test_settings_are_checked(settings: dict[str, object], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        BinaryCode(**settings)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_is_named() -> None:
    with pytest.raises(AxiconError, match=r"binary_code: blocks\.0\.qkv: a group of 48 does not divide 64"):
        compress(BinaryCode(group=48), decoder())


def test_damaged_weights_are_named() -> None:
    model = decoder()
    model.blocks[1].out.weight[3, 3] = torch.nan
    with pytest.raises(AxiconError, match=r"binary_code: blocks\.1\.out holds NaN"):
        compress(BinaryCode(bits=3, group=16), model)
