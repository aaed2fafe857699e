"""The server over the real engine, with a tiny random model: what a stand-in cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.recipe import ServeRecipe
from services.generation import GenerationServer, engine_thread
from tests.services.live import Live, serving
from tests.services.test_completions import events, refused
from tests.services.tiny import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ServeRecipe:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return ServeRecipe(
        model=str(folder), dtype="float32", threads=1, kv_gib=0.05, max_rows=4, max_queue=64, prefill_chunk=32
    )


@pytest.fixture(scope="module")
def live(tiny: ServeRecipe) -> Iterator[Live]:
    with serving(tiny, engine_thread) as running:
        yield running


def text_of(response: Any) -> str:
    return "".join(part["choices"][0]["text"] for part in events(response) if part["choices"])


def test_the_directory_names_the_model(live: Live) -> None:
    (card,) = live.client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 512)


@pytest.mark.parametrize("seed", range(6))
def test_streams_of_broken_and_whole_characters_equal_the_whole_text(live: Live, seed: int) -> None:
    body = {
        "prompt": "Say 🦊 and 你好: ",
        "max_tokens": 120,
        "seed": seed,
        "ignore_eos": True,
        "temperature": 1.5,
    }
    whole = live.post("/v1/completions", **body).json()["choices"][0]["text"]
    assert text_of(live.post("/v1/completions", **body, stream=True)) == whole
    assert len(whole) > 20


def test_a_stop_string_never_shows_however_it_is_split(live: Live) -> None:
    body = {"prompt": "abc", "max_tokens": 200, "seed": 1, "ignore_eos": True}
    whole = live.post("/v1/completions", **body).json()["choices"][0]["text"]
    for at in (5, 20, 60):
        stop = whole[at : at + 3]
        expected = whole[: whole.index(stop)]
        choice = live.post("/v1/completions", **body, stop=[stop]).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
        assert text_of(live.post("/v1/completions", **body, stop=[stop], stream=True)) == expected


def test_the_same_seed_gives_the_same_bytes_alone_and_in_a_crowd(live: Live) -> None:
    body = {"prompt": "abc", "max_tokens": 40, "seed": 7, "n": 2}
    alone = live.post("/v1/completions", **body).json()
    with ThreadPoolExecutor(8) as pool:
        crowd = [pool.submit(live.post, "/v1/completions", **{**body, "seed": n}) for n in range(8)]
        again = crowd[7].result().json()
        assert all(call.result().status_code == 200 for call in crowd)
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in alone["choices"]]
    assert alone["choices"][0]["text"] != alone["choices"][1]["text"]
    assert again["system_fingerprint"] == alone["system_fingerprint"]


def test_prompt_and_output_logprobs_agree(live: Live) -> None:
    """What greedy decoding reports of its own tokens is what scoring reports of the same tokens as a
    prompt."""
    fields = {"temperature": 0, "logprobs": 1, "ignore_eos": True}
    prompt = list(b"The rain tapped on the glass")
    made = live.post("/v1/completions", prompt=prompt, max_tokens=5, **fields).json()["choices"][0][
        "logprobs"
    ]
    # The alternatives name the tokens, and with a byte tokenizer a text is its bytes.
    ids = [_byte(token) for token in made["tokens"]]
    scored = live.post("/v1/completions", prompt=prompt + ids, max_tokens=1, echo=True, **fields).json()
    lists = scored["choices"][0]["logprobs"]
    assert len(lists["tokens"]) == len(prompt) + len(ids) + 1
    for one, two in zip(lists["token_logprobs"][len(prompt) : -1], made["token_logprobs"], strict=True):
        assert math.isclose(one, two, abs_tol=1e-4)
    for top, value in zip(lists["top_logprobs"][1:], lists["token_logprobs"][1:], strict=True):
        assert max(top.values()) >= value


def _byte(token: str) -> int:
    return int(token.removeprefix("bytes:\\x"), 16) if token.startswith("bytes:") else ord(token)


def test_a_single_token_can_be_scored(live: Live) -> None:
    parts = events(
        live.post("/v1/completions", prompt=[65], echo=True, logprobs=0, max_tokens=3, stream=True)
    )
    tokens = [token for part in parts for token in part["choices"][0]["logprobs"]["tokens"]]
    assert len(tokens) == 4
    assert parts[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None


def test_echo_without_a_new_token(live: Live) -> None:
    choice = live.post("/v1/completions", prompt="Hello", echo=True, logprobs=1, max_tokens=0).json()[
        "choices"
    ][0]
    assert (choice["text"], len(choice["logprobs"]["token_logprobs"]), choice["finish_reason"]) == (
        "Hello",
        5,
        "length",
    )


def test_min_tokens_and_bias_reach_the_sampler(live: Live) -> None:
    forced = live.post(
        "/v1/completions", prompt="a", max_tokens=5, logit_bias={"90": 100}, temperature=0
    ).json()
    assert forced["choices"][0]["text"] == "ZZZZZ"
    held = live.post(
        "/v1/completions", prompt="a", max_tokens=9, min_tokens=4, logit_bias={"256": 100}
    ).json()
    assert held["usage"]["completion_tokens"] == 5
    assert held["choices"][0]["finish_reason"] == "stop"


def test_a_chat_stops_at_the_end_token_and_does_not_show_it(live: Live) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = live.post(
        "/v1/chat/completions", messages=messages, max_tokens=9, min_tokens=3, logit_bias={"256": 100},
        logprobs=True,
    ).json()  # fmt: skip
    choice = body["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "<|end|>" not in choice["message"]["content"]
    assert choice["logprobs"]["content"][-1]["token"] == "<|end|>"


def test_a_deadline_is_a_408_that_clients_do_not_repeat(tiny: ServeRecipe) -> None:
    with serving(tiny.model_copy(update={"request_timeout_s": 1e-6}), engine_thread) as live:
        response = live.post("/v1/completions", prompt="abc", max_tokens=300, ignore_eos=True)
        assert refused(response, 408)[1] == "deadline_exceeded"
        assert response.headers["x-should-retry"] == "false"


def test_a_client_that_leaves_gives_its_cache_back(live: Live) -> None:
    body = {"prompt": "abc", "max_tokens": 480, "stream": True, "n": 3, "ignore_eos": True}
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        chunks = response.iter_bytes()
        next(chunks)
        assert live.server.thread.stats().slots_reserved > 0
    assert live.wait_until(lambda: live.server.thread.stats().slots_reserved == 0)
    stats = live.server.thread.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_a_long_prompt_among_short_ones(live: Live) -> None:
    with ThreadPoolExecutor(6) as pool:
        long = pool.submit(live.post, "/v1/completions", prompt="x" * 400, max_tokens=4)
        short = [pool.submit(live.post, "/v1/completions", prompt="ab", max_tokens=20) for _ in range(5)]
        assert long.result().json()["usage"]["prompt_tokens"] == 400
        assert all(call.result().status_code == 200 for call in short)


async def test_a_model_that_cannot_be_served_says_why() -> None:
    server = GenerationServer(ServeRecipe(model="/nowhere/at/all"), engine_thread)
    with pytest.raises(AxiconError, match="/nowhere/at/all"):
        await server.start()
    assert "stopped" in (server.trouble() or "")
    await server.close()
