"""`/v1/chat/completions` over a live server with a stand-in engine."""

from __future__ import annotations

from typing import Any

import pytest

from axicon.recipe import ServeRecipe
from tests.services.fake_engine import FakeThread
from tests.services.live import Live, serving
from tests.services.test_completions import events, refused, says

USER = [{"role": "user", "content": "Hello"}]


def ask(live: Live, **fields: Any) -> Any:
    return live.post("/v1/chat/completions", **{"messages": USER, **fields})


def test_an_answer_has_openai_shape(live: Live) -> None:
    body = ask(live, model="fake", max_tokens=8).json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": says(8), "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]


def test_messages_go_through_the_chat_template(live: Live) -> None:
    live.fake.last.clear()
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    prompt_tokens = ask(live, messages=messages, max_tokens=1).json()["usage"]["prompt_tokens"]
    prompt = live.fake.last[0].prompt
    assert len(prompt) == prompt_tokens
    text = live.server.served.text.decode(prompt)
    assert text == "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"
    assert list(prompt).count(256) == 2, "special tokens of the template are single tokens"


def test_without_max_tokens_an_answer_may_fill_the_context() -> None:
    with serving(ServeRecipe(), lambda recipe: FakeThread(recipe, max_model_len=100)) as live:
        usage = ask(live).json()["usage"]
        assert usage["total_tokens"] == 100
        assert refused(ask(live, max_tokens=93))[1] == "context_length_exceeded"
        assert (
            refused(ask(live, messages=[{"role": "user", "content": "x" * 98}]))[1]
            == "context_length_exceeded"
        )


def test_the_recipe_caps_an_answer_without_max_tokens(live: Live) -> None:
    assert ask(live).json()["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_tokens": 7, "max_completion_tokens": 7}]
)
def test_both_names_of_the_limit_work(live: Live, fields: Any) -> None:
    assert ask(live, **fields).json()["usage"]["completion_tokens"] == 7


def test_a_stream_begins_with_the_role_and_says_the_same_as_one_body(live: Live) -> None:
    whole = ask(live, max_tokens=40).json()["choices"][0]["message"]["content"]
    parts = events(ask(live, max_tokens=40, stream=True))
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert "🦊" in whole
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stream_of_choices_ends_with_their_counts(live: Live) -> None:
    parts = events(ask(live, n=3, max_tokens=5, stream=True, stream_options={"include_usage": True}))
    roles = [part["choices"][0]["index"] for part in parts[:-1] if "role" in part["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 15
    assert all(part["usage"] is None for part in parts[:-1])


def test_logprobs_carry_bytes_and_alternatives(live: Live) -> None:
    logprobs = ask(live, max_tokens=8, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert len(logprobs["content"]) == 8
    assert logprobs["content"][0] == {
        "token": "T", "logprob": -0.25, "bytes": [84],
        "top_logprobs": [
            {"token": "T", "logprob": -0.25, "bytes": [84]}, {"token": "U", "logprob": -1.25, "bytes": [85]},
        ],
    }  # fmt: skip
    spelled = b"".join(bytes(entry["bytes"]) for entry in logprobs["content"])
    assert spelled.decode() == says(8)


def test_logprobs_without_alternatives(live: Live) -> None:
    content = ask(live, max_tokens=2, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[], []]


def test_streamed_logprobs_add_up(live: Live) -> None:
    parts = events(ask(live, max_tokens=8, logprobs=True, stream=True))
    content = [
        entry for part in parts for entry in (part["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == says(8)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 6, "logprobs": True}, "top_logprobs"),
        ({"n": 4}, "n"),
        ({"max_tokens": 61}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_limits_are_checked_before_the_engine_hears_of_it(live: Live, fields: Any, param: str) -> None:
    live.fake.last.clear()
    assert refused(ask(live, **fields))[0] == param
    assert live.fake.last == []


def test_a_model_without_a_chat_template_says_so() -> None:
    with serving(ServeRecipe(), lambda recipe: FakeThread(recipe, template=None)) as live:
        assert refused(ask(live)) == (None, "no_chat_template")
        assert live.post("/v1/completions", prompt="a").status_code == 200


def test_a_template_that_refuses_messages_is_a_400() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with serving(ServeRecipe(), lambda recipe: FakeThread(recipe, template=template)) as live:
        response = ask(live)
        assert refused(response)[0] == "messages"
        assert "roles must alternate" in response.json()["error"]["message"]
