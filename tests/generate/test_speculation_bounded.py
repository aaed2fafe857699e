"""Guesses and a bounded cache together: rows are cut at the same lengths, and the text is the same."""

from __future__ import annotations

import pytest

from axicon.generate.draftmodel import DraftModel
from axicon.generate.engine import Engine
from axicon.generate.eviction import KV_POLICIES
from axicon.generate.request import KVSettings, Limits, Request, SamplingParams, Speculation
from axicon.generate.runner import LocalRunner
from axicon.generate.speculate import Speculator
from tests.generate.test_speculation import drain, everything


def request(name, prompt, kv, method, **params):
    speculation = None if method is None else Speculation(method=method)
    params = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True} | params
    return Request(id=name, prompt=prompt, params=SamplingParams(**params, speculation=speculation), kv=kv)


@pytest.mark.parametrize("method", ["lookup", "chain", "rsd_s"])
@pytest.mark.parametrize("policy", sorted(KV_POLICIES))
def test_text_of_a_bounded_cache_is_that_of_a_run_without_guesses(decoder64, letters, policy, method):
    runner = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    drafter = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    speculator = Speculator(DraftModel(drafter), always=True)
    engine = Engine(runner, letters, eos_ids=[1], limits=Limits(kv_floor=8), speculator=speculator)
    phrase = [5, 9, 33, 17, 60, 8, 41]
    prompts = [(phrase * 9)[:length] for length in (61, 40, 24)]
    cases = [
        (KVSettings(policy=policy, budget=20, evict_every=8), {"logit_bias": dict.fromkeys(phrase, 4.0)}),
        (KVSettings(policy=policy, budget=0.6, evict_every=16), {"temperature": 0.7, "seed": 1}),
        (KVSettings(policy=policy, budget=30, evict_every=1), {}),
    ]  # fmt: skip
    plain = {}
    for i, (kv, params) in enumerate(cases):
        plain |= drain(engine, request(str(i), prompts[i], kv, None, **params))
    found = drain(
        engine, *(request(str(i), prompts[i], kv, method, **p) for i, (kv, p) in enumerate(cases)),
        request("full", prompts[0], None, method),
    )  # fmt: skip
    for i in range(len(cases)):
        assert everything(found[str(i)]) == everything(plain[str(i)]), cases[i]
    assert sum(found[str(i)][-1].accepted for i in range(2)) > 3
    assert runner.cache.bytes_in_use == drafter.cache.bytes_in_use == 0
    assert engine.stats().slots_reserved == 0
