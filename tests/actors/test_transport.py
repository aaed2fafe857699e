"""The process group between two plain processes, on loopback: what arrives, and what if nothing does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from actors.transport import INLINE, LOOK_S, Lost, Op, RankFailed, Transport, open_meeting
from axicon.step import StepInput
from tests import forkserver
from tests.actors.peer import follow, listening

Pair = tuple[Transport, multiprocessing.process.BaseProcess]


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    """Rank 0 here and rank 1 in another process, with this time-out."""
    started: list[Pair] = []

    def start(timeout_s: float = 60.0) -> Pair:
        meeting, store = open_meeting(2, "127.0.0.1", timeout_s)
        ready = forkserver.context().Event()
        process = forkserver.started(follow, meeting, ready)
        assert ready.wait(60)
        started.append((Transport(meeting, 0, store), process))
        return started[-1]

    yield start
    for link, process in started:
        link.leave()
        process.kill()
        process.join()


def a_step(nodes: int) -> StepInput:
    numbers = torch.arange(nodes)
    flags = numbers % 3 == 0
    return StepInput(
        numbers + 7, numbers, numbers * 0, numbers - 1, flags, numbers * 0, ~flags,
        commits=(0, 2), releases=(5,), reserves=((0, 64),),
    )  # fmt: skip


def test_steps_and_frames_arrive_whole(pair: Callable[..., Pair]) -> None:
    before = listening()
    link, process = pair()
    assert {address.split(":")[0] for address in listening() - before} == {"127.0.0.1"}
    link.announce(Op.IDLE)
    outside, size = link.receive(1, (2,), torch.int64).tolist()
    assert (outside, size) == (0, 0)
    for nodes in (1, 3, 64, (INLINE - 11) // 7, (INLINE - 11) // 7 + 1, 700):
        packed = a_step(nodes).pack()
        link.announce(Op.STEP, packed)
        assert torch.equal(link.receive(1, (len(packed),), torch.int64), packed)
        x = torch.randn(nodes, 3).bfloat16()
        link.send(1, x)
        assert torch.equal(link.receive(1, (nodes, 3), torch.bfloat16), x * 2)
    link.announce(Op.STOP)
    process.join(10)
    assert process.exitcode == 0


def test_a_failure_travels_in_place_of_the_tensor_and_the_group_goes_on(pair: Callable[..., Pair]) -> None:
    link, _ = pair()
    packed = a_step(5).pack()
    x = torch.ones(5, 3, dtype=torch.bfloat16)
    for failed in (0, None, 0):
        link.announce(Op.STEP, packed)
        link.receive(1, (len(packed),), torch.int64)
        link.send(1, x, failed)
        if failed is None:
            assert torch.equal(link.receive(1, (5, 3), torch.bfloat16), x * 2)
            continue
        with pytest.raises(RankFailed) as error:
            link.receive(1, (5, 3), torch.bfloat16)
        assert error.value.rank == 0


def test_a_killed_rank_is_noticed_at_once(pair: Callable[..., Pair]) -> None:
    link, process = pair()
    threading.Timer(0.3, process.kill).start()
    started = time.monotonic()
    with pytest.raises(Lost, match="rank 0 lost the group: a connection was closed"):
        link.receive(1, (5,), torch.int64)
    assert time.monotonic() - started < 10
    with pytest.raises(Lost):
        link.announce(Op.IDLE)


def test_a_silent_rank_costs_the_time_out(pair: Callable[..., Pair]) -> None:
    link, process = pair(2.0)
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(Lost, match="rank 0 lost the group: no answer within 2 s"):
        link.receive(1, (5,), torch.int64)
    assert 1.9 < time.monotonic() - started < 10


def test_an_announcement_that_never_ends_stops_when_a_rank_is_missing(pair: Callable[..., Pair]) -> None:
    link, process = pair()
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    answers = iter(["", "", "rank 1 is gone"])
    link._missing = lambda: next(answers)
    started = time.monotonic()
    with pytest.raises(Lost, match="rank 0 lost the group: rank 1 is gone"):
        link.announce(Op.IDLE)
    assert 3 * LOOK_S <= time.monotonic() - started < 10
    process.kill()  # or leaving the group waits for it


def test_leaving_ends_what_the_others_wait_for(pair: Callable[..., Pair]) -> None:
    link, process = pair()
    link.leave()
    process.join(10)
    assert process.exitcode == 1
    with pytest.raises(Lost, match="rank 0 has left the group"):
        link.announce(Op.IDLE)


def test_a_rank_that_nobody_meets_gives_up() -> None:
    meeting, store = open_meeting(2, "127.0.0.1", 0.5)
    with pytest.raises(Lost, match=r"rank 0 of 2 found no group: no answer within 0\.5 s"):
        Transport(meeting, 0, store)
    del store
    with pytest.raises(Lost, match="rank 1 of 2 found no group"):
        Transport(meeting, 1)


def test_messages_of_another_version_are_refused() -> None:
    """Both ranks in threads of this process: nothing about a group is global."""
    meeting, store = open_meeting(2, "127.0.0.1", 20.0)
    told: list[Exception] = []

    def other() -> None:
        link = Transport(meeting, 1)
        try:
            link.listen()
        except ValueError as error:
            told.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    link = Transport(meeting, 0, store)
    link._broadcast(torch.tensor([7, Op.IDLE, 0, *[0] * INLINE]))
    thread.join()
    assert [str(error) for error in told] == ["message version 7, this process speaks 1"]
