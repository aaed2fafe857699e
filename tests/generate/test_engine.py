"""The engine as a whole: what comes out is what one request alone would get, whatever happens around it."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
import torch

from axicon.generate.engine import FAILURES_BORNE, Engine
from axicon.generate.request import Limits, Overloaded, Request, RequestError, SamplingParams
from axicon.generate.runner import LocalRunner
from axicon.generate.sampling.sample import logprobs
from axicon.step import StepOutput

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def engine(runner64, letters):
    return Engine(runner64, letters, eos_ids=[1], limits=Limits(max_queue=20))


def request(name, prompt=(5, 6, 7), choice=0, deadline=None, **params):
    params = {"max_tokens": 6} | GREEDY | params
    return Request(
        id=name, prompt=list(prompt), params=SamplingParams(**params), choice=choice, deadline=deadline
    )


def drain(engine, *requests):
    """Run to the end; deltas by (id, choice)."""
    for one in requests:
        engine.add(one)
    found = {}
    while engine.has_work:
        for delta in engine.step():
            found.setdefault((delta.request_id, delta.choice), []).append(delta)
    return found


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.tokens]


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


@torch.inference_mode()
def greedy(decoder, prompt, count):
    """Without engine, cache or chunks."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_equals_the_dense_model(engine, decoder64, letters):
    found = drain(engine, request("a", prompt=range(2, 50), max_tokens=20))["a", 0]
    want = greedy(decoder64, range(2, 50), 20)
    assert tokens_of(found) == want
    assert text_of(found) == letters.decode(
        want, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert [d.finish_reason for d in found] == [None] * 19 + ["length"]
    assert (found[-1].prompt_tokens, found[-1].completion_tokens) == (48, 20)


class Pool:
    """Requests with the tokens they must get, computed one at a time."""

    def __init__(self, decoder, letters):
        source = random.Random(0)
        engine = Engine(
            LocalRunner(decoder, kv_bytes=4 << 20, max_rows=1, prefill_chunk=64), letters, eos_ids=[1]
        )
        self.cases = []
        for i in range(40):
            prompt = [source.randrange(2, 96) for _ in range(source.choice([1, 2, 15, 16, 17, 31, 40, 70]))]
            params = dict(GREEDY, max_tokens=source.randrange(1, 14))
            if i % 3 == 0:
                params = {"max_tokens": params["max_tokens"], "seed": i, "temperature": 1.3}
            if i % 5 == 0:
                params |= {"top_p": 0.8, "repetition_penalty": 1.2}
            tokens = tokens_of(drain(engine, request("x", prompt, **params))["x", 0])
            if params.get("temperature") == 0 and "top_p" not in params:
                assert tokens == greedy(decoder, prompt, params["max_tokens"])
            self.cases.append((prompt, params, tokens))


def test_500_random_schedules_change_nothing(decoder64, letters):
    """Arrivals, cancels, chunk sizes and batch sizes at random, in float64: the same tokens as one at a
    time.
    """
    pool = Pool(decoder64, letters)
    runners = [
        LocalRunner(decoder64, kv_bytes=kv, max_rows=rows, prefill_chunk=chunk)
        for kv, rows, chunk in ((4 << 20, 8, 16), (400_000, 3, 32), (4 << 20, 5, 7), (4 << 20, 16, 64))
    ]
    split = LocalRunner(decoder64, kv_bytes=4 << 20, max_rows=6, prefill_chunk=16)
    split.path = dataclasses.replace(split.path, merged=False, body_tile=8, head_tile=4)
    runners.append(split)
    finished = cancelled = 0
    for seed in range(500):
        source = random.Random(seed)
        runner = runners[seed % len(runners)]
        engine = Engine(runner, letters, eos_ids=[1])
        arrivals = sorted(
            (source.randrange(12), str(i), source.choice(pool.cases)) for i in range(source.randrange(2, 6))
        )
        dropped = {name for _, name, _ in arrivals if source.random() < 0.15}
        found = {name: [] for _, name, _ in arrivals}
        step = 0
        while arrivals or engine.has_work:
            while arrivals and arrivals[0][0] <= step:
                _, name, (prompt, params, tokens) = arrivals.pop(0)
                engine.add(request(name, prompt, **params))
                found[name].append(tokens)
            if dropped and source.random() < 0.2:
                engine.cancel(dropped.pop())
            for delta in engine.step():
                found[delta.request_id].append(delta)
            step += 1
        for want, *deltas in found.values():
            got = tokens_of(deltas)
            if deltas[-1].finish_reason == "cancelled":
                cancelled += 1
                assert got == want[: len(got)]
            else:
                finished += 1
                assert got == want, f"schedule {seed}"
        assert runner.cache.bytes_in_use == 0
        assert not runner.cache.rows
        assert engine.stats().slots_reserved == 0
    assert finished > 1000
    assert cancelled > 50


def test_cancel_frees_the_cache_within_one_step(engine, runner64):
    engine.add(request("a", prompt=range(2, 30), max_tokens=100))
    engine.add(request("b", max_tokens=100))
    for _ in range(4):
        engine.step()
    both = runner64.cache.bytes_in_use
    engine.cancel("a")
    deltas = engine.step()
    assert [d.finish_reason for d in deltas if d.request_id == "a"] == ["cancelled"]
    assert runner64.cache.bytes_in_use == both // 2
    engine.cancel("b")
    engine.cancel("never heard of")
    engine.step()
    assert runner64.cache.bytes_in_use == 0
    assert not engine.has_work


def test_cancel_ends_all_choices_and_requests_that_wait(runner64, letters):
    engine = Engine(runner64, letters, eos_ids=[1])
    for choice in range(12):
        engine.add(request("a", choice=choice, max_tokens=50))
    engine.step()
    assert engine.stats().waiting == 4
    engine.cancel("a")
    deltas = engine.step()
    assert sorted(d.choice for d in deltas) == list(range(12))
    assert {d.finish_reason for d in deltas} == {"cancelled"}
    assert engine.stats().finished_total == {"cancelled": 12}


def test_a_deadline_ends_a_request_with_what_it_has(engine):
    engine.add(request("a", max_tokens=400, deadline=time.monotonic() + 0.05))
    engine.add(request("late", deadline=time.monotonic() - 1))
    found = drain(engine)
    assert found["a", 0][-1].finish_reason == "deadline"
    assert len(tokens_of(found["a", 0])) > 0
    assert [d.finish_reason for d in found["late", 0]] == ["deadline"]
    assert tokens_of(found["late", 0]) == []


def test_choices_of_a_seeded_request_differ_and_repeat(engine):
    def run():
        requests = [request("a", choice=i, seed=7, temperature=1.0, max_tokens=8) for i in range(3)]
        return [tokens_of(deltas) for _, deltas in sorted(drain(engine, *requests).items())]

    first = run()
    assert first == run()
    assert len({tuple(tokens) for tokens in first}) == 3


def test_without_a_seed_runs_differ(engine):
    runs = {
        tuple(tokens_of(drain(engine, request("a", temperature=1.5, max_tokens=12))["a", 0]))
        for _ in range(4)
    }
    assert len(runs) > 1


def test_end_token_stop_token_and_stop_string(engine, decoder64, letters):
    want = greedy(decoder64, (5, 6, 7), 12)
    text = letters.decode(want, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(set(want[:6])) == 6, "the cases below need different tokens"
    ended = Engine(engine.runner, letters, eos_ids=[want[3]])
    found = drain(ended, request("a", max_tokens=12, ignore_eos=False))["a", 0]
    assert (tokens_of(found), text_of(found)) == (want[:4], text[:3])
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", None)
    found = drain(engine, request("a", max_tokens=12, stop_token_ids=(want[4],)))["a", 0]
    assert (tokens_of(found), text_of(found)) == (want[:5], text[:4])
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", want[4])
    stop = text[3:6]
    found = drain(engine, request("a", max_tokens=12, stop=(stop, "never")))["a", 0]
    assert (tokens_of(found), text_of(found)) == (want[:6], text[:3])
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", stop)
    found = drain(engine, request("a", max_tokens=5, stop=(stop,)))["a", 0]
    assert (text_of(found), found[-1].finish_reason) == (text[:5], "length"), "what was held back is not lost"


def test_min_tokens_forbids_the_end(engine, decoder64, letters):
    want = greedy(decoder64, (5, 6, 7), 3)
    ended = Engine(engine.runner, letters, eos_ids=[want[0]])
    found = drain(ended, request("a", max_tokens=12, min_tokens=4, ignore_eos=False))["a", 0]
    assert len(tokens_of(found)) >= 4
    assert want[0] not in tokens_of(found)[:4]


def test_stop_strings_count_from_min_tokens_on(engine, decoder64, letters):
    want = greedy(decoder64, (5, 6, 7), 12)
    text = letters.decode(want, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    found = drain(engine, request("a", max_tokens=12, min_tokens=6, stop=(text[2], text[8])))["a", 0]
    assert text[2] not in text[6:9]
    assert (text_of(found), found[-1].stop_reason) == (text[:8], text[8])


@pytest.mark.parametrize("chunked", [False, True])
def test_logprobs_of_prompt_and_output(decoder64, letters, chunked):
    runner = LocalRunner(decoder64, kv_bytes=4 << 20, max_rows=2, prefill_chunk=7 if chunked else 64)
    engine = Engine(runner, letters, eos_ids=[1])
    prompt = list(range(2, 30))
    found = drain(
        engine, request("a", prompt, max_tokens=5, logprobs=2, prompt_logprobs=1), request("b"),
        request("c", prompt, max_tokens=5, logprobs=0),
    )  # fmt: skip
    tokens = tokens_of(found["a", 0])
    with torch.inference_mode():
        want = decoder64.logits(torch.tensor([prompt + tokens]))[0].log_softmax(-1)
    entries = [entry for delta in found["a", 0] for entry in delta.logprobs]
    assert [entry.text_offset for entry in entries] == list(range(5))
    prompt_entries = found["a", 0][0].prompt_logprobs
    assert [delta.prompt_logprobs for delta in found["a", 0][1:]] == [None] * 4
    assert prompt_entries[0].logprob is None
    assert [entry.text_offset for entry in prompt_entries] == list(range(28))
    for position, entry in enumerate([*prompt_entries, *entries]):
        assert entry.token == (prompt + tokens)[position]
        if position:
            row = want[position - 1]
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
            count = 1 if position < 28 else 2
            assert [token for token, _ in entry.top] == row.topk(count).indices.tolist()
    assert [entry.top for delta in found["c", 0] for entry in delta.logprobs] == [()] * 5


def test_a_prompt_can_be_scored_without_generating(engine):
    found = drain(
        engine, request("a", range(2, 40), max_tokens=0, prompt_logprobs=0), request("b", max_tokens=0)
    )
    assert [d.finish_reason for d in found["a", 0]] == ["length"]
    assert len(found["a", 0][0].prompt_logprobs) == 38
    assert [(d.finish_reason, d.tokens) for d in found["b", 0]] == [("length", ())]


def test_a_prompt_of_one_token_has_its_logprobs_once(engine):
    found = drain(engine, request("a", prompt=(5,), max_tokens=3, prompt_logprobs=2))["a", 0]
    assert [delta.prompt_logprobs and len(delta.prompt_logprobs) for delta in found] == [1, None, None]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (5, 96)}, "prompt"),
        ({"prompt": [5] * 512}, "prompt"),
        ({"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 7}, "min_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {96: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: 101.0}}, "logit_bias"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(engine, change, param):
    with pytest.raises(RequestError) as refused:
        engine.add(request("a", **change))
    assert refused.value.param == param
    assert not engine.has_work


def test_other_refusals(engine, decoder64, letters):
    with pytest.raises(RequestError, match="500 tokens and max_tokens is 13, together they may have 512"):
        engine.add(request("a", prompt=[5] * 500, max_tokens=13))
    with pytest.raises(RequestError, match="adapter"):
        engine.add(dataclasses.replace(request("a"), adapter=3))
    engine.add(request("a"))
    with pytest.raises(RequestError, match="already running"):
        engine.add(request("a"))
    for i in range(engine.most_requests - 1):
        engine.add(request(str(i)))
    with pytest.raises(Overloaded) as refused:
        engine.add(request("one too many"))
    assert refused.value.retry_after >= 1
    drain(engine)
    small = LocalRunner(decoder64, kv_bytes=200_000, max_rows=2, prefill_chunk=16)
    little = Engine(small, letters, eos_ids=[1])
    assert little.max_model_len == small.capacity.slots // 32 * 32 < 512
    with pytest.raises(RequestError, match="together they may have"):
        little.add(request("a", max_tokens=little.max_model_len))
    drain(little, request("a", max_tokens=little.max_model_len - 3))


class Broken:
    """A runner that fails, or answers nonsense, when a chosen token is computed."""

    def __init__(self, runner, token, how):
        self.runner, self.token, self.how = runner, token, how
        self.capacity, self.fingerprint = runner.capacity, runner.fingerprint
        self.slots_reserved = runner.slots_reserved

    def forward(self, step):
        hit = step.tokens_N == self.token
        if self.how == "raise" and hit.any():
            broken = dataclasses.replace(step, tokens_N=torch.where(hit, 10**6, step.tokens_N))
            return self.runner.forward(broken)
        logits = self.runner.forward(step).logits_WV.clone()
        if self.how == "nan":
            logits[hit[step.wanted_N]] = torch.nan
        return StepOutput(logits)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}])
