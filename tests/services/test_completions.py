"""`/v1/completions` over a live server with a stand-in engine: shapes, streaming, echo, log-probabilities,
limits."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.services.fake_engine import REPLY
from tests.services.live import Live

NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, which must end with [DONE]."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def says(tokens: int) -> str:
    """The text of so many tokens of the stand-in."""
    script = (REPLY * 10).encode()[:tokens]
    return script.decode(errors="ignore")


def refused(response: httpx.Response, status: int = 400) -> tuple[str | None, str | None]:
    """(param, code) of an error body in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["param"], error["code"]


def test_an_answer_has_openai_shape(live: Live) -> None:
    body = live.post("/v1/completions", model="fake", prompt="Hello", max_tokens=8).json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"], body["system_fingerprint"]) == (
        "text_completion",
        "fake",
        "fake-1",
    )
    assert body["choices"] == [{"index": 0, "text": says(8), "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13, **NONE_CACHED}


def test_sixteen_tokens_unless_told(live: Live) -> None:
    assert live.post("/v1/completions", prompt="Hello").json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [("one", [3]), (["one", "three"], [3, 5]), ([72, 105], [2]), ([[72], [105, 33, 33]], [1, 3])],
)
def test_choices_are_numbered_prompt_by_prompt(live: Live, prompt: Any, sizes: list[int]) -> None:
    live.fake.last.clear()
    body = live.post("/v1/completions", prompt=prompt, n=2, max_tokens=2).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(sizes)))
    asked = live.fake.last
    assert [len(request.prompt) for request in asked] == [size for size in sizes for _ in range(2)]
    assert [request.choice for request in asked] == [0, 1] * len(sizes)
    assert body["usage"]["prompt_tokens"] == sum(sizes)
    assert body["usage"]["completion_tokens"] == 4 * len(sizes)


def test_choices_of_a_prompt_share_a_seed_and_prompts_do_not(live: Live) -> None:
    live.fake.last.clear()
    live.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=1)
    one, two, three, four = (request.params.seed for request in live.fake.last)
    assert one is not None
    assert one == two
    assert three == four
    assert one != three
    live.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=1, seed=-5)
    assert {request.params.seed for request in live.fake.last[4:]} == {-5}


def test_every_field_reaches_the_engine(live: Live) -> None:
    live.fake.last.clear()
    fields = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "repetition_penalty": 1.1, "seed": 4,
        "stop": ["x", "y"], "stop_token_ids": [3], "ignore_eos": True, "logprobs": 2,
    }  # fmt: skip
    live.post("/v1/completions", prompt="a", echo=True, logit_bias={"5": -100}, **fields)
    params = live.fake.last[0].params
    assert {name: getattr(params, name) for name in fields} == {
        **fields,
        "stop": ("x", "y"),
        "stop_token_ids": (3,),
    }
    assert params.logit_bias == {5: -100.0}
    assert params.prompt_logprobs == 2
    assert live.fake.last[0].deadline is not None


def test_top_k_of_minus_one_means_no_limit(live: Live) -> None:
    live.fake.last.clear()
    live.post("/v1/completions", prompt="a", top_k=-1, max_tokens=1)
    assert live.fake.last[0].params.top_k == 0


def test_a_stream_says_the_same_as_one_body(live: Live) -> None:
    whole = live.post("/v1/completions", prompt="a", max_tokens=40).json()["choices"][0]
    parts = events(live.post("/v1/completions", prompt="a", max_tokens=40, stream=True))
    assert all(part["choices"][0]["text"] for part in parts), "half a character makes no event"
    assert all(
        set(part) == {"id", "object", "created", "model", "system_fingerprint", "choices"} for part in parts
    )
    assert len({part["id"] for part in parts}) == 1
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["text"]
    assert "🦊" in whole["text"]
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_a_stream_counts_tokens_only_when_asked(live: Live) -> None:
    options = {"include_usage": True}
    parts = events(
        live.post("/v1/completions", prompt="abc", max_tokens=5, stream=True, stream_options=options)
    )
    assert all(part["usage"] is None for part in parts[:-1])
    assert parts[-1]["choices"] == []
    counts = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert parts[-1]["usage"] == counts | NONE_CACHED


def test_a_stream_of_several_choices_keeps_them_apart(live: Live) -> None:
    parts = events(live.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=12, stream=True))
    texts = dict.fromkeys(range(4), "")
    for part in parts:
        choice = part["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert set(texts.values()) == {says(12)}


def test_a_stop_string_ends_the_text_before_it(live: Live) -> None:
    choice = live.post("/v1/completions", prompt="a", max_tokens=50, stop="said").json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].endswith("🦊 ") or choice["text"].endswith("🦊 sai")


