"""Details a request may ask for: which tokens were guessed, and what a bounded cache holds."""

from __future__ import annotations

import pytest
import torch

from axicon.generate.details import picture
from axicon.generate.engine import Engine
from axicon.generate.eviction import KV_POLICIES
from axicon.generate.paged import PagedRunner
from axicon.generate.request import KVSettings, Limits, Request, SamplingParams, Speculation
from axicon.generate.speculate import Speculator
from tests.generate.test_speculation import drain

PROMPT = [5, 9, 33, 17, 60, 8, 41] * 6


def request(details=True, kv=None, speculation=None, **params):
    params = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True} | params
    bias = {"logit_bias": dict.fromkeys(PROMPT, 4.0)}
    params = SamplingParams(**params, **bias, speculation=speculation)
    return Request(id="a", prompt=PROMPT, params=params, kv=kv, details=details)


def engine_of(runner, letters):
    return Engine(runner, letters, eos_ids=[1], limits=Limits(kv_floor=8), speculator=Speculator(always=True))


def test_shades_say_how_much_of_a_column_is_there():
    heads = [torch.tensor([0, 1, 4]), torch.tensor([0, 4])]
    found = picture([heads, [torch.arange(5), torch.arange(5)]], 5)
    assert (found.positions, found.per_column, found.layers) == (5, 1, ("94009", "99999"))
    long = picture([[torch.tensor([0, 599])]], 600)
    assert (long.per_column, len(long.layers[0])) == (3, 200)
    assert set(long.layers[0][1:-1]) == {"0"}
    assert long.layers[0][0] == long.layers[0][-1] == "3"
    assert picture([[torch.arange(601)]], 601).layers[0] == "9" * 201, "the last column is smaller"
    assert picture([[torch.arange(1, 601)]], 601).layers[0][0] == "6"


@pytest.mark.parametrize("speculation", [None, Speculation(method="lookup")])
def test_origins_are_the_tokens_and_say_which_were_guessed(runner64, letters, speculation):
    engine = engine_of(runner64, letters)
    deltas = drain(engine, request(speculation=speculation))["a"]
    for delta in deltas:
        assert len(delta.origins) == len(delta.tokens)
        assert "".join(origin.text for origin in delta.origins) == delta.text
        assert [origin.drafted for origin in delta.origins] == [True] * (len(delta.tokens) - 1) + [False] or (
            delta.finish_reason is not None
        )
    drafted = sum(origin.drafted for delta in deltas for origin in delta.origins)
    assert drafted == deltas[-1].accepted
    assert (drafted > 5) == (speculation is not None)
    assert all(delta.kept is None for delta in deltas), "a full cache"


@pytest.mark.parametrize("policy", sorted(KV_POLICIES))
def test_a_bounded_cache_is_shown_when_it_was_cut(runner64, letters, policy):
    engine = engine_of(runner64, letters)
    kv = KVSettings(policy=policy, budget=16, evict_every=8)
    deltas = drain(engine, request(kv=kv, speculation=Speculation(method="lookup")))["a"]
    shown = [delta.kept for delta in deltas if delta.kept is not None]
    assert shown[0].positions == len(PROMPT)
    assert deltas[0].kept == shown[0]
    assert deltas[-1].kept == shown[-1]
    once = KV_POLICIES[policy].once
    assert len(shown) == (2 if once else 5), "behind the prompt, at three multiples of eight, at the end"
    for kept in shown[: 1 if once else 4]:
        assert len(kept.layers) == 2
        for layer in kept.layers:
            assert len(layer) == kept.positions
            assert layer[:4] == "9999", "sinks"
            assert sum(map(int, layer)) / 9 == pytest.approx(16, abs=2), "two heads of 16 slots"
    if policy == "window":
        assert shown[0].layers[0] == "9999" + "0" * 26 + "9" * 12


def test_pages_show_what_extents_show(runner64, decoder64, letters):
    kv, pictures = KVSettings(policy="h2o", budget=16, evict_every=8), []
    for runner in (
        runner64,
        PagedRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16, graphs=False),
    ):
        deltas = drain(engine_of(runner, letters), request(kv=kv))["a"]
        pictures.append([delta.kept for delta in deltas if delta.kept is not None])
    assert len(pictures[0]) == 5
    assert pictures[0] == pictures[1]


def test_who_does_not_ask_gets_nothing(runner64, letters):
    kv = KVSettings(policy="h2o", budget=16)
    for delta in drain(engine_of(runner64, letters), request(False, kv, Speculation(method="lookup")))["a"]:
        assert (delta.origins, delta.kept) == ((), None)