def test_nan_logits_end_one_request_only(engine, letters, params):
    clean = drain(engine, request("good", **params))["good", 0]
    broken = Engine(Broken(engine.runner, 90, "nan"), letters, eos_ids=[1])
    found = drain(broken, request("bad", prompt=(5, 90), **params), request("good", **params))
    assert [d.finish_reason for d in found["bad", 0]] == ["error"]
    assert "probabilities" in found["bad", 0][0].error
    assert tokens_of(found["good", 0]) == tokens_of(clean)
    assert engine.runner.cache.bytes_in_use == 0


def test_a_failing_forward_ends_its_step_and_the_engine_lives_on(runner64, letters):
    engine = Engine(Broken(runner64, 90, "raise"), letters, eos_ids=[1])
    engine.add(request("old", max_tokens=50))
    engine.step()
    engine.step()
    found = drain(engine, request("bad", prompt=(5, 90)))
    assert found["bad", 0][-1].finish_reason == "error"
    assert found["old", 0][-1].finish_reason == "error"
    assert runner64.cache.bytes_in_use == 0
    again = drain(engine, request("new"))["new", 0]
    assert again[-1].finish_reason == "length"


def test_an_engine_that_only_fails_gives_up(runner64, letters):
    engine = Engine(Broken(runner64, 90, "raise"), letters, eos_ids=[1])
    for _ in range(FAILURES_BORNE - 1):
        drain_one = request("bad", prompt=(90,))
        engine.add(drain_one)
        engine.step()
    engine.add(request("bad", prompt=(90,)))
    with pytest.raises(IndexError):
        engine.step()


