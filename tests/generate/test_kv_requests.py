"""Requests with a cache policy through the engine: equal to none at full budget, alone or in any batch, and
nothing is left behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from axicon.generate.engine import Engine
from axicon.generate.eviction import KV_POLICIES
from axicon.generate.request import (
    KVSettings,
    Limits,
    Request,
    RequestError,
    SamplingParams,
    Speculation,
)
from axicon.generate.retention import kv_settings, retention
from axicon.generate.runner import LocalRunner
from axicon.model.cache import size_class
from axicon.model.native import why_not

LIMITS = Limits(kv_floor=8)


@pytest.fixture(params=["native", "torch"])
def engine(request, make_decoder, letters):
    """The kernels in bfloat16, torch in float64."""
    dtype = torch.float64 if request.param == "torch" else torch.bfloat16
    decoder = make_decoder(dtype, hidden_size=64, head_dim=32)
    if request.param == "native" and (reason := why_not(decoder)) is not None:
        pytest.skip(f"no C++ kernels: {reason}")
    kernels = "native" if request.param == "native" else "torch"
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16, kernels=kernels)
    return Engine(runner, letters, eos_ids=[1], limits=LIMITS)


def prompt(length, seed=0):
    return torch.randint(2, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(name="a", length=60, kv=None, max_tokens=40, **params):
    params = {"temperature": 0.0, "ignore_eos": True, "logprobs": 2, **params}
    return Request(
        id=name,
        prompt=prompt(length, len(name)),
        kv=kv,
        params=SamplingParams(max_tokens=max_tokens, **params),
    )


def run(engine, arrivals):
    """arrivals: (step, request). Everything each request gets, to the last bit."""
    arrivals, found, step = list(arrivals), {}, 0
    while arrivals or engine.has_work:
        while arrivals and arrivals[0][0] <= step:
            engine.add(arrivals.pop(0)[1])
        for d in engine.step():
            found.setdefault(d.request_id, []).append((d.tokens, d.logprobs, d.error))
        step += 1
    assert engine.runner.cache.bytes_in_use == 0
    assert not engine.runner.cache.rows
    assert not engine.runner._bounded
    assert not engine.runner._prompts
    assert engine.stats().slots_reserved == 0
    return found


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_full_budget_is_no_policy(engine, policy):
    """A budget one short of everything: nothing ever goes, and all the machinery runs."""
    plain = run(engine, [(0, request())])["a"]
    bounded = run(engine, [(0, request(kv=KVSettings(policy=policy, budget=99)))])["a"]
    assert engine.stats().kv_evicted_total == {policy: 0}
    if engine.runner.native:
        assert bounded == plain
    else:
        # Torch attends over rows with masks by another kernel, whose last bit may differ.
        assert [tokens for tokens, _, _ in bounded] == [tokens for tokens, _, _ in plain]


def test_a_budget_that_holds_everything_costs_nothing(engine):
    whole = request(kv=KVSettings(policy="h2o", budget=100))
    assert run(engine, [(0, whole)]) == run(engine, [(0, request())])
    assert engine.stats().kv_evicted_total == {}


def test_mixed_policies_in_one_batch_change_nothing(engine):
    kinds = [None, *(KVSettings(policy=name, budget=0.3) for name in KV_POLICIES)]
    kinds.append(KVSettings(policy="h2o", budget=40, recent=10, sinks=0, evict_every=5))
    kinds += [KVSettings(policy="h2o", budget=0.3, score=score) for score in ("mean", "decay")]
    work = [
        request("r" * (i + 1), 30 + 11 * i, kv, 30, temperature=0.0 if i % 2 else 0.8, seed=i)
        for i, kv in enumerate(kinds)
    ]
    alone = {}
    for one in work:
        alone |= run(engine, [(0, one)])
    assert run(engine, [(0, one) for one in work]) == alone
    assert run(engine, [(2 * i, one) for i, one in enumerate(reversed(work))]) == alone
    assert len({tuple(t for t, _, _ in deltas) for deltas in alone.values()}) == len(work)


def test_a_small_budget_changes_the_text(engine):
    plain = run(engine, [(0, request())])["a"]
    assert run(engine, [(0, request(kv=KVSettings(policy="h2o", budget=0.2)))])["a"] != plain
    assert engine.stats().kv_evicted_total["h2o"] > 40


def test_a_request_ends_anywhere_and_leaves_nothing(engine):
    """Cancelled while its prompt passes the blocks, in its answer, and while it waits."""
    for steps in range(8):
        for name in ("one", "other", "waits"):
            engine.add(request(name, 90, KVSettings(policy="h2o", budget=0.3)))
        for _ in range(steps):
            engine.step()
        for name in ("one", "other", "waits"):
            engine.cancel(name)
        while engine.has_work:
            engine.step()
        assert engine.runner.cache.bytes_in_use == 0
        assert not engine.runner._bounded
        assert engine.stats().slots_reserved == 0


def test_the_prompt_passes_beside_running_rows(engine):
    """Rows that decode go on with every step, and the prompt advances by blocks."""
    engine.add(request("runs", 20, None, 60))
    engine.step()
    engine.add(request("long", 200, KVSettings(policy="h2o", budget=0.2)))
    got = [{d.request_id for d in engine.step() if d.tokens} for _ in range(4)]
    assert all("runs" in names for names in got)
    while engine.has_work:
        engine.step()


def test_admission_sets_aside_the_exact_maximum(make_decoder, letters):
    """Ten times as many long requests in the same memory, and none is thrown out or fails."""
    decoder = make_decoder(torch.float64)
    most = LocalRunner(decoder, kv_bytes=4 << 20).cache.bytes_per_slot * 512 * 3 // 2
    runner = LocalRunner(decoder, kv_bytes=most, max_rows=16, prefill_chunk=64)
    engine = Engine(runner, letters, eos_ids=[1], limits=LIMITS)
    kv = KVSettings(policy="h2o", budget=0.1)
    for name in ("full", *(f"bounded {i}" for i in range(12))):
        engine.add(request(name, 400, None if name == "full" else kv, 30))
    peak, failed = 0, []
    while engine.has_work:
        failed += [d.error for d in engine.step() if d.error]
        peak = max(peak, engine.stats().running)
        stats = engine.stats()
        assert sum(stats.kv_bytes.values()) <= most
        held = {"full": 0, "h2o": 0}
        for row, cache in runner.cache.rows.items():
            held["h2o" if row in runner._bounded else "full"] += sum(a.extent.nbytes for a in cache.layers)
        assert {"h2o": 0, **stats.kv_bytes} == held
        assert sum(stats.kv_slots.values()) == stats.slots_reserved
    assert not failed
    assert peak >= 8
    bounded = retention(kv, 400, 30, 8)
    assert bounded is not None
    assert (bounded.budget, bounded.most, size_class(bounded.most)) == (40, 56, 64)


@pytest.mark.parametrize(
    ("kv", "want"),
    [
        (KVSettings(policy="h2o", budget=0.2), (20, 10, 36)),
        (KVSettings(policy="h2o", budget=0.2, recent=0.05), (20, 5, 36)),
        (KVSettings(policy="h2o", budget=50, recent=12), (50, 12, 66)),
        (KVSettings(policy="h2o", budget=0.01), (8, 4, 24)),
        (KVSettings(policy="window", budget=30), (30, 26, 46)),
        (KVSettings(policy="tova", budget=30), (30, 1, 46)),
        (KVSettings(policy="snapkv", budget=60), (60, 15, 100)),
        (KVSettings(policy="h2o", budget=0.2, evict_every=4), (20, 10, 24)),
        (KVSettings(policy="h2o", budget=139, evict_every=64), (139, 69, 140)),
    ],
)
def test_what_settings_come_to(kv, want):
    found = retention(kv, 100, 40, 8)
    assert found is not None
    assert (found.budget, found.recent, found.most) == want


@pytest.mark.parametrize(
    ("kv", "param"),
    [
        ({"policy": "h3o"}, "kv.policy"),
        ({"policy": "h2o", "budget": 0}, "kv.budget"),
        ({"policy": "h2o", "budget": 7}, "kv.budget"),
        ({"policy": "h2o", "budget": -0.1}, "kv.budget"),
        ({"policy": "h2o", "budget": float("nan")}, "kv.budget"),
        ({"policy": "h2o", "budget": 20.5}, "kv.budget"),
        ({"policy": "h2o", "budget": 20, "recent": 18}, "kv.budget"),
        ({"policy": "h2o", "recent": -1}, "kv.recent"),
        ({"policy": "h2o", "sinks": -1}, "kv.sinks"),
        ({"policy": "window", "budget": 10, "sinks": 20}, "kv.budget"),
        ({"policy": "h2o", "evict_every": 0}, "kv.evict_every"),
        ({"policy": "h2o", "evict_every": 257}, "kv.evict_every"),
        ({"policy": "h2o", "budged": 3}, "kv.budged"),
        ({"policy": "h2o", "score": "max"}, "kv.score"),
        ({"policy": "tova", "score": "sum"}, "kv.score"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(engine, kv, param):
    with pytest.raises(RequestError) as refused:
        engine.add(request(kv=kv_settings(kv)))
    assert refused.value.param == param
    assert not engine.has_work


def test_other_refusals(engine):
    bounded = KVSettings(policy="h2o", budget=0.2)
    with pytest.raises(RequestError, match="no log-probabilities of the prompt"):
        engine.add(request(kv=bounded, prompt_logprobs=0))
    capacity = engine.runner.capacity
    engine.runner._capacity = dataclasses.replace(capacity, blocks=0)
    with pytest.raises(RequestError, match="in stages"):
        engine.add(request(kv=bounded))
    engine.add(request(kv=KVSettings(policy="full")))
    engine.cancel("a")
    engine.step()


@pytest.mark.parametrize("policy", [None, *KV_POLICIES, "h2o decay"])
def test_guessing_ahead_changes_nothing(engine, policy):
    """The cache is cut where it is cut without guesses, and from the same scores."""
    name, _, score = (policy or "").partition(" ")
    kv = policy and KVSettings(policy=name, budget=0.4, score=score or None)
    bias = {"logit_bias": {7: 20.0, 8: 21.0, 9: 20.0}}
    plain = run(engine, [(0, request(kv=kv, max_tokens=60, **bias))])["a"]
    guessing = request(
        kv=kv, max_tokens=60, speculation=Speculation(method="lookup", verify="coupled"), **bias
    )
    guessed = run(engine, [(0, guessing)])["a"]
    join = [[t for tokens, _, _ in deltas for t in tokens] for deltas in (plain, guessed)]
    assert join[0] == join[1]
    assert sum(engine.stats().drafts["lookup"].accepted) > 5