def test_logprobs_are_four_parallel_lists(live: Live) -> None:
    choice = live.post("/v1/completions", prompt="a", max_tokens=6, logprobs=2).json()["choices"][0]
    lists = choice["logprobs"]
    assert lists["tokens"] == ["T", "h", "e", " ", "n", "a"]
    assert lists["token_logprobs"] == [-0.25] * 6
    assert lists["top_logprobs"][0] == {"T": -0.25, "U": -1.25}
    assert lists["text_offset"] == [0, 1, 2, 3, 4, 5]


def test_a_part_of_a_character_is_written_as_bytes(live: Live) -> None:
    choice = live.post("/v1/completions", prompt="a", max_tokens=8, logprobs=0).json()["choices"][0]
    assert choice["logprobs"]["tokens"][-2:] == ["bytes:\\xc3", "bytes:\\xaf"]
    assert choice["logprobs"]["top_logprobs"][-1] == {"bytes:\\xaf": -0.25}


def test_scoring_as_lm_eval_asks_for_it(live: Live) -> None:
    body = live.post(
        "/v1/completions",
        prompt=[[72, 105, 33], [65, 66]],
        echo=True,
        logprobs=1,
        max_tokens=1,
        temperature=0,
        seed=1,
    ).json()
    for choice, prompt in zip(body["choices"], ("Hi!", "AB"), strict=True):
        lists = choice["logprobs"]
        assert choice["text"] == prompt + "T"
        assert len(lists["tokens"]) == len(prompt) + 1, "exactly one token more than the prompt"
        assert lists["token_logprobs"][0] is None
        assert lists["top_logprobs"][0] is None
        assert all(isinstance(value, float) for value in lists["token_logprobs"][1:])
        assert all(isinstance(value, dict) for value in lists["top_logprobs"][1:])
        assert lists["text_offset"] == list(range(len(prompt) + 1))


def test_an_echo_of_ids_has_no_special_tokens_and_offsets_that_fit(live: Live) -> None:
    choice = live.post("/v1/completions", prompt=[72, 105], echo=True, logprobs=0, max_tokens=2).json()[
        "choices"
    ][0]
    assert choice["text"] == "HiTh"
    assert [choice["text"][at] for at in choice["logprobs"]["text_offset"]] == ["H", "i", "T", "h"]
    assert (
        live.post("/v1/completions", prompt=[256, 72], echo=True, max_tokens=1).json()["choices"][0]["text"]
        == "HT"
    )


def test_echo_of_nothing_more(live: Live) -> None:
    body = live.post("/v1/completions", prompt="Hey", echo=True, logprobs=0, max_tokens=0).json()
    choice = body["choices"][0]
    assert (choice["text"], len(choice["logprobs"]["tokens"])) == ("Hey", 3)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3, **NONE_CACHED}


def test_a_streamed_echo_comes_once_and_first(live: Live) -> None:
    parts = events(
        live.post("/v1/completions", prompt="Hey", echo=True, logprobs=0, max_tokens=3, stream=True)
    )
    assert [part["choices"][0]["text"] for part in parts] == ["HeyT", "h", "e"]
    assert parts[0]["choices"][0]["logprobs"]["tokens"] == ["H", "e", "y", "T"]
    assert parts[1]["choices"][0]["logprobs"] == {
        "tokens": ["h"], "token_logprobs": [-0.25], "top_logprobs": [{"h": -0.25}], "text_offset": [4],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": "a" * 101}, "prompt"),
        ({"prompt": ["a", "b" * 101]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"n": 4}, "n"),
        ({"n": 3, "prompt": ["a"] * 4 + ["b"]}, "prompt"),
        ({"max_tokens": 61}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": "x" * 21}, "stop"),
        ({"stop_token_ids": [1, 2, 3, 4, 5]}, "stop_token_ids"),
        ({"stop_token_ids": [259]}, "stop_token_ids"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1, "4": 1}}, "logit_bias"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_every_limit_is_checked_before_the_engine_hears_of_it(live: Live, fields: Any, param: str) -> None:
    live.fake.last.clear()
    assert refused(live.post("/v1/completions", **{"prompt": "a", **fields}))[0] == param
    assert live.fake.last == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a"] * 4}, {"prompt": "a" * 100}, {"prompt": [258]}, {"n": 3}, {"max_tokens": 60},
        {"logprobs": 5}, {"stop": ["a", "b", "c", "d"]}, {"stop": "x" * 20},
        {"logit_bias": {"1": 1, "2": 1, "3": 1}},
        {"best_of": 1}, {"suffix": None},
    ],
)  # fmt: skip
def test_what_is_just_within_a_limit_is_served(live: Live, fields: Any) -> None:
    assert live.post("/v1/completions", **{"prompt": "a", "max_tokens": 1, **fields}).status_code == 200


def test_a_wrong_model_is_404_and_says_what_is_served(live: Live) -> None:
    response = live.post("/v1/completions", prompt="a", model="gpt-5")
    assert refused(response, 404) == ("model", "model_not_found")
    assert "'fake'" in response.json()["error"]["message"]