def test_a_request_whose_text_fails_ends_alone(engine, letters):
    class Picky(type(letters)):
        def decode(self, token_ids, **options):
            if bad in token_ids:
                raise RuntimeError("no such token")
            return super().decode(token_ids, **options)

    bad = None
    first = tokens_of(drain(engine, request("a"))["a", 0])
    other = tokens_of(drain(engine, request("b", prompt=(9, 9, 8)))["b", 0])
    bad = next(token for token in first if token not in other)
    found = drain(Engine(engine.runner, Picky(), eos_ids=[1]), request("a"), request("b", prompt=(9, 9, 8)))
    assert found["a", 0][-1].finish_reason == "error"
    assert found["a", 0][-1].error == "internal error"
    assert tokens_of(found["b", 0]) == other
    assert engine.runner.cache.bytes_in_use == 0


def test_a_sampler_that_fails_for_a_row_ends_that_row(engine, letters):
    class Touchy:
        def choose(self, probs_RC, ids_RC, draws):
            if any(draw.seed == 13 for draw in draws):
                raise RuntimeError("unlucky")
            return ids_RC[:, 0]

    touchy = Engine(engine.runner, letters, eos_ids=[1], sampler=Touchy())
    found = drain(
        touchy, request("a", temperature=1.0, seed=13), request("b", temperature=1.0, seed=14), request("c")
    )
    reasons = {name: deltas[-1].finish_reason for (name, _), deltas in found.items()}
    assert reasons == {"a": "error", "b": "length", "c": "length"}


