"""Catching up with a run from its log, while it goes on and after it was killed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from axicon.errors import AxiconError
from axicon.finetune.estimate import trained
from axicon.finetune.follow import Follower, LoraRun, adapters_of
from axicon.finetune.log import EARLIER, Log, Tail
from axicon.finetune.loop import Earlier, Run, digest, is_scalar, schedule, train
from axicon.finetune.objectives.language import Language
from axicon.finetune.shards import Alone
from axicon.finetune.updates import UPDATE_RULES
from axicon.finetune.updates.zo_adam import ZoAdam
from axicon.finetune.updates.zo_momentum import ZoMomentum
from axicon.model.adapters import Lora, adapted
from axicon.model.decoder import Decoder
from axicon.protocols import Moment
from tests.finetune.small import OPT, decoder, source


def model_of() -> Decoder:
    model = decoder()
    Lora().install(model, Moment(0, 5).key)
    return model


def test_a_model_follows_a_run(tmp_path: Path) -> None:
    path, leader = tmp_path / "log.jsonl", model_of()
    follower = None
    seen = []
    with Log(path, {}) as log:
        run = Run(
            model=leader, rule=ZoMomentum(lr=0.1), objective=Language(), source=source(), mean=Alone(),
            log=log, steps=7, seed=5,
        )  # fmt: skip

        def after(steps: int, loss: float | None) -> None:
            nonlocal follower
            if steps == 2:
                follower = Follower(Tail(path), model_of(), ZoMomentum(lr=0.1), seed=5)
            if follower is not None and steps % 2 == 0:
                with path.open("ab") as file:
                    file.write(b'{"step"')  # half a line, as while it is written
                seen.append(follower.catch_up())
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size - 7)
                if steps == 6:
                    want = digest(dict(leader.named_parameters()))
                    assert digest(dict(follower.model.named_parameters())) == want

        train(run, after)
    assert follower is not None
    assert seen == [2, 2, 2]
    assert follower.catch_up() == 1
    assert follower.catch_up() == 0
    assert digest(dict(follower.model.named_parameters())) == digest(dict(leader.named_parameters()))
    assert digest(dict(leader.named_parameters())) != digest(dict(model_of().named_parameters()))
    path.write_bytes(b"")
    with pytest.raises(AxiconError, match="another run now"):
        follower.catch_up()


CASES: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    *((name, {}, None) for name, rule in UPDATE_RULES.items() if is_scalar(rule()) and name != "zo2"),
    ("zo_sgd", {"queries": 2, "weight_decay": 0.1, "blocks": True, "direction": "gaussian"}, None),
    ("zo_sgd", {"direction": "official", "share": 0.5}, OPT),
]

SCHEME = Lora(r=3, targets=("q", "v", "down"))
BEGUN = {"base": "b" * 64, "seed": 5, "scheme": {"name": "Lora", **dataclasses.asdict(SCHEME)}}


def taken_by(rule: Any) -> dict[str, Any]:
    """As the first line of a log has it."""
    return {
        "rule": {"name": type(rule).__name__, **dataclasses.asdict(rule)},
        "schedule": {"kind": "linear", "warmup": 1, "steps": 4},
    }


@pytest.mark.parametrize(("name", "settings", "shape"), CASES)
def test_adapters_follow_without_the_model_beneath(
    tmp_path: Path, name: str, settings: dict[str, Any], shape: dict[str, Any] | None
) -> None:
    """From the log alone: every bit of every rule's adapters, under the names they have in the run."""
    rule, leader = UPDATE_RULES[name](lr=0.1, **settings), decoder(shape)
    SCHEME.install(leader, Moment(0, 5).key)
    with Log(tmp_path / "log.jsonl", BEGUN | taken_by(rule)) as log:
        run = Run(
            model=leader, rule=rule, objective=Language(), source=source(), mean=Alone(), log=log, steps=4,
            seed=5, schedule=schedule("linear", 1, 4),
        )  # fmt: skip
        train(run)
        log.append(None)  # a step that was skipped is one
    found = LoraRun.of(tmp_path)
    assert found.base == "b" * 64
    follower = found.follower(leader.shape)
    assert follower.look() == 5
    assert [follower.advance(0), follower.steps, follower.behind] == [1, 1, 4]
    early = follower.digest
    assert follower.advance() == 4
    assert follower.digest != early
    assert digest(trained(follower.model)) == digest(trained(leader))
    pairs = adapters_of(follower, found.base).pairs
    for index, place, product in adapted(leader):
        for (part, rows), pair in zip(product.parts.items(), pairs[index, place], strict=True):
            a, b = product.pair(part)
            assert pair.rows == rows
            assert torch.equal(pair.a_RI, a)
            assert torch.equal(pair.b_OR, b * product.scale)
    assert not any(p.is_meta for p in trained(follower.model).values())
    assert all(p.is_meta for p in follower.model.parameters() if not p.requires_grad)


def test_a_run_that_began_behind_another_one(tmp_path: Path) -> None:
    """Each part by its own settings, and moments handed on."""
    factors = schedule("linear", 1, 4)
    runs: list[tuple[float, dict[str, Any], list[Earlier]]] = [
        (0.1, {}, []),
        (0.02, {EARLIER: [{"until": 3, **taken_by(ZoAdam(lr=0.1))}]}, [Earlier(3, ZoAdam(lr=0.1), factors)]),
    ]
    taken: list[Any] = []
    for lr, more, earlier in runs:
        leader, path = decoder(), tmp_path / str(lr)
        path.mkdir()
        SCHEME.install(leader, Moment(0, 5).key)
        with Log(path / "log.jsonl", BEGUN | taken_by(ZoAdam(lr=lr)) | more) as log:
            for scalars in taken:
                log.append(scalars)
            run = Run(
                model=leader, rule=ZoAdam(lr=lr), objective=Language(), source=source(), mean=Alone(),
                log=log, steps=len(taken) + 3, seed=5, schedule=factors, earlier=earlier,
            )  # fmt: skip
            train(run)
            taken = list(log.steps)
        follower = LoraRun.of(path).follower(leader.shape)
        assert follower.catch_up() == len(taken)
        assert digest(trained(follower.model)) == digest(trained(leader))
    unaware = Follower(Tail(path / "log.jsonl"), leader, ZoAdam(lr=0.1), seed=5)
    with pytest.raises(AxiconError, match="begins with steps of another run"):
        unaware.catch_up()
