"""The application under Ray Serve with HAProxy in front: what a replica answers, refuses, and gives back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from axicon.recipe import RequestLimits, ServeRecipe
from tests.conftest import ROOT
from tests.services.test_http import figure
from tests.services.tiny import tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMITS = RequestLimits(body_bytes=100_000)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the application answers."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny", positions=4096)
    recipe = ServeRecipe(
        model=str(folder), dtype="float32", threads=1, kv_gib=0.2, max_rows=2, max_queue=1, limits=LIMITS
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.services.under_ray", str(port), recipe.model_dump_json()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout), "the application did not start"
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()
        assert process.wait(60) == 0


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def running(url: str) -> float:
    """Choices in work, waiting ones included."""
    text = httpx.get(f"{url}/metrics").text
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(figure(text, name, model_name="tiny") for name in names)


def test_a_chat_streams_through_haproxy(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=20, seed=1, stream=True
        )
        chunks = list(stream)
        whole = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=20, seed=1
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert httpx.get(f"{url}/health").status_code == 200


def test_refusals_pass_haproxy_as_they_are(url: str) -> None:
    assert httpx.get(f"{url}/nothing").json()["error"]["type"] == "not_found_error"
    wrong = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "kv": {}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "kv.policy")
    large = httpx.post(f"{url}/v1/completions", json={"prompt": "a" * LIMITS.body_bytes})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    foreign = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, headers={"Host": "evil.example"})
    assert foreign.status_code == 403


def test_overload_is_a_429_and_clients_that_leave_free_their_places(url: str) -> None:
    body = {"prompt": "abc", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with ThreadPoolExecutor(1), httpx.Client(timeout=30) as client:
        streams = [client.stream("POST", f"{url}/v1/completions", json=body) for _ in range(2)]
        waiting = [stream.__enter__() for stream in streams]
        assert [response.status_code for response in waiting] == [200, 200]
        chunks = [response.iter_bytes() for response in waiting]
        assert all(next(chunk) for chunk in chunks)
        refused = client.post(f"{url}/v1/completions", json={"prompt": "a", "n": 2})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert running(url) == 2
        for stream in streams:
            stream.__exit__(None, None, None)
    assert until(lambda: running(url) == 0)
    text = httpx.get(f"{url}/metrics").text
    assert figure(text, "vllm:kv_cache_usage_perc", model_name="tiny") == 0
    assert figure(text, "vllm:request_success_total", model_name="tiny", finished_reason="cancelled") == 2
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
