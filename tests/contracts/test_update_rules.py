"""What every update rule promises, over the table of rules."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.checkpoint import TensorCheckpoints
from axicon.finetune.log import Log, read
from axicon.finetune.loop import Run, digest, is_scalar, replay, train
from axicon.finetune.objectives import OBJECTIVES
from axicon.finetune.shards import Alone
from axicon.finetune.updates import UPDATE_RULES
from axicon.model.adapters import SCHEMES
from axicon.model.decoder import Decoder
from axicon.protocols import Moment, UpdateRule
from tests.finetune.small import decoder, source

SETTINGS = {"hybrid": {"first_order": 1}}
"""Where the defaults do not fit a model of two blocks."""
SCALAR = [name for name, cls in UPDATE_RULES.items() if hasattr(cls, "measure")]
SEED = 7


def rule_of(name: str) -> UpdateRule:
    return UPDATE_RULES[name](**SETTINGS.get(name, {}))  # type: ignore[call-arg]


def model_of(scheme: str = "lora") -> Decoder:
    model = decoder()
    SCHEMES[scheme]().install(model, Moment(0, SEED).key)
    return model


def run(
    name: str, folder: Path, steps: int, model: Decoder, shards: int = 1
) -> tuple[UpdateRule, list[object]]:
    rule = rule_of(name)
    folder.mkdir(exist_ok=True)
    with Log(folder / "log.jsonl", {"rule": name}) as log:
        train(
            Run(
                model=model,
                rule=rule,
                objective=OBJECTIVES["language"](),
                source=source(),
                mean=Alone(shards),
                log=log,
                steps=steps,
                seed=SEED,
                checkpoints=TensorCheckpoints(folder, 2),
            )
        )
        return rule, list(log.steps)


def state(model: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", UPDATE_RULES)
@pytest.mark.parametrize("scheme", ["lora", "full", "head"])
def test_only_what_trains_moves_and_nothing_is_left_behind(name: str, scheme: str, tmp_path: Path) -> None:
    model = model_of(scheme)
    before = state(model)
    run(name, tmp_path, 2, model)
    after = state(model)
    assert after.keys() == before.keys()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trains
    assert len(moved) >= len(trains) / 3
    assert all(p.grad is None for p in model.parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_going_on_is_the_same_as_never_stopping(name: str, tmp_path: Path) -> None:
    whole, parts = model_of(), model_of()
    _, steps = run(name, tmp_path / "whole", 5, whole)
    run(name, tmp_path / "parts", 3, parts)
    parts = model_of()
    _, again = run(name, tmp_path / "parts", 5, parts)
    assert again == steps
    assert digest(state(parts)) == digest(state(whole))
    assert read(tmp_path / "parts" / "log.jsonl")[1] == steps
    parts = model_of()
    _, third = run(name, tmp_path / "parts", 5, parts)
    assert third == steps
    assert digest(state(parts)) == digest(state(whole))


@pytest.mark.parametrize("name", [name for name in UPDATE_RULES if name not in SCALAR])
def test_steps_behind_the_newest_checkpoint_are_taken_again(name: str, tmp_path: Path) -> None:
    whole, parts = model_of(), model_of()
    _, steps = run(name, tmp_path / "whole", 5, whole)
    run(name, tmp_path / "parts", 2, parts)
    with Log(tmp_path / "parts" / "log.jsonl", {"rule": name}) as log:
        log.append({"loss": 1.0})
    parts = model_of()
    run(name, tmp_path / "parts", 5, parts)
    assert read(tmp_path / "parts" / "log.jsonl")[1] == steps
    assert digest(state(parts)) == digest(state(whole))
    with pytest.raises(AxiconError, match="5 were taken already"):
        run(name, tmp_path / "parts", 4, model_of())


@pytest.mark.parametrize("name", SCALAR)
def test_a_log_is_the_run(name: str, tmp_path: Path) -> None:
    model, rule = model_of(), rule_of(name)
    _, steps = run(name, tmp_path, 4, model)
    for count in (2, 4):
        if count == 2:
            model = model_of()
            run(name, tmp_path / "two", 2, model)
        made = model_of()
        rule.prepare(made)
        assert is_scalar(rule)
        replay(made, rule, steps[:count], SEED, lambda step: 1.0)  # type: ignore[arg-type]
        rule.finish(made)
        if count == 2:
            assert digest(state(made)) == digest(state(model))
    assert digest(state(made)) != digest(state(model))


@pytest.mark.parametrize("name", SCALAR)
def test_measuring_moves_nothing(name: str) -> None:
    model, rule = model_of("full"), rule_of(name)
    before = state(model)
    rule.prepare(model)
    assert is_scalar(rule)
    found = rule.measure(model, OBJECTIVES["language"](), source().batch(0), Alone(), Moment(0, SEED))
    rule.finish(model)
    assert {"loss", "g"} <= found.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Broken:
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return OBJECTIVES["language"]().loss(model, batch) * math.nan


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_a_loss_that_is_no_number_moves_nothing(name: str, tmp_path: Path) -> None:
    model = model_of()
    before = digest(state(model))
    with Log(tmp_path / "log.jsonl", {}) as log:
        train(
            Run(
                model=model,
                rule=rule_of(name),
                objective=Broken(),
                source=source(),
                mean=Alone(),
                log=log,
                steps=2,
                seed=SEED,
            )
        )
        assert log.steps == [None, None]
    assert digest(state(model)) == before


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_shards_sum_to_the_batch(name: str, tmp_path: Path) -> None:
    one, four = model_of(), model_of()
    _, [alone] = run(name, tmp_path / "one", 1, one)
    _, [shared] = run(name, tmp_path / "four", 1, four, shards=4)
    assert isinstance(alone, dict)
    assert isinstance(shared, dict)
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
