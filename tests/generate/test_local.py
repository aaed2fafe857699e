"""The Python door, on the embedded model."""

from __future__ import annotations

import pytest

import axicon
from axicon.errors import AxiconError
from axicon.generate.local import LocalModel
from axicon.generate.request import RequestError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return axicon.load("demo", threads=1, kv_gib=0.25, max_rows=4)


def test_one_prompt(model):
    done = model.generate("The capital of France is", max_tokens=4, temperature=0, logprobs=1)
    assert done.text.startswith(" Paris")
    assert done.finish_reason == "length"
    assert len(done.tokens) == len(done.logprobs) == 4
    assert done.logprobs[0].top[0][0] == done.tokens[0]
    assert done.prompt_tokens == 5


def test_a_batch_equals_its_members(model):
    prompts = ["The sky is", "Two plus two is", "Once upon a time"] * 3
    ids = [model.tokenizer.encode(p) for p in prompts]
    together = model.generate(prompts, max_tokens=6, seed=5)
    assert model.generate(ids, max_tokens=6, seed=5) == together
    assert [model.generate(p, max_tokens=6, seed=5) for p in prompts[:3]] == together[:3]


def test_streams_may_interleave_and_join_to_the_whole(model):
    want = model.generate(["日本の首都は", "The 🦊 says"], max_tokens=8, temperature=0)
    a = model.generate("日本の首都は", max_tokens=8, temperature=0, stream=True)
    b = model.generate("The 🦊 says", max_tokens=8, temperature=0, stream=True)
    texts = ["", ""]
    for pieces in zip(a, b, strict=True):
        for i, piece in enumerate(pieces):
            texts[i] += piece.text
    assert texts == [w.text for w in want]
    assert list(a) == []


def test_dropping_a_stream_cancels_it(model):
    before = model.engine.stats().finished_total.get("cancelled", 0)
    for _ in model.generate(["Hello", "World"], max_tokens=500, ignore_eos=True, stream=True):
        break
    assert not model.engine.has_work
    assert model.engine.stats().finished_total["cancelled"] == before + 2


def test_chat_uses_the_template_and_stops(model):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    done = model.chat(messages, max_tokens=40, temperature=0)
    assert "Paris" in done.text
    assert done.finish_reason == "stop"
    assert (
        "".join(p.text for p in model.chat(messages, max_tokens=40, temperature=0, stream=True)) == done.text
    )


def test_stop_may_be_a_string(model):
    done = model.generate("1, 2, 3,", max_tokens=30, temperature=0, stop=" 6")
    assert (done.text, done.stop_reason) == (" 4, 5,", " 6")


def test_wrong_parameters_are_named(model):
    with pytest.raises(RequestError, match="unknown parameter 'heat'"):
        model.generate("x", heat=1)
    with pytest.raises(RequestError, match="temperature"):
        model.generate("x", temperature=-1)
    with pytest.raises(AxiconError):
        axicon.load("/nowhere/at/all")


def test_speculation_by_name_or_settings(model):
    want = model.generate("ababab", max_tokens=30, temperature=0.0)
    for asked in ("lookup", {"method": "lookup", "depth": 4}):
        found = model.generate("ababab", max_tokens=30, temperature=0.0, speculation=asked)
        assert found.tokens == want.tokens
    lookup = {"method": "lookup"}
    for wrong in ({"depth": 4}, lookup | {"size": 1}, lookup | {"verify": "no"}, "guess"):
        with pytest.raises(RequestError) as caught:
            model.generate("ababab", speculation=wrong)
        assert caught.value.param == "speculation"
