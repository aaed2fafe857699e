"""Guesses never change what comes out: greedy and coupled text is equal, token for token; rejection keeps the
law. And what was guessed wrong leaves nothing behind in the cache.
"""

from __future__ import annotations

import logging
import random
import time

import pytest
import torch

from axicon.generate.drafting import DRAFTERS
from axicon.generate.drafting.lookup import Lookup
from axicon.generate.engine import Engine
from axicon.generate.gain import Odds, StepCost, worth_checking
from axicon.generate.request import Request, RequestError, SamplingParams, Speculation
from axicon.generate.runner import LocalRunner
from axicon.generate.speculate import Speculator, read
from axicon.protocols import DraftTree

LOOKUP = Speculation(method="lookup")


def request(name, prompt=(5, 6, 7), choice=0, deadline=None, **params):
    params = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "speculation": LOOKUP} | params
    return Request(
        id=name, prompt=list(prompt), params=SamplingParams(**params), choice=choice, deadline=deadline
    )


def drain(engine, *requests):
    """Run to the end; deltas by id."""
    for one in requests:
        engine.add(one)
    found = {}
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append(delta)
    return found


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.tokens]


def build(runner, letters, **settings):
    return Engine(runner, letters, eos_ids=[1], speculator=Speculator(always=True), **settings)


@pytest.fixture
def engine(runner64, letters):
    return build(runner64, letters)


def repeating(seed, length=40):
    """A prompt that repeats itself, so that there is something to look up."""
    source = random.Random(seed)
    phrase = [source.randrange(2, 96) for _ in range(source.randrange(3, 9))]
    return (phrase * length)[:length]


PARAMS = [
    {}, {"temperature": 0.9, "seed": 1}, {"temperature": 1.2, "seed": 2, "top_p": 0.9},
    {"repetition_penalty": 1.3}, {"presence_penalty": 0.7, "temperature": 0.6, "seed": 3},
    {"logit_bias": {7: 3.0, 9: 3.0}, "min_tokens": 5, "ignore_eos": False}, {"logprobs": 2},
    {"temperature": 0.5, "seed": 4, "frequency_penalty": -1.5, "logprobs": 0},
    {"frequency_penalty": -2.0}, {"logit_bias": {11: 100.0}},
]  # fmt: skip


def everything(deltas):
    """All that a request got, apart from how it was cut into deltas."""
    whole = deltas[0]
    for delta in deltas[1:]:
        whole = whole.followed_by(delta)
    return (
        whole.text, whole.tokens, whole.finish_reason, whole.stop_reason, whole.completion_tokens,
        [(entry.token, round(entry.logprob, 9), entry.text_offset) for entry in whole.logprobs],
    )  # fmt: skip


def test_text_is_that_of_a_run_without_guesses(engine, decoder64, runner64, letters):
    """Greedy and seeded, with penalties that look at what a node's own path holds, alone and together."""
    requests = [request(str(i), repeating(i), **params) for i, params in enumerate(PARAMS)]
    plain = {}
    for i, params in enumerate(PARAMS):
        plain |= drain(engine, request(str(i), repeating(i), **params, speculation=None))
    together = drain(engine, *requests)
    accepted = 0
    for one in requests:
        want = everything(plain[one.id])
        assert everything(together[one.id]) == want
        alone = drain(engine, one)[one.id]
        assert everything(alone) == want
        last = alone[-1]
        accepted += last.accepted
        assert last.accepted + len([d for d in alone if d.tokens]) == last.completion_tokens
    assert accepted > 25
    assert runner64.cache.bytes_in_use == 0
    assert engine.stats().slots_reserved == 0


def test_what_ends_a_request_ends_it_inside_a_tree(engine, letters):
    prompt = repeating(0)
    bias = {"logit_bias": dict.fromkeys(prompt, 5.0)}
    text = tokens_of(drain(engine, request("a", prompt, speculation=None, max_tokens=40, **bias))["a"])
    letters_of = "".join(chr(64 + token) for token in text)
    for change in (
        {"max_tokens": 11}, {"stop": (letters_of[9:12],)}, {"stop_token_ids": (text[10],)}, {"max_tokens": 1},
        {"max_tokens": 2},
    ):  # fmt: skip
        for common in (bias, {}):
            settings = {"max_tokens": 40} | change | common
            plain = drain(engine, request("a", prompt, speculation=None, **settings))["a"]
            assert everything(drain(engine, request("a", prompt, **settings))["a"]) == everything(plain)


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_cache_holds_what_a_run_token_by_token_leaves(decoder64, letters, chunk):
    """After every step, what is committed equals the keys and values of a run without guesses."""
    runner = LocalRunner(decoder64, kv_bytes=4 << 20, max_rows=2, prefill_chunk=chunk)
    plain = LocalRunner(decoder64, kv_bytes=4 << 20, max_rows=2, prefill_chunk=chunk)
    bias = dict.fromkeys(repeating(3), 6.0)
    for one, speculation in ((runner, LOOKUP), (plain, None)):
        engine = build(one, letters)
        engine.add(request("a", repeating(3), max_tokens=60, logit_bias=bias, speculation=speculation))
        while len(engine._streams["a", 0].tokens) < 90:
            engine.step()
        one.last = engine._streams["a", 0].tokens
    row, other = runner.cache.rows[0], plain.cache.rows[0]
    common = min(row.committed, other.committed)
    assert common > 80
    for layer, (a, b) in enumerate(zip(row.layers, other.layers, strict=True)):
        torch.testing.assert_close(
            a.extent[:, :, :common], b.extent[:, :, :common], rtol=0, atol=1e-9, msg=f"layer {layer}"
        )


