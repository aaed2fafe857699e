"""The engine thread: where work happens, how it ends, and what is said of its health."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from axicon.errors import AxiconError
from axicon.generate.engine import Engine
from axicon.generate.request import Limits, Overloaded, Request, RequestError, SamplingParams
from axicon.generate.runner import LocalRunner
from axicon.generate.thread import EngineThread
from axicon.generate.watchdog import FIRST_LOOK, FIRST_PAUSE_S, WINDOW, StepWatchdog, ThreadPolicy


def request(name, choice=0, prompt=(5, 6, 7), **params):
    params = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True} | params
    return Request(id=name, prompt=prompt, params=SamplingParams(**params), choice=choice)


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


class Receiver:
    """Collects deltas and knows when all of its requests have ended."""

    def __init__(self, count=1):
        self.deltas, self.left, self.ended = [], count, threading.Event()
        self.threads = set()

    def __call__(self, delta):
        self.threads.add(threading.current_thread().name)
        self.deltas.append(delta)
        if delta.finish_reason:
            self.left -= 1
            if self.left == 0:
                self.ended.set()

    def reasons(self):
        assert self.ended.wait(20)
        return [d.finish_reason for d in self.deltas if d.finish_reason]


@pytest.fixture
def make_thread(decoder64, letters):
    threads = []

    def make(runner=None, **options):
        def build():
            local = runner or LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
            return Engine(local, letters, eos_ids=[1], limits=Limits(max_queue=4))

        threads.append(EngineThread(build, **options))
        return threads[-1]

    yield make
    for thread in threads:
        thread.close(20)


class Gate:
    """A runner that waits in every forward pass until it is let through."""

    def __init__(self, decoder):
        self.runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
        self.capacity, self.fingerprint = self.runner.capacity, self.runner.fingerprint
        self.slots_reserved = self.runner.slots_reserved
        self.open = threading.Event()
        self.error = None

    def forward(self, step):
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        return self.runner.forward(step)


def test_requests_from_many_threads_are_all_answered(make_thread):
    thread = make_thread()
    thread.start(30)
    receivers = [Receiver() for _ in range(8)]

    def submit(i):
        thread.submit(request(str(i), prompt=(i + 2, 3)), receivers[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(submit, range(8)))
    for i, receiver in enumerate(receivers):
        assert receiver.reasons() == ["length"]
        assert {d.request_id for d in receiver.deltas} == {str(i)}
        assert receiver.threads == {"axicon-engine"}
    assert thread.stats().finished_total == {"length": 8}
    assert thread.fingerprint.startswith("axicon-")
    assert eventually(lambda: thread.healthy(0.0)), "nothing to do is not a stall"


def test_loading_happens_in_the_thread_and_its_error_reaches_start():
    seen = []

    def build():
        seen.append(threading.current_thread().name)
        raise AxiconError("no such model")

    thread = EngineThread(build)
    with pytest.raises(AxiconError, match="no such model"):
        thread.start(20)
    assert seen == ["axicon-engine"]
    assert isinstance(thread.error, AxiconError)
    assert not thread.healthy(60)
    thread.close(20)


def test_start_gives_up_after_its_timeout():
    release = threading.Event()

    def build():
        release.wait(20)
        raise AxiconError("too late")

    thread = EngineThread(build)
    with pytest.raises(TimeoutError):
        thread.start(0.05)
    release.set()
    thread.close(20)


def test_refusals_reach_the_caller_and_all_or_none_are_queued(make_thread, decoder64):
    gate = Gate(decoder64)
    thread = make_thread(gate)
    thread.start(30)
    receiver = Receiver(8)
    with pytest.raises(RequestError):
        thread.submit(request("a", max_tokens=-1), receiver)
    thread.submit_all([request("a", choice=i) for i in range(6)], receiver)
    with pytest.raises(Overloaded):
        thread.submit_all([request("b", choice=i) for i in range(3)], receiver)
    thread.submit_all([request("b", choice=i) for i in range(2)], receiver)
    gate.open.set()
    assert receiver.reasons() == ["length"] * 8
    assert thread.stats().finished_total == {"length": 8}


def test_a_second_request_of_the_same_name_is_refused_and_the_first_goes_on(make_thread, decoder64):
    gate = Gate(decoder64)
    thread = make_thread(gate)
    thread.start(30)
    first, second = Receiver(), Receiver()
    thread.submit(request("a"), first)
    for again in ([request("a")], [request("b"), request("b")]):
        with pytest.raises(RequestError, match="already running"):
            thread.submit_all(again, second)
    gate.open.set()
    assert first.reasons() == ["length"]
    assert second.deltas == []


def test_cancel_from_another_thread(make_thread, decoder64):
    gate = Gate(decoder64)
    thread = make_thread(gate)
    thread.start(30)
    receiver = Receiver()
    thread.submit(request("a", max_tokens=400), receiver)
    thread.cancel("a")
    gate.open.set()
    assert receiver.reasons() == ["cancelled"]


def test_health_is_progress(make_thread, decoder64):
    gate = Gate(decoder64)
    thread = make_thread(gate)
    assert not thread.healthy(60), "not started"
    thread.start(30)
    receiver = Receiver()
    thread.submit(request("a"), receiver)
    time.sleep(0.15)
    assert thread.healthy(30)
    assert not thread.healthy(0.1)
    gate.open.set()
    receiver.reasons()
    assert eventually(lambda: thread.healthy(0.0))


def test_slow_steps_are_progress(make_thread, decoder64):
    class Slow(Gate):
        def forward(self, step):
            time.sleep(0.02)
            return super().forward(step)

    slow = Slow(decoder64)
    slow.open.set()
    thread = make_thread(slow)
    thread.start(30)
    receiver = Receiver()
    started = time.monotonic()
    thread.submit(request("a", max_tokens=60), receiver)
    while not receiver.ended.is_set():
        assert thread.healthy(0.8)
        time.sleep(0.01)
    assert time.monotonic() - started > 1.0


def test_close_ends_what_is_left(make_thread):
    thread = make_thread()
    thread.start(30)
    receiver = Receiver(3)
    thread.submit_all([request("a", choice=i, max_tokens=480) for i in range(3)], receiver)
    thread.close(20)
    assert receiver.reasons() == ["cancelled"] * 3
    with pytest.raises(RuntimeError, match="stopped"):
        thread.submit(request("b"), receiver)
    thread.close(20)


def test_an_engine_that_dies_says_so_to_everyone(make_thread, decoder64):
    gate = Gate(decoder64)
    gate.error = SystemError("gone")
    thread = make_thread(gate)
    thread.start(30)
    gate.open.set()
    # Each failing step ends its own request; the engine gives up after a row of them.
    for i in range(20):
        receiver = Receiver()
        try:
            thread.submit(request(str(i)), receiver)
        except RuntimeError:
            break
        assert receiver.reasons() == ["error"]
    assert isinstance(thread.error, SystemError)
    assert not thread.healthy(60)


def test_a_receiver_that_fails_hurts_nobody(make_thread):
    thread = make_thread()
    thread.start(30)

    def broken(delta):
        raise ValueError("no")

    thread.submit(request("a", max_tokens=400), broken)
    good = Receiver()
    thread.submit(request("b"), good)
    assert good.reasons() == ["length"]
    assert eventually(lambda: thread.stats().finished_total == {"length": 1, "cancelled": 1})


def test_watchdog_forgives_hiccups_and_sees_uneven_steps_soon():
    dog = StepWatchdog()
    assert not any(dog.too_uneven(0.5 if i % 40 == 7 else 0.01) for i in range(10 * WINDOW)), "hiccups"
    dog.begin_anew()
    answers = [dog.too_uneven(0.05 if i % 5 == 2 else 0.01) for i in range(FIRST_LOOK)]
    assert answers == [False] * (FIRST_LOOK - 1) + [True]
    assert not any(dog.too_uneven(0.02) for _ in range(WINDOW)), "slower, but even"
    dog = StepWatchdog()
    for nodes in (1, 16, 1, 8):
        assert not any(dog.too_uneven(0.003 + 0.0007 * nodes, nodes) for _ in range(30)), "more to compute"


def test_threads_come_back_and_are_tried_later_after_every_try_in_vain():
    now = [0.0]
    policy = ThreadPolicy(4, clock=lambda: now[0])

    def steps(seconds, count=FIRST_LOOK):
        for i in range(count):
            policy.note(seconds * (5 if i % 4 == 0 else 1))

    steps(0.01)
    assert policy.wanted == 2
    now[0] = FIRST_PAUSE_S - 1
    policy.note(0.01)
    assert policy.wanted == 2
    now[0] = FIRST_PAUSE_S
    policy.note(0.01)
    assert policy.wanted == 4
    steps(0.01)
    assert policy.wanted == 2, "in vain"
    now[0] += 2 * FIRST_PAUSE_S - 1
    policy.note(0.01)
    assert policy.wanted == 2, "so it waits twice as long"
    now[0] += 1
    policy.note(0.01)
    assert policy.wanted == 4
    policy.sharing = True
    assert policy.wanted == 1
    policy.sharing = False
    assert policy.wanted == 4


def test_uneven_steps_halve_the_threads_and_change_the_fingerprint(decoder64, letters, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(StepWatchdog, "too_uneven", lambda self, seconds, nodes: True)
    prints = []

    def build():
        torch.set_num_threads(4)
        runner = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
        return Engine(runner, letters, eos_ids=[1])

    def on_delta(delta):
        prints.append((torch.get_num_threads(), thread.fingerprint))
        receiver(delta)

    thread, receiver = EngineThread(build), Receiver()
    thread.start(30)
    thread.submit(request("a", max_tokens=30), on_delta)
    try:
        assert receiver.reasons() == ["length"]
    finally:
        thread.close(20)
        torch.set_num_threads(before)
    assert [threads for threads, _ in dict.fromkeys(prints)] == [4, 2, 1]
    assert len({fingerprint for _, fingerprint in prints}) == 3
