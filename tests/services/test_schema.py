"""Bodies are strict: what is not understood is refused, and the refusal names the field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from services.errors import ApiError
from services.schema import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse


def refusal(kind: type[Body], body: Any) -> tuple[str | None, str | None]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse(kind, raw)
    assert caught.value.status == 400
    assert caught.value.message
    return caught.value.param, caught.value.code


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}], **fields}


@pytest.mark.parametrize(
    ("prompt", "batch"),
    [
        ("text", ("text",)),
        (["one", "two"], ("one", "two")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_is_always_read_as_a_batch(prompt: Any, batch: Any) -> None:
    assert parse(CompletionBody, json.dumps({"prompt": prompt}).encode()).prompt == batch


@pytest.mark.parametrize("prompt", [[], [1, "a"], [True], [1.0], None, 5, [["a"]], {"text": "a"}, [[1], "a"]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refusal(CompletionBody, {"prompt": prompt}) == ("prompt", "invalid_value")


@pytest.mark.parametrize("name", ["top_a", "guided_json"])
def test_unknown_fields_are_named(name: str) -> None:
    for kind, body in ((CompletionBody, completion()), (ChatBody, chat())):
        param, code = refusal(kind, {**body, name: 1})
        assert param == name
        assert code == "unknown_field"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"functions": [{}]},
        {"tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {}},
        {"web_search_options": {}},
        {"reasoning_effort": "low"},
        {"store": True},
        {"service_tier": "auto"},
        {"prediction": {}},
        {"metadata": {}},
    ],
)
def test_what_this_server_does_not_do_is_refused_by_name(fields: dict[str, Any]) -> None:
    assert refusal(ChatBody, chat(**fields)) == (next(iter(fields)), "unsupported")


def test_values_that_ask_for_what_happens_anyway_are_taken() -> None:
    body = chat(
        response_format={"type": "text"}, modalities=["text"], tool_choice="none", tools=None, stop=None
    )
    assert parse(ChatBody, json.dumps(body).encode()).stop == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": True},
        {"temperature": "1"},
        {"temperature": 2.1},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": 1.5},
        {"top_k": -2},
        {"min_p": 2},
        {"n": 0},
        {"n": 1.0},
        {"n": "1"},
        {"n": True},
        {"seed": 2**63},
        {"seed": 0.5},
        {"seed": 10**400},
        {"max_tokens": -1},
        {"min_tokens": -1},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"stream": 1},
        {"stream": "true"},
        {"stop": 5},
        {"stop": [""]},
        {"stop": ["a", None]},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": [True]},
        {"user": 5},
        {"model": 5},
        {"ignore_eos": 1},
        {"logit_bias": []},
    ],
)
def test_values_of_another_type_or_range_are_refused(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    assert refusal(CompletionBody, completion(**fields)) == (name, "invalid_value")
    assert refusal(ChatBody, chat(**fields)) == (name, "invalid_value")


@pytest.mark.parametrize(
    "bias", [{"x": 1}, {"-1": 1}, {"1.0": 1}, {"5": 101}, {"5": True}, {"5": "1"}, {"٣": 1}]
)
def test_logit_bias_takes_token_ids_and_bounded_numbers(bias: dict[str, Any]) -> None:
    param, _ = refusal(CompletionBody, completion(logit_bias=bias))
    assert param == f"logit_bias.{next(iter(bias))}"


def test_an_integer_is_fine_where_a_number_is_wanted() -> None:
    body = parse(
        CompletionBody, json.dumps(completion(temperature=1, top_p=1, logit_bias={"5": -100})).encode()
    )
    assert (body.temperature, body.top_p, body.logit_bias) == (1.0, 1.0, {"5": -100.0})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"prompt": "a"} x',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"prompt": "a", "temperature": nan}',
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000,
        b"\xef\xbb\xbf{}",
        b'{"prompt": "a\nb"}',
    ],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    assert refusal(CompletionBody, raw) == (None, "invalid_json")


@pytest.mark.parametrize("raw", [b"null", b"[]", b'"a"', b"5"])
def test_only_an_object_is_a_body(raw: bytes) -> None:
    assert refusal(CompletionBody, raw) == (None, "invalid_body")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(number: str) -> None:
    param, _ = refusal(CompletionBody, b'{"prompt": "a", "temperature": ' + number.encode() + b"}")
    assert param == "temperature"


@pytest.mark.parametrize(
    ("content", "text"),
    [("plain", "plain"), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab")],
)
def test_content_is_a_text_or_text_parts(content: Any, text: str) -> None:
    body = parse(ChatBody, json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
    assert body.messages[0].content == text


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, "messages[0].content"),
        ({"role": "tool", "content": "a"}, "messages[0].role"),
        ({"role": "assistant", "content": "a", "tool_calls": []}, "messages[0].tool_calls"),
        ({"role": "user", "content": "a", "extra": 1}, "messages[0].extra"),
        (5, "messages[0]"),
    ],
)
def test_a_wrong_message_is_refused_where_it_is_wrong(message: Any, param: str) -> None:
    assert refusal(ChatBody, {"messages": [message]})[0] == param


def test_an_answer_can_be_sent_back_as_the_client_dumps_it() -> None:
    message = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert parse(ChatBody, json.dumps({"messages": [message]}).encode()).messages[0].role == "assistant"


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionBody, {}, "prompt"),
        (ChatBody, {}, "messages"),
        (TokenizeBody, {}, "prompt"),
        (DetokenizeBody, {}, "tokens"),
    ],
)
def test_required_fields_are_named(kind: type[Body], body: Any, param: str) -> None:
    assert refusal(kind, body) == (param, "missing_field")


@pytest.mark.parametrize("tokens", [None, 5, "a", [1.0], [True], [None]])
def test_tokens_to_detokenize_are_a_list_of_ids(tokens: Any) -> None:
    assert refusal(DetokenizeBody, {"tokens": tokens}) == ("tokens", "invalid_value")


def test_no_messages_are_refused() -> None:
    assert refusal(ChatBody, {"messages": []})[0] == "messages"


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({"messages": [1] * 400_000}).encode(),
        json.dumps({"prompt": "a", **{f"k{n}": 1 for n in range(100_000)}}).encode(),
    ],
    ids=["messages", "fields"],
)
def test_a_body_full_of_errors_is_refused_quickly(raw: bytes) -> None:
    begin = time.perf_counter()
    refusal(ChatBody, raw)
    assert time.perf_counter() - begin < 1.0


def test_a_long_unknown_name_is_not_sent_back_whole() -> None:
    param, _ = refusal(CompletionBody, {"prompt": "a", "x" * 100_000: 1})
    assert param is not None
    assert len(param) == 200