def test_schedules_with_guesses_change_nothing(decoder64, letters):
    """Arrivals, cancels and batch sizes at random."""
    runner = LocalRunner(decoder64, kv_bytes=4 << 20, max_rows=5, prefill_chunk=16)
    cases = []
    for i in range(12):
        prompt, params = repeating(i, random.Random(i).randrange(3, 60)), dict(PARAMS[i % len(PARAMS)])
        alone = drain(build(runner, letters), request("x", prompt, speculation=None, **params))["x"]
        cases.append((prompt, params, tokens_of(alone)))
    finished = 0
    for seed in range(40):
        source = random.Random(seed)
        engine = build(runner, letters)
        arrivals = sorted((source.randrange(12), str(i), source.choice(cases)) for i in range(4))
        found, step = {}, 0
        while arrivals or engine.has_work:
            while arrivals and arrivals[0][0] <= step:
                _, name, (prompt, params, tokens) = arrivals.pop(0)
                engine.add(request(name, prompt, **params))
                found[name] = [tokens]
            if source.random() < 0.02:
                engine.cancel(source.choice("0123"))
            for delta in engine.step():
                found[delta.request_id].append(delta)
            step += 1
        for want, *deltas in found.values():
            got = tokens_of(deltas)
            finished += deltas[-1].finish_reason != "cancelled"
            assert got == (want if deltas[-1].finish_reason != "cancelled" else want[: len(got)])
        assert not runner.cache.rows
    assert finished > 100


def test_rejection_keeps_the_law(decoder64, letters, make_decoder):
    """Three tokens of a model of 11, 3,000 times, against the law computed by enumeration. With other seeds
    the statistic exceeds its bound in one of 1,000 runs."""
    decoder = make_decoder(vocab_size=11, seed=3)
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=64, prefill_chunk=16)
    prompt = [2, 3, 4, 2, 3, 4, 2, 3]
    settings = {"temperature": 2.5, "top_p": 0.9, "max_tokens": 3}
    law = enumerated(decoder, prompt, 2.5, 0.9)
    count = 3000
    engine = build(runner, letters)
    speculation = Speculation(method="lookup", verify="rrs", depth=3)
    seen = torch.zeros(11, 11, 11)
    for first in range(0, count, 60):
        seeds = range(first, first + 60)
        asked = [request(str(i), prompt, seed=i, speculation=speculation, **settings) for i in seeds]
        found = drain(engine, *asked)
        for deltas in found.values():
            seen[tuple(tokens_of(deltas))] += 1
    assert float(seen[law == 0].sum()) == 0, "what top-p takes out never comes"
    assert chi_square(seen, law) < bound(law, count)
    stats = engine.stats().drafts["lookup"]
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


@torch.inference_mode()
def enumerated(decoder, prompt, temperature, top_p):
    law = torch.zeros(11, 11, 11, dtype=torch.float64)
    prefixes = {(): 1.0}
    for _ in range(3):
        longer = {}
        for prefix, weight in prefixes.items():
            logits = decoder.logits(torch.tensor([[*prompt, *prefix]]))[0, -1].double()
            probs = (logits / temperature).softmax(-1)
            order = probs.argsort(descending=True)
            mass = probs[order].cumsum(0)
            kept = order[: int((mass < top_p).sum()) + 1]
            for token in kept.tolist():
                longer[*prefix, token] = weight * float(probs[token] / probs[kept].sum())
        prefixes = longer
    for prefix, weight in prefixes.items():
        law[prefix] = weight
    return law


def chi_square(seen, law):
    """Cells that are expected fewer than five times are taken together."""
    count = float(seen.sum())
    expected, found = law.flatten() * count, seen.flatten().double()
    small = expected < 5
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    found = torch.cat([found[~small], found[small].sum()[None]])
    return float(((found - expected) ** 2 / expected.clamp(min=1e-9)).sum())


