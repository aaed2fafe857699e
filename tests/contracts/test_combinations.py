"""Formats, cache policies and ways to guess, put together as users do: the text never changes, nothing is
left in a cache, and what cannot be has a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from axicon.generate.engine import Engine
from axicon.generate.refused import METHODS, POLICIES
from axicon.generate.request import Delta, KVSettings, Request, RequestError, SamplingParams, Speculation
from tests.contracts.combinations import FORMATS, PAGE, decoder, engine_of, in_format, page, refusals, works

PROMPTS = ([5, 9, 33, 17, 60, 8, 41] * 6, [(7 * i + i * i) % 150 + 2 for i in range(37)])
"""One that repeats itself, for guesses that are read off the text, and one that does not."""
SAMPLINGS = ({"temperature": 0.0}, {"temperature": 0.7, "seed": 11})
ALONE = ("chain", "lookup", "rsd_s"), ("full", "h2o", "window")
"""Ways to guess and policies that are run alone too, sampled; all are in the batch."""


def request(policy: str, way: str, sampling: int) -> Request:
    prompt = PROMPTS[sampling]
    bias = dict.fromkeys(PROMPTS[0], 4.0)
    speculation = None if way == "none" else Speculation(method=way)
    params = SamplingParams(
        max_tokens=24, ignore_eos=True, logit_bias=bias, speculation=speculation, **SAMPLINGS[sampling]
    )  # type: ignore[arg-type]
    kv = KVSettings(policy=policy, budget=20, evict_every=8)
    return Request(id=f"{policy} {way} {sampling}", prompt=prompt, params=params, kv=kv)


def texts(engine: Engine, requests: Iterable[Request]) -> tuple[dict[str, tuple[int, ...]], list[Delta]]:
    """Tokens by request, and all last deltas, of one batch."""
    found: dict[str, tuple[int, ...]] = {}
    last = []
    for one in requests:
        engine.add(one)
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] = found.get(delta.request_id, ()) + delta.tokens
            if delta.finish_reason is not None:
                assert delta.error is None
                last.append(delta)
    return found, last


def audit(engine: Engine) -> None:
    """Both caches are as they were before the first request."""
    draft = engine.speculator._draft
    assert draft is not None
    for runner in (engine.runner, draft.runner):
        assert runner.cache.rows == {}
        assert runner.cache.bytes_in_use == runner.cache.slots_reserved == 0
    assert draft._rows == draft._slots == {}
    stats = engine.stats()
    assert (stats.slots_reserved, stats.running, stats.waiting) == (0, 0, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_is_that_of_the_format_and_policy_alone(name: str) -> None:
    engine = engine_of(in_format(name), decoder(noise=0.004))
    plain = {}
    for policy in POLICIES:
        for sampling in range(len(SAMPLINGS)):
            one = request(policy, "none", sampling)
            plain[policy, sampling] = texts(engine, [one])[0][one.id]
            audit(engine)
    assert len(set(plain.values())) > len(POLICIES), "policies that change nothing prove nothing"
    pairs = [(p, w) for p in POLICIES for w in ("none", *METHODS) if works(p, w)]
    cases = [(policy, way, sampling) for policy, way in pairs for sampling in range(len(SAMPLINGS))]
    together, ends = texts(engine, [request(*case) for case in cases])
    assert sum(delta.accepted for delta in ends) > len(ends)
    audit(engine)
    for policy, way, sampling in cases:
        one = request(policy, way, sampling)
        assert together[one.id] == plain[policy, sampling], one.id
        if way in ALONE[0] and policy in ALONE[1] and sampling:
            assert texts(engine, [one])[0][one.id] == plain[policy, sampling], f"{one.id}, alone"
            audit(engine)


def test_what_is_refused_is_refused_with_its_sentence() -> None:
    bare = engine_of(decoder())
    found = [one for some in refusals().values() for one in some]
    assert {one.sentence for one in found if "draft model" in one.sentence}
    for one in refusals()["Without `draft=`"]:
        asked = Request(id="a", prompt=PROMPTS[0])
        for setting in one.settings:
            asked = setting.on(asked)
        with pytest.raises(RequestError) as raised:
            bare.add(asked)
        assert (str(raised.value), raised.value.param) == (one.sentence, one.param)
    assert all(len(one.sentence.split()) > 5 and one.param for one in found)


def test_the_page_shows_what_is_run_here() -> None:
    assert PAGE.read_text() == page(), "docs/combinations.md is stale: make combinations"
