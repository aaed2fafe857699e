"""Overload, clients that leave, requests that fail: what is given back, and what the others notice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from axicon.generate.request import Delta, Overloaded, RequestError
from axicon.recipe import ServeRecipe
from services import generation
from services.stream import Mailbox, Stream
from tests.services.fake_engine import FakeThread
from tests.services.live import Live, serving
from tests.services.test_completions import events, refused

SMALL = ServeRecipe(max_rows=2, max_queue=2)


def slow(recipe: ServeRecipe) -> FakeThread:
    return FakeThread(recipe, max_model_len=100_000, step_s=0.005)


def idle(live: Live) -> bool:
    return not live.fake.running and not live.fake.waiting and live.server.unfinished == 0


def test_overload_is_a_429_that_says_when_to_come_back() -> None:
    with serving(SMALL, slow) as live, ThreadPoolExecutor(4) as pool:
        live.fake.hold()
        waiting = [pool.submit(live.post, "/v1/completions", prompt="a", max_tokens=2) for _ in range(4)]
        assert live.wait_until(lambda: live.server.unfinished == 4)
        response = live.post("/v1/completions", prompt="a")
        assert refused(response, 429)[1] == "overloaded"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        refused(live.post("/v1/completions", prompt="a", stream=True), 429)
        live.fake.go_on()
        assert [call.result().status_code for call in waiting] == [200] * 4
        assert live.post("/v1/completions", prompt="a").status_code == 200
        assert 'axicon:overload_refusals_total{model_name="fake"} 2.0' in live.client.get("/metrics").text


def test_a_request_that_can_never_fit_is_a_400_and_not_a_429() -> None:
    with serving(SMALL) as live:
        assert refused(live.post("/v1/completions", prompt="a", n=5))[0] == "n"


def test_choices_that_do_not_fit_together_are_refused_together() -> None:
    with serving(SMALL, slow) as live, ThreadPoolExecutor(1) as pool:
        live.fake.hold()
        call = pool.submit(live.post, "/v1/completions", prompt="a", n=2, max_tokens=1)
        assert live.wait_until(lambda: live.server.unfinished == 2)
        refused(live.post("/v1/completions", prompt="a", n=3), 429)
        assert live.server.unfinished == 2
        live.fake.go_on()
        assert call.result().status_code == 200


def test_a_client_that_leaves_a_stream_frees_its_place() -> None:
    with serving(SMALL, slow) as live:
        body = {"prompt": "a", "max_tokens": 50_000, "stream": True, "n": 2}
        with live.client.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.iter_bytes()  # held, because the client hangs up when it is collected
            assert next(chunks)
            assert len(live.fake.running) == 2
        assert live.wait_until(lambda: idle(live))
        assert live.fake.finished["cancelled"] == 2
        assert live.post("/v1/completions", prompt="a").status_code == 200


def test_a_client_that_leaves_before_the_first_token_frees_its_place() -> None:
    with serving(SMALL, slow) as live:
        live.fake.hold()
        for streams in (False, True):
            _leave_early(live, {"prompt": "a", "max_tokens": 50_000, "stream": streams})
            assert live.wait_until(lambda: live.server.unfinished == 0)
        live.fake.go_on()
        assert live.wait_until(lambda: idle(live))


def test_a_client_that_leaves_before_the_whole_answer_frees_its_place() -> None:
    with serving(SMALL, slow) as live:
        _leave_early(live, {"prompt": "a", "max_tokens": 50_000})
        assert live.wait_until(lambda: idle(live) and live.fake.finished.get("cancelled") == 1)


def _leave_early(live: Live, body: Any) -> None:
    """Send a request, wait until the server works on it, and hang up."""
    port = int(live.url.rsplit(":", 1)[1])
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        assert live.wait_until(lambda: live.server.unfinished == 1)


def test_many_clients_that_leave_at_once_leave_nothing_behind() -> None:
    recipe = ServeRecipe(max_rows=8, max_queue=64)
    with serving(recipe, slow) as live, ThreadPoolExecutor(16) as pool:

        def visit(number: int) -> None:
            body = {"prompt": "a", "max_tokens": 50_000, "stream": True}
            with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=30) as response:
                chunks = response.iter_bytes()
                for _ in range(number % 3):
                    next(chunks)

        list(pool.map(visit, range(48)))
        assert live.wait_until(lambda: idle(live))
        assert live.fake.finished["cancelled"] == 48


def test_a_reader_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "READER_S", 0.2)
    monkeypatch.setattr(generation, "WATCH_S", 0.05)
    with serving(SMALL, lambda recipe: FakeThread(recipe, max_model_len=10**6, step_s=1e-4)) as live:
        port = int(live.url.rsplit(":", 1)[1])
        content = json.dumps({"prompt": "a", "max_tokens": 900_000, "stream": True, "logprobs": 5}).encode()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
            sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            assert live.wait_until(lambda: live.fake.finished.get("cancelled") == 1, 20)


class Ending(FakeThread):
    """Ends every request with `ending` after two tokens."""

    ending: Delta

    def _step(self, row: Any) -> Delta:
        delta = super()._step(row)
        if row.done == 2:
            self.running.pop(row.request.id, None)
            return dataclasses.replace(self.ending, request_id=row.request.id)
        return delta


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        (Delta(request_id="", finish_reason="error", error="at /home/someone"), 500, "engine_error"),
        (Delta(request_id="", finish_reason="deadline"), 408, "deadline_exceeded"),
        (Delta(request_id="", finish_reason="cancelled"), 503, "shutting_down"),
    ],
)
def test_a_request_that_fails_says_so_in_a_body_and_in_a_stream(last: Delta, status: int, code: str) -> None:
    with serving(SMALL, Ending) as live:
        Ending.ending = last
        response = live.post("/v1/completions", prompt="a")
        assert refused(response, status)[1] == code
        assert "someone" not in response.text
        parts = live.post("/v1/completions", prompt="a", stream=True).text.split("\n\n")
        assert json.loads(parts[0].removeprefix("data: "))["choices"][0]["text"] == "T"
        assert json.loads(parts[-2].removeprefix("data: "))["error"]["code"] == code
        assert "[DONE]" not in parts[-2]
        assert live.server.unfinished == 0


class Refusing(FakeThread):
    """Refuses what is submitted."""

    refusal: Exception

    def submit_all(self, requests: Any, on_delta: Any) -> None:
        raise self.refusal


@pytest.mark.parametrize(
    ("refusal", "status"),
    [(RequestError("too long", "prompt"), 400), (Overloaded("full", 7), 429), (RuntimeError("defect"), 500)],
)
def test_what_the_engine_refuses_has_a_status_of_its_own(refusal: Exception, status: int) -> None:
    Refusing.refusal = refusal
    with serving(SMALL, Refusing) as live:
        for streams in (False, True):
            response = live.post("/v1/completions", prompt="a", stream=streams)
            refused(response, status)
            assert response.headers.get("retry-after") == ("7" if status == 429 else None)
        assert "defect" not in response.text
        assert live.server.unfinished == 0


def test_when_the_engine_dies_nobody_waits_for_it() -> None:
    with serving(SMALL, slow) as live, ThreadPoolExecutor(1) as pool:
        live.fake.hold()
        call = pool.submit(live.post, "/v1/completions", prompt="a")
        assert live.wait_until(lambda: live.server.unfinished == 1)
        live.fake.error = RuntimeError("boom")
        assert refused(call.result(5), 500)[1] == "engine_error"


async def test_one_step_wakes_the_loop_once() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    streams = [Stream([str(n)], mailbox.detach) for n in range(50)]
    for stream in streams:
        mailbox.attach(stream)

    def step(last: bool) -> None:
        for n in range(50):
            mailbox.post(Delta(request_id=str(n), text="x", finish_reason="stop" if last else None))

    for last in (False, True):
        worker = threading.Thread(target=step, args=(last,))
        worker.start()
        worker.join()
    deltas = [await stream.read() for stream in streams]
    assert [len(batch) for batch in deltas] == [2] * 50
    assert mailbox.wakeups <= 2
    assert [await stream.read() for stream in streams] == [[]] * 50


async def test_with_many_streams_tokens_wait_for_each_other_but_first_and_last_ones_do_not() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    streams = [Stream([str(n)], mailbox.detach) for n in range(15)]
    for stream in streams:
        mailbox.attach(stream)

    def post(count: int, last: bool = False) -> None:
        reason = "stop" if last else None
        mailbox.post(
            Delta(request_id="0", text="x", tokens=(1,), completion_tokens=count, finish_reason=reason)
        )

    post(1)
    await asyncio.sleep(0)
    assert streams[0].pending == 1
    assert [d.completion_tokens for d in await streams[0].read()] == [1]
    post(2)
    post(3)
    await asyncio.sleep(0.005)
    assert streams[0].pending == 0, "they wait for the tokens of the next step"
    await asyncio.sleep(0.2)
    (both,) = await streams[0].read()  # but not for long, though no step follows
    assert (both.text, both.tokens, both.completion_tokens) == ("xx", (1, 1), 3)
    post(4)
    post(5, last=True)
    await asyncio.sleep(0)
    assert [d.finish_reason for d in await streams[0].read()] == [None, "stop"]


async def test_what_arrives_after_closing_is_dropped() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    closed: list[Stream] = []
    stream = Stream(["a"], closed.append)
    mailbox.attach(stream)
    stream.close()
    stream.close()
    mailbox.post(Delta(request_id="a", text="x"))
    mailbox.post(Delta(request_id="unknown", text="x"))
    await asyncio.sleep(0.01)
    assert closed == [stream]
    assert stream.pending == 0


def test_the_health_check_of_serve_is_silent_unless_the_loop_is_stuck() -> None:
    with serving() as live:
        asyncio.run(live.server.check_health())
        live.fake.hold()
        with pytest.raises(RuntimeError, match="no step"):
            asyncio.run(live.server.check_health())
        live.fake.go_on()
    with serving(load=False) as live:
        asyncio.run(live.server.check_health())


def test_streams_of_many_clients_are_served_side_by_side() -> None:
    with serving(ServeRecipe(max_rows=16)) as live, ThreadPoolExecutor(16) as pool:
        calls = [
            pool.submit(live.post, "/v1/completions", prompt="a", max_tokens=30, stream=True)
            for _ in range(16)
        ]
        texts = {"".join(p["choices"][0]["text"] for p in events(call.result())) for call in calls}
        assert len(texts) == 1