def bound(law, count):
    """Exceeded with a chance of one in 1,000 (Wilson and Hilferty's approximation of chi-square)."""
    freedom = int((law.flatten() * count >= 5).sum())
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_drafter_that_fails_leaves_the_request_alone(engine, monkeypatch, caplog):
    prompt = repeating(1)
    want = tokens_of(drain(engine, request("a", prompt, speculation=None))["a"])
    calls = []

    def guess(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 3:
            raise RuntimeError("a bug")
        return tokens[:2]

    monkeypatch.setattr(Lookup, "guess", guess)
    with caplog.at_level(logging.ERROR, logger="axicon"):
        assert tokens_of(drain(engine, request("a", prompt))["a"]) == want
    assert "request a goes on without speculation" in caplog.text
    assert len(calls) == 3
    assert engine.stats().drafts["lookup"].failed == 1


def test_a_deadline_or_cancel_inside_a_run_of_guesses_gives_the_cache_back(engine, runner64):
    engine.add(request("a", repeating(1), max_tokens=200))
    engine.add(request("late", repeating(1), max_tokens=200, deadline=time.monotonic() + 0.05))
    for _ in range(4):
        engine.step()
    engine.cancel("a")
    while engine.has_work:
        engine.step()
    assert runner64.cache.bytes_in_use == 0


@pytest.mark.parametrize(
    ("speculation", "sentence"),
    [
        (Speculation(method="guess"), "unknown speculation method 'guess', known are chain"),
        (Speculation(method="rsd_s"), "this deployment has none"),
        (Speculation(method="lookup", depth=0), "depth is 0, it must lie between 1 and 64"),
        (Speculation(method="lookup", depth=65), "depth is 65"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(engine, speculation, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        engine.add(request("a", speculation=speculation))
    assert caught.value.param == "speculation"
    assert not engine.has_work


def test_trees_past_the_limit():
    for name in (name for name, one in DRAFTERS.items() if one.needs_model):
        method = read(Speculation(method=name, width=1, depth=4), 16, models=True)
        assert method.depth == 4
        with pytest.raises(RequestError, match=r"at most 3|between 1 and 3"):
            read(Speculation(method=name, depth=4), 3, models=True)


def test_a_path_is_followed_by_its_tokens():
    tree = DraftTree((5, 6, 7, 7, 8), (-1, -1, 0, 1, 3))
    assert tree.depths() == [1, 1, 2, 2, 3]
    assert tree.follow([6, 7, 8, 9]) == [1, 3, 4]
    assert tree.follow([5, 8]) == [0]
    assert tree.follow([9]) == []
    assert tree.children(-1) == [0, 1]


def test_the_cost_of_a_step_is_learnt():
    cost = StepCost()
    for i in range(300):
        nodes = 1 + i % 9
        cost.note(nodes, 2.0 + 0.5 * nodes)
    assert cost.slope == pytest.approx(0.5, rel=0.1)
    assert cost.seconds(20) == pytest.approx(12, rel=0.1)
    cost.note(5, 1000.0)
    assert cost.seconds(5) < 6, "one hiccup is not believed"


def test_guesses_are_checked_where_they_pay():
    cost = StepCost()
    for i in range(200):
        cost.note(1 + i % 8, 3.6 + 0.27 * (i % 8))
    falling = [0.9**i for i in range(1, 9)]
    lengths, gain = worth_checking([falling], 1, cost)
    assert lengths == [8]
    assert gain > 2
    lengths, gain = worth_checking([falling, [0.02, 0.01]], 16, cost)
    assert lengths[1] == 0
    assert 0 < lengths[0] < 8, "the more streams, the fewer guesses"
    assert gain > 1
    dear = StepCost()
    for i in range(200):
        dear.note(1 + i % 8, 1.0 * (1 + i % 8))
    assert worth_checking([[0.5, 0.25]], 1, dear) == ([0], 1.0)


def test_odds_follow_what_happens():
    odds = Odds([0.5, 0.9])
    for _ in range(300):
        odds.note(1, False)
    assert odds.of(1) < 0.05
    assert odds.of(0) == 0.5


def test_guessing_is_switched_off_and_on_again_and_says_so(runner64, letters, caplog):
    engine = Engine(runner64, letters, eos_ids=[1])
    speculator = engine.speculator
    for i in range(300):  # nodes cost as much as steps: nothing is worth a guess
        speculator.note(1 + i % 8, 0.5 + i % 8)
    learn, speculator.note = speculator.note, lambda nodes, seconds: None
    bias = dict.fromkeys((7, 8), 50.0)
    with caplog.at_level(logging.INFO, logger="axicon"):
        found = drain(engine, request("a", repeating(1), max_tokens=200, logit_bias=bias))["a"]
        assert "speculation lookup is off: it does not pay with 1 streams" in caplog.text
        stats = engine.stats().drafts["lookup"]
        assert stats.left_out > 64
        for i in range(300):
            learn(1 + i % 8, 1.0)
        caplog.clear()
        again = drain(engine, request("b", repeating(1), max_tokens=200, logit_bias=bias))["b"]
    assert tokens_of(again) == tokens_of(found)
    assert "speculation lookup is on again" in caplog.text
    assert engine.stats().drafts["lookup"].gain > 1
    assert again[-1].accepted > 0
