"""A shard that follows a rank 0 played by the test, both in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from actors.shard import Shard, StageSettings
from actors.transport import Lost, Op, RankFailed, Transport, open_meeting
from axicon.errors import AxiconError
from axicon.generate.runner import LocalRunner
from axicon.step import STEP_VERSION, StepInput
from tests.parity import variants

Group = tuple[Transport, LocalRunner, Shard]
SETTINGS = {"dtype": "float32", "max_rows": 4, "prefill_chunk": 16, "kv_bytes": 4 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    variants.saved("llama_grouped", folder)
    return folder


@pytest.fixture
def group(model: Path) -> Iterator[Group]:
    """Rank 0's link and stage, and the shard behind it that joined."""
    first = StageSettings(model=str(model), first=0, last=1, **SETTINGS).runner()
    shard = Shard()
    shard.load(StageSettings(model=str(model), first=1, last=3, **SETTINGS))
    meeting, store = open_meeting(2, "127.0.0.1", 20.0)
    joining = threading.Thread(target=shard.join, args=(meeting, 1))
    joining.start()
    link = Transport(meeting, 0, store)
    joining.join()
    yield link, first, shard
    link.leave()
    shard._thread.shutdown()


def step(first: int, count: int, **lists: object) -> StepInput:
    """Nodes of row 0 in a chain, from position `first` on; the logits of the last are wanted."""
    positions = torch.arange(first, first + count)
    parents = torch.arange(-1, count - 1)
    wanted = torch.arange(count) == count - 1
    return StepInput(
        positions % 90 + 3, positions, positions * 0, parents, wanted, positions * 0, wanted, **lists
    )


def drive(link: Transport, first: LocalRunner, one: StepInput) -> torch.Tensor:
    """What rank 0 does with a step."""
    link.announce(Op.STEP, one.pack())
    checked = first.check(one)
    first.apply(checked)
    link.send(1, first.compute(checked))
    return link.receive(1, (int(one.wanted_N.sum()), 97), torch.float32)


OPENING = {"reserves": ((0, 64),)}


def test_a_shard_computes_the_rest_of_the_model(group: Group, model: Path) -> None:
    link, first, shard = group
    whole = StageSettings(model=str(model), first=0, last=3, **SETTINGS).runner()
    steps = [step(0, 9, **OPENING), step(9, 1, commits=tuple(range(9))), step(10, 4, commits=(0,))]
    for one in steps:
        link.announce(Op.IDLE)
        assert torch.equal(drive(link, first, one), whole.forward(one).logits_WV)
    link.announce(Op.STEP, step(0, 0, commits=(0, 1), releases=(0,)).pack())
    link.announce(Op.STOP)
    assert shard._following is not None
    shard._following.result(10)
    assert shard._runner is not None
    assert not shard._runner.cache.rows
    assert shard.ping() == ""


def test_a_step_that_fails_in_the_shard_is_told_and_the_next_one_works(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, first, shard = group
    assert shard._runner is not None
    good: Callable[..., torch.Tensor] = shard._runner.compute

    def bad(*_: object) -> torch.Tensor:
        raise MemoryError("no more extents")

    monkeypatch.setattr(shard._runner, "compute", bad)
    with pytest.raises(RankFailed) as error:
        drive(link, first, step(0, 9, **OPENING))
    assert error.value.rank == 1
    assert shard.ping() == "MemoryError: no more extents"
    monkeypatch.setattr(shard._runner, "compute", good)
    first.unstage()
    drive(link, first, step(0, 9))


def test_what_failed_before_the_shard_is_passed_on(group: Group) -> None:
    link, _, shard = group
    link.announce(Op.STEP, step(0, 9, **OPENING).pack())
    link.send(1, torch.zeros(9, 48), failed=0)
    with pytest.raises(RankFailed) as error:
        link.receive(1, (1, 97), torch.float32)
    assert error.value.rank == 0
    assert shard.ping() == ""


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (step(5, 1).pack(), "ValueError: nodes 0..0: request row 0 is not open"),
        (torch.tensor([STEP_VERSION + 1, *step(5, 1).pack()[1:]]), f"StepInput version {STEP_VERSION + 1}"),
    ],
)
def test_a_shard_that_cannot_follow_leaves(group: Group, packed: torch.Tensor, said: str) -> None:
    link, _, shard = group
    link.announce(Op.STEP, packed)
    with pytest.raises(Lost):
        link.receive(1, (1, 97), torch.float32)
    assert said in shard.ping()


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    shard = Shard()
    with pytest.raises(AxiconError, match="no such file"):
        shard.load(StageSettings(model=str(tmp_path / "nothing"), first=0, last=1))
    with pytest.raises(RuntimeError, match="join before load"):
        shard.join(open_meeting(2, "127.0.0.1", 1.0)[0], 1)
