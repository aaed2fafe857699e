"""What surrounds generation: bodies as bytes, errors, models, the tokenizer, health, figures, the page."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from axicon.recipe import ServeRecipe
from tests.services.conftest import LIMITS
from tests.services.live import Live, serving
from tests.services.test_completions import refused

JSON = {"Content-Type": "application/json"}


def post(live: Live, content: bytes | Iterator[bytes], headers: dict[str, str] = JSON) -> Any:
    return live.client.post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data"}, {"Content-Type": "application/json5"},
    ],
)  # fmt: skip
def test_only_json_is_read(live: Live, headers: dict[str, str]) -> None:
    assert refused(post(live, b'{"prompt": "a"}', headers))[1] == "unsupported_media_type"


def test_json_may_name_its_charset(live: Live) -> None:
    assert (
        post(live, b'{"prompt": "a"}', {"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200
    )


def test_a_compressed_body_is_refused(live: Live) -> None:
    assert (
        refused(post(live, b"\x1f\x8b", {**JSON, "Content-Encoding": "gzip"}))[1] == "unsupported_media_type"
    )


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"[" * 19_000]
)
def test_broken_json_is_a_400(live: Live, content: bytes) -> None:
    assert refused(post(live, content))[1] == "invalid_json"


def test_a_long_body_is_a_413_whether_its_length_is_told_or_not(live: Live) -> None:
    body = json.dumps({"prompt": "a" * LIMITS.body_bytes}).encode()
    assert refused(post(live, body), 413)[1] == "body_too_large"
    chunks = (body[at : at + 1000] for at in range(0, len(body), 1000))
    assert refused(post(live, chunks), 413)[1] == "body_too_large"


def test_a_body_that_is_said_to_be_long_is_not_waited_for(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(live.url.rsplit(":", 1)[1]), timeout=5)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_chunked_body_of_allowed_length_is_read(live: Live) -> None:
    assert post(live, iter([b'{"prompt"', b': "a"}'])).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404), ("POST", "/v1/images", 404), ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405),
    ],
)  # fmt: skip
def test_unknown_paths_and_methods_have_openai_errors(
    live: Live, method: str, path: str, status: int
) -> None:
    response = live.client.request(method, path)
    refused(response, status)
    assert ("allow" in response.headers) == (status == 405)


def test_embeddings_are_a_clear_400(live: Live) -> None:
    response = live.post("/v1/embeddings", input="a", model="fake")
    assert refused(response) == (None, "unsupported")
    assert "Embeddings" in response.json()["error"]["message"]


def test_the_served_model_is_listed_and_found(live: Live) -> None:
    listed = live.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == (
        "fake",
        "model",
        "axicon",
        256,
    )
    assert live.client.get("/v1/models/fake").json() == card
    assert refused(live.client.get("/v1/models/other"), 404) == ("model", "model_not_found")


def test_a_served_name_may_contain_slashes() -> None:
    with serving(ServeRecipe(served_name="org/model")) as live:
        assert live.client.get("/v1/models/org/model").json()["id"] == "org/model"
        assert live.post("/v1/completions", prompt="a", model="org/model").json()["model"] == "org/model"


def test_text_to_tokens_and_back(live: Live) -> None:
    text = "naïve 🦊 <|end|>"
    answer = live.post("/tokenize", prompt=text).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert answer["tokens"][-1] == 256
    assert live.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    assert live.post("/tokenize", prompt="", add_special_tokens=False).json()["tokens"] == []


def test_a_long_text_can_be_tokenized(live: Live) -> None:
    assert live.post("/tokenize", prompt="ab" * 5000).json()["count"] == 10_000


def test_token_ids_outside_the_vocabulary_are_refused(live: Live) -> None:
    assert refused(live.post("/detokenize", tokens=[5, 259]))[0] == "tokens"
    assert refused(live.post("/detokenize", tokens=[-1]))[0] == "tokens"
    assert refused(live.post("/tokenize", prompt="a", model="other"), 404)[1] == "model_not_found"


def test_tokenizer_info_is_what_lm_eval_asks_for(live: Live) -> None:
    info = live.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>"
    assert "<|assistant|>" in info["chat_template"]
    assert live.post("/tokenize", prompt=info["eos_token"], add_special_tokens=False).json()["tokens"] == [
        256
    ]


def test_health_follows_the_decode_loop() -> None:
    with serving() as live:
        assert live.client.get("/health").json() == {
            "status": "ok", "format": "none", "kernels": "a fake"
        }
        live.fake.hold()
        response = live.client.get("/health")
        assert refused(response, 503)[1] == "not_ready"
        assert "no step" in response.json()["error"]["message"]
        live.fake.go_on()
        assert live.client.get("/health").status_code == 200
        live.fake.error = RuntimeError("in /home/someone: out of memory")
        response = live.client.get("/health")
        assert refused(response, 503)[1] == "not_ready"
        assert "has stopped" in response.json()["error"]["message"]
        assert "someone" not in response.text


def test_while_the_model_loads_everything_but_the_page_waits() -> None:
    with serving(load=False) as live:
        assert refused(live.client.get("/health"), 503)[1] == "not_ready"
        assert refused(live.post("/v1/completions", prompt="a"), 503)[1] == "loading"
        assert refused(live.client.get("/v1/models"), 503)[1] == "loading"
        assert refused(live.client.get("/metrics"), 503)[1] == "loading"
        assert live.client.get("/").status_code == 200


NAMES = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum", "axicon:event_loop_lag_seconds_bucket", "axicon:step_seconds",
    "axicon:decode_step_seconds_bucket",
)  # fmt: skip


def figure(text: str, name: str, **labels: str) -> float:
    """One sample of the text format."""
    wanted = {"model_name": "fake", **labels}
    for line in text.splitlines():
        found = re.fullmatch(r"([^{]+)\{(.*)\} (\S+)", line)
        if found and found[1] == name and dict(re.findall(r'(\w+)="([^"]*)"', found[2])) == wanted:
            return float(found[3])
    raise AssertionError(f"no {name} with {wanted}")


def test_figures_have_the_names_that_dashboards_know() -> None:
    with serving() as live:
        live.post("/v1/completions", prompt="abc", max_tokens=7)
        live.post("/v1/completions", prompt="abcd", max_tokens=1)
        response = live.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        text = response.text
        for name in NAMES:
            assert re.search(rf'^{name}\{{.*model_name="fake".*\}}', text, re.MULTILINE), name
        assert figure(text, "vllm:prompt_tokens_total") == 7
        assert figure(text, "vllm:generation_tokens_total") == 8
        assert figure(text, "vllm:request_success_total", finished_reason="length") == 2
        assert figure(text, "vllm:time_to_first_token_seconds_count") == 2
        assert figure(text, "vllm:inter_token_latency_seconds_count") == 6
        assert figure(text, "vllm:e2e_request_latency_seconds_count") == 2


def test_an_answer_names_the_numerics_it_was_made_with() -> None:
    with serving() as live:
        assert live.post("/v1/completions", prompt="a").json()["system_fingerprint"] == "fake-1"
        live.fake.fingerprint = "fake-2"
        assert live.post("/v1/completions", prompt="a").json()["system_fingerprint"] == "fake-2"


def test_two_servers_count_apart() -> None:
    with serving() as one, serving() as two:
        one.post("/v1/completions", prompt="abc", max_tokens=1)
        assert figure(one.client.get("/metrics").text, "vllm:generation_tokens_total") == 1
        assert figure(two.client.get("/metrics").text, "vllm:generation_tokens_total") == 0


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    page = live.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert set(linked) == {"pages/icon.svg", "pages/playground.css", "pages/playground.js"}
    for path in linked:
        part = live.client.get(f"/{path}")
        assert part.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", part.text), path
    assert "style=" not in page.text, "the policy forbids inline styles"
    assert not re.search(r"<script(?![^>]*src=)", page.text), "the policy forbids inline scripts"


def test_the_script_finds_what_it_looks_for_in_the_page(live: Live) -> None:
    script = live.client.get("/pages/playground.js").text
    wanted = set(re.findall(r'\$\("([\w-]+)"\)|(?:choices|number)\("([\w-]+)"', script))
    there = set(re.findall(r' id="([\w-]+)"', live.client.get("/").text))
    assert {"policy", "method", "details", "budget"} <= {a or b for a, b in wanted} <= there


def test_nothing_allows_other_origins(live: Live) -> None:
    response = live.client.options(
        "/v1/completions", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control-")]