def test_stats_count_what_happened(engine):
    drain(engine, request("a", prompt=range(2, 40), max_tokens=5), request("b", max_tokens=2))
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (38 + 3, 7)
    assert stats.finished_total == {"length": 2}
    assert (stats.running, stats.waiting, stats.slots_reserved) == (0, 0, 0)
    # 38 prompt tokens in chunks of 16, then four steps for the other four tokens.
    assert stats.steps_total == 3 + 4
    assert stats.step_tokens == 1
    assert stats.step_seconds > 0
    assert sum(stats.decode_steps.counts) == 4


def test_cancelling_what_ended_does_not_touch_a_later_request_of_that_name(engine):
    drain(engine, request("a"))
    engine.cancel("a")
    found = drain(engine, request("a"))["a", 0]
    assert found[-1].finish_reason == "length"


def test_nan_in_a_scored_prompt_ends_that_request_only(engine, letters):
    broken = Engine(Broken(engine.runner, 90, "nan"), letters, eos_ids=[1])
    bad = request("bad", prompt=(5, 90, 6, 7), prompt_logprobs=1)
    found = drain(broken, bad, request("good", logprobs=1))
    assert [d.finish_reason for d in found["bad", 0]] == ["error"]
    assert found["good", 0][-1].finish_reason == "length"


def test_logprobs_fit_into_json():
    entry = logprobs(torch.tensor([[0.0, -torch.inf, 1.0]]), [1], 3)[0]
    assert entry.logprob == -9999.0
    assert [value for _, value in entry.top][-1] == -9999.0
