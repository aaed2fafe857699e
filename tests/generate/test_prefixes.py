"""Prompts that begin alike: what is taken over has the bits of what would have been computed, nobody gets
what is not his, and no request waits for room that only blocks take."""

from __future__ import annotations

import random

import pytest
import torch

from axicon.generate.engine import Engine
from axicon.generate.paged import PagedRunner
from axicon.generate.prefixes import GRAIN
from axicon.generate.request import KVSettings, Limits, Request, SamplingParams, Speculation
from axicon.generate.runner import LocalRunner
from axicon.generate.scheduler import Stream
from axicon.model.native import why_not
from axicon.step import KeptBlock, RowPolicy

CHUNK = 32


@pytest.fixture(scope="module", params=["native", "torch"])
def runners(request, make_decoder):
    """Two equal ones of 2,048 slots: the kernels in bfloat16, torch in float32."""
    dtype = torch.float32 if request.param == "torch" else torch.bfloat16
    found = []
    for _ in range(2):
        decoder = make_decoder(dtype, hidden_size=64, head_dim=32)
        if request.param == "native" and (reason := why_not(decoder)) is not None:
            pytest.skip(f"no C++ kernels: {reason}")
        size = 2048 * 256 * dtype.itemsize * 3 // 2
        settings = {"max_rows": 6, "prefill_chunk": CHUNK, "kernels": request.param}
        found.append(LocalRunner(decoder, kv_bytes=size, **settings))
    return found


@pytest.fixture
def runner(runners):
    return runners[1]


@pytest.fixture
def engines(runners, letters):
    """(without, with blocks). What blocks hold is given back behind the test."""
    yield tuple(
        Engine(runner, letters, eos_ids=[1], limits=Limits(kv_floor=8, prefix_cache=share))
        for runner, share in zip(runners, (0.0, 0.5), strict=True)
    )
    cache, runners[1]._staged = runners[1].cache, []
    for block in list(cache.blocks):
        cache.drop(block)
    for row in list(cache.rows):
        cache.release(row)
    assert cache.bytes_in_use == 0


