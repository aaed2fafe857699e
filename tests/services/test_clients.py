"""Unmodified clients against the server: the official `openai` package, and schemathesis over
/openapi.json."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from axicon.recipe import RequestLimits, ServeRecipe
from services.generation import engine_thread
from tests.services.fake_engine import FakeThread
from tests.services.live import Live, serving
from tests.services.tiny import tiny_model

KEY = "sk-axicon-client-test"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The real engine behind API keys."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXICON_CLIENT_KEYS", KEY)
        recipe = ServeRecipe(
            model=str(folder),
            dtype="float32",
            threads=1,
            kv_gib=0.05,
            max_rows=4,
            api_keys_env="AXICON_CLIENT_KEYS",
        )
        with serving(recipe, engine_thread) as running:
            yield running


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(live: Live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "axicon"


def test_a_chat_and_its_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, seed=3, logprobs=True, top_logprobs=2
    )
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert whole.usage is not None
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=30,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == choice.message.content
    assert usage == whole.usage


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)
    back = first.choices[0].message.model_dump()
    history: Any = [*MESSAGES, back, *MESSAGES]
    again = client.chat.completions.create(model="tiny", messages=history, max_tokens=5)
    assert again.choices[0].message.content is not None


def test_completions_of_all_kinds_of_prompts(client: openai.OpenAI) -> None:
    for prompt, count in (("Hi", 1), (["Hi", "Ho"], 2), ([72, 105], 1), ([[72], [73], [74]], 3)):
        body = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=4,
            logprobs=2,
            echo=True,
            n=2,
            seed=1,
            logit_bias={"256": -100},
        )
        assert [choice.index for choice in body.choices] == list(range(2 * count))
        assert all(choice.logprobs and choice.logprobs.tokens for choice in body.choices)
        assert body.system_fingerprint


def test_raw_and_streamed_responses(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model="tiny", prompt="Hi", max_tokens=3)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].finish_reason in ("stop", "length")
    with client.completions.with_streaming_response.create(
        model="tiny", prompt="Hi", max_tokens=3, stream=True
    ) as response:
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]


def test_errors_have_their_own_classes(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="Hi", temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature", "invalid_value", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="unknown field") as unknown:
        client.completions.create(model="tiny", prompt="Hi", extra_body={"best_model": 1})
    assert unknown.value.param == "best_model"
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.completions.create(model="gpt-5", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="Embeddings"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()


async def test_the_asynchronous_client(later: openai.AsyncOpenAI) -> None:
    whole = await later.completions.create(model="tiny", prompt="Hi", max_tokens=20, seed=5)
    stream = await later.completions.create(model="tiny", prompt="Hi", max_tokens=20, seed=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError):
        await later.completions.create(model="tiny", prompt="Hi", max_tokens=-1)


def test_overload_is_retried_until_there_is_room() -> None:
    with (
        serving(
            ServeRecipe(max_rows=1, max_queue=0), lambda recipe: FakeThread(recipe, step_s=0.005)
        ) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        live.fake.hold()
        first = pool.submit(client.completions.create, model="fake", prompt="a", max_tokens=3)
        assert live.wait_until(lambda: live.server.unfinished == 1)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="fake", prompt="a")
        assert full.value.response.headers["retry-after"] == "1"
        patient = client.with_options(max_retries=2)
        second = pool.submit(patient.completions.create, model="fake", prompt="a", max_tokens=3)
        assert live.wait_until(
            lambda: 'refusals_total{model_name="fake"} 2.0' in live.client.get("/metrics").text
        )
        live.fake.go_on()
        assert first.result().choices[0].text == "The"
        assert second.result().choices[0].text == "The"


@pytest.mark.slow
def test_schemathesis_finds_nothing() -> None:
    """Positive and negative bodies from our own description: no 5xx, no undescribed status, type or shape,
    and nothing accepted that the description forbids. Acceptance of everything it allows is not asked for:
    rules between fields (`top_logprobs` needs `logprobs`) have no place in it."""
    recipe = ServeRecipe(limits=RequestLimits(output_tokens=2), max_rows=32)
    program = Path(sys.executable).with_name("schemathesis")
    with serving(recipe) as live:
        result = subprocess.run(
            [
                program, "run", f"{live.url}/openapi.json", "--seed", "7", "--max-examples", "8",
                "--mode", "all",
                "--phases", "examples,coverage,fuzzing", "--exclude-checks", "positive_data_acceptance",
                "--generation-database", "none", "--no-color",
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    report = "\n".join(line[:300] for line in result.stdout.splitlines())
    assert result.returncode == 0, report[-4000:]
    assert "12 selected / 12 total" in report
    assert len(live.fake.last) > 20, "too few bodies were good enough to reach the engine"
