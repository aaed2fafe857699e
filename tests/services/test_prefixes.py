"""Prompts that begin alike over HTTP: counts in `usage`, one namespace per key, figures, the switch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from axicon.recipe import ServeRecipe
from services.generation import engine_thread
from tests.services.live import Live, serving
from tests.services.test_completions import events
from tests.services.tiny import tiny_model

PROMPT = "Every request of this service begins with the same long instructions. "
KEYS = ("one", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def recipe(folder: Path, **settings: Any) -> ServeRecipe:
    common = {"dtype": "float32", "threads": 1, "kv_gib": 0.05, "max_rows": 4, "prefill_chunk": 16}
    return ServeRecipe.model_validate({"model": str(folder), **common, **settings})


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in KEYS]
    with serving(recipe(folder, api_key_hashes=hashes), engine_thread) as running:
        yield running


def ask(live: Live, key: str, text: str, **body: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    whole = {"prompt": PROMPT + text, "max_tokens": 6, "temperature": 0, "logprobs": 1, **body}
    answer: dict[str, Any] = live.client.post("/v1/completions", json=whole, headers=headers).json()
    return answer


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def figure(live: Live, name: str, key: str = KEYS[0]) -> float:
    figures = live.client.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text
    line = f'{name}{{model_name="tiny"}} '
    return float(next(one for one in figures.splitlines() if one.startswith(line)).removeprefix(line))


def test_each_key_shares_with_itself_alone(live: Live, folder: Path) -> None:
    whole = len(PROMPT) // 16 * 16
    found = [ask(live, KEYS[0], "First."), ask(live, KEYS[0], "Then."), ask(live, KEYS[1], "Then.")]
    assert [cached(answer) for answer in found] == [0, whole, 0]
    assert cached(ask(live, KEYS[1], "Then.")) == (len(PROMPT) + 4) // 16 * 16
    with serving(recipe(folder, prefix_cache=0), engine_thread) as plain:
        want = ask(plain, "none", "Then.")
        assert cached(ask(plain, "none", "Then.")) == 0
        assert figure(plain, "axicon:prefix_cache_slots") == 0
    assert found[1]["choices"] == found[2]["choices"] == want["choices"]
    assert figure(live, "vllm:prefix_cache_hits_total") == 2 * whole
    assert figure(live, "vllm:prefix_cache_queries_total") == sum(
        answer["usage"]["prompt_tokens"] for answer in (*found, found[2])
    )
    assert figure(live, "axicon:prefix_cache_requests_total") == 2
    assert figure(live, "axicon:prefix_cache_slots") >= 2 * whole
    assert figure(live, "axicon:prefix_cache_bytes") > 0
    assert figure(live, "vllm:kv_cache_usage_perc") == 0


def test_choices_and_prompts_count_once(live: Live) -> None:
    answer = ask(live, KEYS[0], "", prompt=["x" * 40, "x" * 40], n=2, seed=1, temperature=1)
    # The other choices of a prompt took over what the first one computed; the second prompt found both.
    assert cached(answer) == 32
    assert answer["usage"]["prompt_tokens"] == 80


def test_a_stream_says_it_too_and_a_bounded_cache_never(live: Live) -> None:
    ask(live, KEYS[0], "Once.")
    body = {
        "prompt": PROMPT + "Twice.",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    parts = events(live.client.post("/v1/completions", json=body, headers=headers))
    assert parts[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) // 16 * 16
    assert cached(ask(live, KEYS[0], "Once.", kv={"policy": "h2o", "budget": 40})) == 0


def test_the_share_is_checked() -> None:
    with pytest.raises(ValueError, match="prefix_cache"):
        ServeRecipe.model_validate({"prefix_cache": 1.5})