def text(length, seed=0):
    return torch.randint(2, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(name, prompt, max_tokens=6, kv=None, namespace="", **params):
    params = {"temperature": 0.0, "ignore_eos": True, "logprobs": 2, **params}
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Request(id=name, prompt=prompt, params=sampling, kv=kv, namespace=namespace)


def pairs(delta):
    return list(zip(delta.tokens, delta.logprobs, strict=True))


def run(engine, *arrivals):
    """arrivals: requests, or (step, request). What each gets, to the last bit, and how much it took over."""
    left = [one if isinstance(one, tuple) else (0, one) for one in arrivals]
    found, cached, step = {}, {}, 0
    while left or engine.has_work:
        while left and left[0][0] <= step:
            engine.add(left.pop(0)[1])
        for d in engine.step():
            assert d.error is None
            found.setdefault(d.request_id, []).extend(pairs(d))
            cached[d.request_id] = d.cached_tokens
        step += 1
        held = engine.runner.cache
        assert held.slots_reserved + held.slots_kept <= held.slots
    assert not engine.runner.cache.rows
    assert engine.runner.cache.slots_kept == engine.stats().prefixes.slots
    assert engine.stats().kv_bytes == {"full": 0}
    return found, cached


def test_a_prompt_that_begins_like_an_earlier_one(engines):
    plain, sharing = engines
    grain = sharing._scheduler.prefixes.grain
    base = text(200)
    work = [
        ask("first", base), ask("same", base), ask("longer", base + text(90, 1)), ask("other", text(200, 2)),
        ask("branch", base[:130] + text(60, 3), seed=3, temperature=0.9), ask("short", base[:grain]),
    ]  # fmt: skip
    want = {one.id: run(plain, one)[0][one.id] for one in work}
    cached = {}
    for one in work:
        got, taken = run(sharing, one)
        assert got[one.id] == want[one.id]
        cached |= taken
    whole = 199 // grain * grain
    assert cached == {
        "first": 0, "same": whole, "longer": 200 // grain * grain, "other": 0,
        "branch": 130 // grain * grain, "short": 0,
    }  # fmt: skip
    stats = sharing.stats()
    assert stats.prefixes.reused_total == sum(cached.values())
    assert stats.prefixes.requests_total == 3
    assert stats.prefixes.asked_total == sum(len(one.prompt) for one in work)
    assert stats.prompt_tokens_total == stats.prefixes.asked_total - stats.prefixes.reused_total
    assert stats.kept_bytes == stats.prefixes.slots * sharing.runner.capacity.bytes_per_slot
    assert plain.stats().prefixes.asked_total == 0


def test_equal_tokens_behind_other_ones_are_others(engines):
    plain, sharing = engines
    first, second, middle, rest = (text(64, seed) for seed in range(4))
    for start, behind in ((first, middle), (second, rest)):
        run(sharing, ask("a", [*start, *behind, 5]))
    mixed = ask("b", [*second, *middle, 5])
    assert run(sharing, mixed) == (run(plain, mixed)[0], {"b": 64})


def test_what_a_step_copies_is_not_given_back_before(engines):
    _, sharing = engines
    run(sharing, ask("a", text(129)))
    prefixes = sharing._scheduler.prefixes
    stream = Stream(ask("b", text(129)), row=0)
    prefixes.take(stream, prefixes.find(stream))
    assert len(prefixes.reuses) * prefixes.grain == 128
    assert not prefixes.shrink(0)
    prefixes.flush()
    assert prefixes.shrink(0)
    assert len(prefixes.drops) * prefixes.grain == 128


def test_who_goes_on_behind_a_failed_step_offers_its_beginning_again(engines):
    """Blocks behind a beginning that is gone would lie there for nobody."""
    prefixes = engines[1]._scheduler.prefixes
    stream = Stream(ask("a", text(150)), row=0, computed=128)
    prefixes.offer(stream, 0, 2048)
    offered = [kept.start for kept in prefixes.keeps.values()]
    assert offered[0] == 0
    prefixes.flush()
    prefixes.forget([stream])
    prefixes.offer(stream, 0, 2048)
    assert [kept.start for kept in prefixes.keeps.values()] == offered
    assert prefixes.find(Stream(ask("b", text(150)))) == 128


def test_answers_are_taken_over_where_no_bit_depends_on_how_they_were_computed(engines):
    plain, sharing = engines
    first = ask("turn", text(150), 100)
    said = [token for token, _ in run(sharing, first)[0]["turn"]]
    follows = ask("next", [*first.prompt, *said, *text(20, 1)])
    got, cached = run(sharing, follows)
    assert got == run(plain, follows)[0]
    # The last token drawn was never computed.
    free = sharing.runner.capacity.free_chunks
    assert cached["next"] == (249 // GRAIN * GRAIN if free else 150 // CHUNK * CHUNK)


def test_a_prompt_of_one_token_to_draw_is_kept_too(engines):
    _, sharing = engines
    run(sharing, ask("a", text(64), 1))
    assert run(sharing, ask("b", [*text(64), 5], 1))[1] == {"b": 64}


def test_namespaces_share_nothing(engines):
    _, sharing = engines
    base = text(200)
    for name in ("", "one", "two"):
        assert run(sharing, ask("a", base, namespace=name))[1] == {"a": 0}
        assert run(sharing, ask("b", base, namespace=name))[1] == {"b": 192}


def test_bounded_caches_neither_give_nor_take(engines):
    plain, sharing = engines
    bounded = ask("bounded", text(200), 30, KVSettings(policy="h2o", budget=0.3))
    want = run(plain, bounded)[0]
    assert run(sharing, bounded) == (want, {"bounded": 0})
    assert sharing.runner.cache.slots_kept == 0
    whole = ask("whole", text(200))
    assert run(sharing, whole) == (run(plain, whole)[0], {"whole": 0})
    assert run(sharing, bounded) == (want, {"bounded": 0})


def test_scored_prompts_are_computed_and_kept(engines):
    plain, sharing = engines
    run(sharing, ask("a", text(200)))
    scored = ask("scored", text(200), prompt_logprobs=1)
    results = []
    for engine in (plain, sharing):
        engine.add(scored)
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        results.append([(d.tokens, d.logprobs, d.prompt_logprobs) for d in deltas])
        assert deltas[-1].cached_tokens == 0
    assert results[0] == results[1]
    assert sharing.stats().prefixes.asked_total == 200


def test_equal_prompts_at_once_are_computed_once(engines):
    plain, sharing = engines
    base = text(160)
    work = [ask(str(i), [*base, *text(9, i)], seed=i, temperature=1.0) for i in range(6)]
    want, _ = run(plain, *work)
    got, cached = run(sharing, *work)
    assert got == want
    grain = sharing._scheduler.prefixes.grain
    shared = 160 // grain * grain
    assert cached == {"0": 0} | {str(i): shared for i in range(1, 6)}
    assert sharing.stats().prompt_tokens_total == 6 * 169 - 5 * shared


def test_who_waits_for_a_prompt_goes_on_when_that_one_is_cancelled(engines):
    plain, sharing = engines
    first, second = ask("first", text(300)), ask("second", text(300))
    want = run(plain, second)[0]
    for steps in range(5):
        for one in (first, second):
            sharing.add(one)
        deltas = []
        for _ in range(steps):
            deltas += sharing.step()
        sharing.cancel("first")
        while sharing.has_work:
            deltas += sharing.step()
        got = [pair for d in deltas if d.request_id == "second" for pair in pairs(d)]
        assert got == want["second"]
        assert not sharing.runner.cache.rows
        sharing._scheduler.prefixes.forget()


@pytest.mark.parametrize("verify", ["coupled", "rrs"])
def test_guessing_ahead_beside_it(engines, verify):
    plain, sharing = engines
    bias = {"logit_bias": {7: 20.0, 8: 21.0, 9: 20.0}, "logprobs": None}
    base = text(150)

    def tokens(engine, name):
        speculation = Speculation(method="lookup", verify=verify)
        engine.add(ask(name, base, 90, speculation=speculation, **bias))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        return [t for d in deltas for t in d.tokens], deltas[-1].cached_tokens

    want, _ = tokens(plain, "a")
    assert tokens(sharing, "a") == (want, 0)
    assert tokens(sharing, "b") == (want, 128)
    assert sum(sharing.stats().drafts["lookup"].accepted) > 5
    longer = ask("c", base + want[:80])
    assert run(sharing, longer)[0] == run(plain, longer)[0]


def test_room_is_given_back_to_whoever_needs_it(engines):
    """A request that takes the whole cache begins at once, whatever blocks held."""
    _, sharing = engines
    for i in range(40):
        run(sharing, ask(str(i), text(300, i)))
    held = sharing.stats().prefixes
    assert held.slots <= sharing._scheduler.prefixes.most
    assert held.slots > sharing._scheduler.prefixes.most - 128
    assert held.dropped_total > 0
    capacity = sharing.runner.capacity
    rows = [ask(f"long {i}", text(300, i), 200) for i in range(capacity.slots // 512)]
    for one in rows:
        sharing.add(one)
    for _ in range(40):
        sharing.step()
    assert sharing.stats().running == min(len(rows), capacity.max_rows)
    assert sharing.stats().waiting == len(rows) - sharing.stats().running
    while sharing.has_work:
        assert all(d.error is None for d in sharing.step())


def test_no_room_for_blocks_is_no_harm(make_decoder, letters):
    decoder = make_decoder(torch.float32)
    size = LocalRunner(decoder, kv_bytes=1 << 20).cache.bytes_per_slot
    runner = LocalRunner(decoder, kv_bytes=size * 256 * 3 // 2, max_rows=2, prefill_chunk=CHUNK)
    assert runner.capacity.slots == 256
    engine = Engine(runner, letters, eos_ids=[1], limits=Limits(prefix_cache=1.0))
    for seed in (0, 0, 1, 0):
        _, cached = run(engine, ask("a", text(200, seed), 56))
        assert cached == {"a": 0}, "all of the cache is the request's own"
    _, cached = run(engine, ask("b", text(100), 4))
    _, cached = run(engine, ask("c", text(100), 4))
    assert cached == {"c": 96}
    run(engine, ask("d", text(150, 1), 40))
    assert engine.runner.cache.slots_kept <= 64, "what is kept of d lies in what its own row left"


def test_a_step_that_fails_costs_blocks_and_nothing_else(engines, monkeypatch):
    plain, sharing = engines
    one, two = ask("one", text(200)), ask("two", text(200))
    run(sharing, one)
    kept = sharing.runner.cache.slots_kept
    compute, apply = LocalRunner.compute, LocalRunner.apply
    for name, whole in (("compute", compute), ("apply", apply)):
        assert kept
        failing = monkeypatch.context()
        with failing as patch:
            patch.setattr(LocalRunner, name, lambda *_: (_ for _ in ()).throw(MemoryError("no")))
            sharing.add(two)
            assert [d.finish_reason for d in sharing.step()] == ["error"]
        assert getattr(LocalRunner, name) is whole
        sharing.runner._staged = []
        if name == "apply":
            # The row was never opened: nothing to release.
            sharing._scheduler.releases.clear()
        assert run(sharing, one)[1] == {"one": 0}
        assert run(sharing, two) == (run(plain, two)[0], {"two": 192})


def test_blocks_that_cannot_be(runner, make_step):
    row = runner.capacity.max_rows + 1
    chain = [(5 + i, i, row, i - 1) for i in range(8)]
    policy = RowPolicy(row + 1, 0, 8, 4, 0, 4)
    runner.forward(make_step(chain, reserves=((row, 64),)))
    keep, more = KeptBlock(7, row, 0, 8), KeptBlock(8, row, 0, 4)
    bad = [
        make_step(keeps=(keep,)),
        make_step(commits=range(8), keeps=(keep._replace(stop=9),)),
        make_step(commits=range(8), keeps=(keep._replace(row=row + 1),)),
        make_step(commits=range(8), keeps=(keep, keep)),
        make_step(commits=range(8), reuses=(keep,)),
        make_step(commits=range(8), keeps=(keep,), reuses=(keep._replace(start=8, stop=12),)),
        make_step(commits=range(8), keeps=(keep,), reuses=(keep._replace(row=row + 1),)),
        make_step(
            commits=range(8), keeps=(keep,), reuses=(keep._replace(row=row + 1),),
            reserves=((row + 1, 64),), policies=(policy,),
        ),
    ]  # fmt: skip
    for step in bad:
        with pytest.raises(ValueError, match="KeptBlock"):
            runner.forward(step)
    assert not runner.cache.blocks
    runner.forward(make_step(commits=range(8), keeps=(keep, more), releases=(row,)))
    assert runner.cache.slots_kept == 12
    again = ((row + 2, 64),)
    copies = (more._replace(row=row + 2), keep._replace(row=row + 2, start=4, stop=12))
    runner.forward(make_step([(5, 12, row + 2, -1)], reserves=again, reuses=copies))
    assert runner.cache.rows[row + 2].committed == 12
    runner.forward(make_step(commits=(0,), drops=(7, 8, 9), releases=(row + 2,)))
    assert runner.cache.bytes_in_use == 0


def test_pages_keep_blocks_too(make_decoder, letters):
    runner = PagedRunner(
        make_decoder(torch.float32), kv_bytes=4 << 20, max_rows=4, prefill_chunk=16, graphs=False
    )
    engine = Engine(runner, letters, eos_ids=[1], limits=Limits(prefix_cache=0.5))
    for cached in (0, GRAIN):
        engine.add(ask("a", text(70)))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        assert (deltas[-1].finish_reason, deltas[-1].cached_tokens) == ("length", cached)


def test_any_schedule_gives_the_bits_of_each_request_alone(engines):
    """Arrivals, cancellations, policies and namespaces in any order, in a cache too small for all of it."""
    plain, sharing = engines
    source = random.Random(0)
    trunks = [text(250, seed) for seed in range(3)]
    kinds = []
    for i in range(24):
        trunk, cut = source.choice(trunks), source.randrange(1, 250)
        prompt = [*trunk[:cut], *text(source.randrange(1, 40), 100 + i)]
        kv = KVSettings(policy="h2o", budget=0.5) if source.random() < 0.15 else None
        kinds.append(
            ask(
                f"{i}", prompt, source.randrange(1, 50), kv, source.choice(["", "", "x"]), seed=i,
                temperature=source.choice([0.0, 1.0]),
            )
        )  # fmt: skip
    want = {one.id: run(plain, one)[0][one.id] for one in kinds}
    reused = 0
    for _ in range(3):
        order = source.sample(kinds, len(kinds))
        gone = set()
        arrivals, found = [(source.randrange(60), one) for one in order], {}
        arrivals.sort(key=lambda pair: pair[0])
        step = 0
        while arrivals or sharing.has_work:
            while arrivals and arrivals[0][0] <= step:
                sharing.add(arrivals.pop(0)[1])
            if source.random() < 0.05 and (live := [s.request.id for s in sharing._scheduler.running]):
                name = source.choice(live)
                gone.add(name)
                sharing.cancel(name)
            for d in sharing.step():
                assert d.error is None
                found.setdefault(d.request_id, []).extend(pairs(d))
            step += 1
        for name, got in found.items():
            assert got == want[name][: len(got)] if name in gone else got == want[name], name
        assert not sharing.runner.cache.rows
        reused = sharing.stats().prefixes.reused_total
    assert reused > 2000
    assert sharing.runner.cache.slots_kept == sharing.stats().prefixes.slots
