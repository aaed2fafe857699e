"""Update rules against what their papers say of them: closed forms, torch's optimizers, and one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.finetune.directions import KeyedDirection
from axicon.finetune.loop import digest
from axicon.finetune.objectives.language import Language
from axicon.finetune.shards import Alone
from axicon.finetune.updates import UPDATE_RULES
from axicon.finetune.updates.forward_grad import ForwardGrad
from axicon.finetune.updates.zo_adam import ZoAdam
from axicon.finetune.updates.zo_conservative import ZoConservative
from axicon.finetune.updates.zo_momentum import ZoMomentum
from axicon.finetune.updates.zo_sgd import ZoSGD
from axicon.finetune.updates.zo_sign import ZoSign
from axicon.model.adapters import SCHEMES
from axicon.model.decoder import Decoder
from axicon.protocols import Moment
from tests.finetune.small import LLAMA, OPT, Quadratic, Vectors, decoder, empty, source

AT = Moment(0, 3)


def trained(name: str, steps: int = 3, scheme: str = "full", config: Any = None, **settings: Any) -> Decoder:
    model, rule = decoder(config), UPDATE_RULES[name](**settings)  # type: ignore[call-arg]
    SCHEMES[scheme]().install(model, AT.key)
    rule.prepare(model)
    for step in range(steps):
        rule.step(model, Language(), source().batch(step), Alone(), Moment(step, 3))
    rule.finish(model)
    return model


def bits(model: Decoder) -> str:
    return digest(dict(model.named_parameters()))


BASE: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zo_momentum", BASE | {"momentum": 0.0}),
        ("zo_sgd", BASE | {"resample": 5}),
    ],
)
def test_what_is_zo_sgd_by_other_names_has_its_bits(name: str, settings: dict[str, Any]) -> None:
    want = trained("zo_sgd", **BASE)
    assert bits(trained(name, **settings)) == bits(want)
    assert bits(want) != bits(decoder())


def test_blocks_of_one_group_are_the_whole() -> None:
    settings = {"lr": 1e-2, "eps": 1e-3}
    whole, blocks = (trained("zo_sgd", scheme="head", blocks=b, **settings) for b in (False, True))
    assert bits(whole) == bits(blocks)


def test_hybrid_between_its_ends() -> None:
    for config in (LLAMA, OPT):
        zo = trained("zo_sgd", config=config, lr=1e-3, eps=1e-3)
        assert bits(trained("hybrid", config=config, first_order=2, zo_lr=1e-3, eps=1e-3)) == bits(zo)
        fo = trained("sgd", config=config, lr=1e-2)
        all_fo = trained("hybrid", config=config, first_order=0, lr=1e-2)
        for name, p in fo.named_parameters():
            assert torch.allclose(p, all_fo.get_parameter(name), rtol=0, atol=1e-6)
        between = trained("hybrid", config=config, first_order=1, zo_lr=1e-3, eps=1e-3, lr=1e-2)
        assert bits(between) not in (bits(zo), bits(fo))


def test_weight_decay_leaves_norms_and_biases() -> None:
    """With an estimate of nothing, what moves is what decays."""
    model, rule = decoder(OPT).requires_grad_(True), ZoSGD(lr=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rule.prepare(model)
    rule.apply(model, {"loss": 0.0, "g": [0.0]}, AT)
    for name, p in model.named_parameters():
        decays = not name.endswith("bias") and "norm" not in name
        assert torch.equal(p, before[name] * 0.95 if decays else before[name])


@pytest.mark.parametrize(
    "rule",
    [
        ZoSGD(lr=0.1, weight_decay=0.5, queries=3),
        ZoMomentum(lr=0.1, weight_decay=0.5, queries=3),
        ZoAdam(lr=0.1, weight_decay=0.5, queries=3),
        ZoSign(lr=0.1, weight_decay=0.5, queries=3),
        ZoSign(lr=0.1, weight_decay=0.5, queries=3, of="estimate"),
        ForwardGrad(lr=0.1, weight_decay=0.5, queries=3),
        ZoSGD(lr=0.1, weight_decay=0.5, queries=3, direction="gaussian"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_weights_decay_once_a_step_whatever_the_queries(rule: Any) -> None:
    model = Vectors(6, 3)
    before = model.flat().detach().clone()
    rule.prepare(model)
    rule.apply(model, {"loss": 0.0, "g": [0.0] * 3}, AT)
    assert torch.equal(model.flat(), before * 0.95)


@pytest.mark.parametrize("name", sorted(UPDATE_RULES.keys() - {"zo2"}))
def test_a_schedule_is_a_factor_of_the_learning_rate(name: str) -> None:
    """Half of twice the rate is the rate, to the last bit, in everything that the rate is in."""
    settings: dict[str, Any] = {"first_order": 1} if name == "hybrid" else {"weight_decay": 0.25}
    if name == "zo_conservative":
        settings = {}
    found = []
    for factor in (1.0, 0.5):
        rates = {"lr": 2.0**-8 / factor} | ({"zo_lr": 2.0**-9 / factor} if name == "hybrid" else {})
        model, rule = decoder(), UPDATE_RULES[name](**rates, **settings)  # type: ignore[call-arg]
        SCHEMES["full"]().install(model, AT.key)
        rule.prepare(model)
        for step in range(2):
            rule.step(model, Language(), source().batch(step), Alone(), Moment(step, 3, factor))
        rule.finish(model)
        found.append(bits(model))
    assert found[0] == found[1]
    assert found[0] != bits(decoder())


def test_a_sparse_direction_keeps_its_elements_for_some_steps() -> None:
    model, rule = Vectors(500), ZoSGD(share=0.3, resample=3)
    rule.prepare(model)
    moved = []
    for step in range(6):
        [(_, z)] = rule.directions(Moment(step, 3))
        moved.append(z.values("x0", model.flat()) != 0)
    assert all(torch.equal(moved[0], one) for one in moved[1:3])
    assert all(torch.equal(moved[3], one) for one in moved[4:])
    assert not torch.equal(moved[0], moved[3])


def test_signs_of_several_estimates_are_averaged() -> None:
    model, rule = Vectors(50), ZoSign(lr=0.1, queries=2, of="estimate")
    before = model.flat().detach().clone()
    rule.prepare(model)
    rule.apply(model, {"loss": 0.0, "g": [3.0, -0.2]}, AT)
    z = [KeyedDirection(AT.key("step", 0, query)).values("x0", before).double() for query in (0, 1)]
    assert torch.allclose(model.flat(), before - 0.05 * (z[0] - z[1]), atol=1e-7)


def test_a_conservative_step_that_helps_nothing_is_none() -> None:
    class Flat:
        def loss(self, model: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch))

    model, rule = Vectors(6), ZoConservative(lr=0.1)
    rule.prepare(model)
    assert rule.measure(model, Flat(), empty(), Alone(), AT) == {"loss": 1.0, "g": [0.0], "chosen": 0.0}
    found = rule.measure(model, Quadratic(), empty(), Alone(), AT)
    assert found["loss"] == pytest.approx(Quadratic().loss(model, empty())[0].item())


def test_momentum_is_torchs() -> None:
    model, rule = Vectors(6), ZoMomentum(lr=0.01, eps=1e-3, momentum=0.9)
    twin = Vectors(6)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    follow(model, rule, twin, optimizer)


def test_adam_is_torchs() -> None:
    model, rule = Vectors(6), ZoAdam(lr=0.01, eps=1e-3)
    twin = Vectors(6)
    follow(model, rule, twin, torch.optim.Adam(twin.parameters(), lr=0.01))


def follow(model: Vectors, rule: Any, twin: Vectors, optimizer: torch.optim.Optimizer) -> None:
    rule.prepare(model)
    for step in range(8):
        at = Moment(step, 3)
        scalars = rule.measure(model, Quadratic(), empty(), Alone(), at)
        [g] = scalars["g"]
        z = KeyedDirection(at.key("step", step, 0))
        for name, p in twin.named_parameters():
            p.grad = g * z.values(name, p).double()
        rule.apply(model, scalars, at)
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, twin.get_parameter(name), rtol=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("of", ["elements", "estimate"])
def test_signs(kind: Any, of: Any) -> None:
    model, rule = Vectors(9), ZoSign(lr=0.25, of=of, direction=kind)
    before = model.flat().detach().clone()
    rule.prepare(model)
    rule.apply(model, {"loss": 1.0, "g": [-3.0]}, AT)
    z = KeyedDirection(AT.key("step", 0, 0), kind).values("x0", before)
    want = z.sign() if of == "elements" else z
    assert torch.allclose(model.flat() - before, 0.25 * want.double())


def test_a_conservative_step_never_raises_the_loss_of_its_batch() -> None:
    chosen = []
    for lr in (0.05, 5.0):
        model, rule = Vectors(12), ZoConservative(lr=lr, eps=1e-3)
        rule.prepare(model)
        for step in range(30):
            at, before = Moment(step, 3), loss(model)
            scalars = rule.measure(model, Quadratic(), empty(), Alone(), at)
            rule.apply(model, scalars, at)
            assert loss(model) <= before
            chosen.append(scalars["chosen"])
    assert set(chosen) >= {0.0, 1.0}


def loss(model: Vectors) -> float:
    return float(Quadratic().loss(model, empty(1)).detach())


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_forward_gradients_are_slopes(config: Any, scheme: str) -> None:
    model = decoder(config).double()
    SCHEMES[scheme]().install(model, AT.key)
    model.double()
    batch = source().batch(0)
    rule = ForwardGrad()
    rule.prepare(model)
    found = rule.measure(model, Language(), batch, Alone(), AT)
    [c] = found["g"]  # type: ignore[misc]
    total: Tensor = Language().loss(model, batch).mean()
    total.backward()
    z = KeyedDirection(AT.key("step", 0, 0))
    slopes = [(z.values(n, p) * p.grad).sum() for n, p in model.named_parameters() if p.grad is not None]
    assert c == pytest.approx(float(sum(slopes)), rel=1e-4)
    assert found["loss"] == pytest.approx(float(total.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("zo_conservative", {"queries": 2}, "no queries"),
        ("zo_momentum", {"momentum": 1.0}, "momentum"),
        ("zo_adam", {"beta1": 1.0}, "beta1"),
        ("forward_grad", {"one_sided": True}, "one_sided"),
        ("adamw", {"lr": 0.0}, "lr"),
        ("sgd", {"momentum": -1.0}, "momentum"),
        ("hybrid", {"first_order": -1}, "first_order"),
        ("zo_sgd", {"share": 0.0}, "share"),
    ],
)
def test_settings_that_mean_nothing(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UPDATE_RULES[name](**settings)
    assert replace(AT, step=1).key("a") == AT.key("a")
