"""EngineThread: an engine in a thread of its own, driven from any other.

All torch work of a server happens here, loading included: weights packed in another thread are slow (41
instead of 85 steps per second, measured), and a second OpenMP pool exceeds the cores.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch

from axicon.errors import counted
from axicon.generate.engine import Engine
from axicon.generate.request import Delta, EngineStats, FinishReason, Overloaded, Request, RequestError
from axicon.generate.runner import LocalRunner
from axicon.generate.watchdog import ThreadPolicy
from axicon.model.machine import leave_alone

log = logging.getLogger("axicon")

OnDelta = Callable[[Delta], None]
T = TypeVar("T")


class EngineThread:
    """`start` it, `submit` requests, `close` it. Deltas arrive in the engine thread: only hand them on there.

    watchdog: halve the compute threads when steps become very uneven, and try more again later. Results stay
    the same or, where the bits of this model depend on the thread count, it waits until nothing is running;
    the fingerprint changes either way.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, watchdog: bool = True) -> None:
        self._make_engine = make_engine
        self._watchdog = watchdog
        self._engine: Engine | None = None
        self._wake = threading.Condition()
        self._inbox: list[Request | str | _Call[Any]] = []
        """Requests, ids to cancel, and what to do to the engine."""
        self._sinks: dict[tuple[str, int], OnDelta] = {}
        """Receivers of all requests that have not ended."""
        self._closing = False
        self._ready = threading.Event()
        self._busy_since: float | None = None
        """When the last step ended, or work arrived, while there is work."""
        self._policy: ThreadPolicy | None = None
        """Made when the engine's threads are known, if there is to be one."""
        self._sharing = False
        self._known_bits: dict[tuple[int, int], bool] = {}
        self.error: BaseException | None = None
        """What ended the thread, if something did."""
        self._thread = threading.Thread(target=self._run, name="axicon-engine", daemon=True)

    @property
    def engine(self) -> Engine:
        """The engine, for its constants (tokenizer, limits). Only there after `start`."""
        if self._engine is None:
            raise RuntimeError("the engine thread has not started")
        return self._engine

    @property
    def fingerprint(self) -> str:
        return self.engine.runner.fingerprint

    def start(self, timeout: float | None = None) -> None:
        """Load and begin to serve. Raises what loading raised, TimeoutError after `timeout` seconds."""
        self._thread.start()
        if not self._ready.wait(timeout):
            raise TimeoutError(f"the model was not loaded within {timeout} s")
        if self.error is not None:
            raise self.error

    def submit(self, request: Request, on_delta: OnDelta) -> None:
        """Queue a request from any thread. Raises RequestError or Overloaded, as `Engine.add` does."""
        self.submit_all([request], on_delta)

    def submit_all(self, requests: Sequence[Request], on_delta: OnDelta) -> None:
        """Queue several requests, such as the choices of one, or none of them."""
        engine = self.engine
        for request in requests:
            engine.check(request)
        with self._wake:
            if self._closing or self.error is not None:
                raise RuntimeError("the engine has stopped")
            if len(self._sinks) + len(requests) > engine.most_requests:
                raise Overloaded(f"{len(self._sinks)} requests are running or waiting, try again later")
            keys = [(request.id, request.choice) for request in requests]
            if len(set(keys)) < len(keys) or not self._sinks.keys().isdisjoint(keys):
                raise RequestError(f"request {requests[0].id!r} is already running", "id")
            self._sinks |= dict.fromkeys(keys, on_delta)
            self._inbox += requests
            self._busy_since = self._busy_since or time.monotonic()
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """End all choices of a request; unknown ids are ignored."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def ask(self, do: Callable[[Engine], T]) -> T:
        """What `do` returns, or raises, in the engine's thread between two steps. Steps wait for it."""
        call = _Call(do)
        with self._wake:
            if self._closing or self.error is not None:
                raise RuntimeError("the engine has stopped")
            self._inbox.append(call)
            self._wake.notify()
        return call.answer.result()

    def healthy(self, max_stall_s: float) -> bool:
        """False once the thread ended, or while work waits and no step was finished for so long."""
        busy = self._busy_since
        running = self._ready.is_set() and self.error is None and self._thread.is_alive()
        return running and (busy is None or time.monotonic() - busy <= max_stall_s)

    def share(self, sharing: bool) -> None:
        """Say, from any thread, whether a job computes on this machine: then one thread is taken, where bits
        stay the same."""
        self._sharing = sharing

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self, timeout: float | None = None) -> None:
        """End every request with reason "cancelled" and wait for the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            engine = self._engine = self._make_engine()
            self._policy = ThreadPolicy(torch.get_num_threads()) if self._watchdog else None
            # What loading left behind is never looked at again: a full collection would last many steps.
            leave_alone()
            self._ready.set()
            while self._receive(engine):
                self._deliver(engine.step())
                self._note_step(engine)
        except BaseException as error:
            if self._ready.is_set():  # else `start` raises it
                log.exception("the engine thread ended")
            self.error = error
        finally:
            self._ready.set()
            with self._wake:
                self._closing = True
                reason: FinishReason = "cancelled" if self.error is None else "error"
                left = list(self._sinks)
                for item in self._inbox:
                    if isinstance(item, _Call):
                        item.answer.set_exception(RuntimeError("the engine has stopped"))
            self._deliver([_ended(key, reason, self.error) for key in left])

    def _receive(self, engine: Engine) -> bool:
        """Wait for work and take it in. False when closing."""
        with self._wake:
            while not (self._inbox or engine.has_work or self._closing):
                self._busy_since = None
                self._wake.wait()
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
        for item in inbox:
            if isinstance(item, str):
                engine.cancel(item)
                continue
            if isinstance(item, _Call):
                item.run(engine)
                continue
            try:
                engine.add(item)
            except Exception as error:
                self._deliver([_ended((item.id, item.choice), "error", error)])
        return True

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.choice)
            on_delta = self._sinks.get(key) if delta.finish_reason is None else self._sinks.pop(key, None)
            if on_delta is None:
                continue
            try:
                on_delta(delta)
            except Exception:
                log.exception("the receiver of request %s failed", delta.request_id)
                self.cancel(delta.request_id)

    def _note_step(self, engine: Engine) -> None:
        self._busy_since = time.monotonic() if engine.has_work else None
        runner = engine.runner
        if self._policy is None or not isinstance(runner, LocalRunner):
            return
        policy = self._policy
        policy.sharing = self._sharing and runner.native is not None
        if engine.decode_only:
            stats = engine.stats()
            if policy.note(stats.step_seconds, stats.step_tokens):
                threads = counted(policy.wanted, "thread")
                log.warning("steps are uneven, another process is busy: %s from now on", threads)
        now, wanted = torch.get_num_threads(), policy.wanted
        if wanted != now and (not engine.has_work or self._same_bits(runner, now, wanted)):
            runner.set_threads(wanted)

    def _same_bits(self, runner: LocalRunner, now: int, wanted: int) -> bool:
        """What `runner` says, asked once: that is a probe."""
        pair = (now, wanted)
        if pair not in self._known_bits:
            self._known_bits[pair] = runner.same_bits_with(wanted)
        return self._known_bits[pair]


class _Call(Generic[T]):
    """Something to do to the engine in its own thread, and what came of it."""

    def __init__(self, do: Callable[[Engine], T]) -> None:
        self._do = do
        self.answer: Future[T] = Future()

    def run(self, engine: Engine) -> None:
        try:
            self.answer.set_result(self._do(engine))
        except Exception as error:
            self.answer.set_exception(error)


def _ended(key: tuple[str, int], reason: FinishReason, error: BaseException | None) -> Delta:
    text = None if error is None else str(error) or type(error).__name__
    return Delta(request_id=key[0], choice=key[1], finish_reason=reason, error=text)
