"""Trees of a draft model: whatever it guesses, text and law are the target's; both caches stay in step."""

from __future__ import annotations

import logging

import pytest
import torch

from axicon.errors import AxiconError
from axicon.generate.build import build_engine
from axicon.generate.drafting import DRAFTERS
from axicon.generate.draftmodel import DraftModel, best
from axicon.generate.engine import Engine
from axicon.generate.request import Request, RequestError, SamplingParams, Speculation
from axicon.generate.runner import LocalRunner
from axicon.generate.speculate import Speculator
from axicon.kernels import native
from axicon.model.skip import influence, skip_blocks
from tests.generate.test_speculation import bound, chi_square, drain, enumerated, everything, tokens_of

METHODS = sorted(name for name, one in DRAFTERS.items() if one.needs_model)
PROMPT = [5, 6, 7, 30, 41, 5, 6]


def request(name, prompt=PROMPT, method="rsd_s", choice=0, **params):
    speculation = None if method is None else Speculation(
        method=method, width=params.pop("width", None), depth=params.pop("depth", None),
        verify=params.pop("verify", None),
    )  # fmt: skip
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True} | params
    params = SamplingParams(**params, speculation=speculation)
    return Request(id=name, prompt=list(prompt), params=params, choice=choice)


def build(target, draft, letters, always=True, rows=8, chunk=16):
    runner = LocalRunner(target, kv_bytes=8 << 20, max_rows=rows, prefill_chunk=chunk)
    drafter = LocalRunner(draft, kv_bytes=8 << 20, max_rows=rows, prefill_chunk=chunk)
    speculator = Speculator(DraftModel(drafter), always=always)
    return Engine(runner, letters, eos_ids=[1], speculator=speculator), runner, drafter


@pytest.fixture(scope="module")
def near(make_decoder):
    """A model that often agrees with decoder64: the same weights and some noise."""
    decoder = make_decoder()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    return decoder


@pytest.mark.parametrize("method", METHODS)
def test_text_is_that_of_a_run_without_guesses(decoder64, near, letters, method):
    engine, runner, drafter = build(decoder64, near, letters)
    cases = [
        {}, {"temperature": 0.8, "seed": 1}, {"temperature": 1.0, "seed": 2, "top_p": 0.9},
        {"repetition_penalty": 1.2}, {"max_tokens": 3}, {"max_tokens": 1},
    ]  # fmt: skip
    prompts = [[(7 * i + j * j) % 90 + 2 for j in range(3 + 9 * i)] for i in range(len(cases))]
    plain = {}
    for i, params in enumerate(cases):
        plain |= drain(engine, request(str(i), prompts[i], None, **params))
    together = drain(engine, *(request(str(i), prompts[i], method, **p) for i, p in enumerate(cases)))
    for i in range(len(cases)):
        assert everything(together[str(i)]) == everything(plain[str(i)]), cases[i]
    assert sum(found[-1].accepted for found in together.values()) > 20
    assert runner.cache.bytes_in_use == drafter.cache.bytes_in_use == 0


def test_a_draft_that_is_the_target_is_right_to_the_end(decoder64, letters):
    engine, _, _ = build(decoder64, decoder64, letters)
    for params in ({}, {"temperature": 0.9, "seed": 3, "top_k": 16}):
        found = drain(engine, request("a", method="chain", depth=4, max_tokens=26, **params))["a"]
        assert [len(delta.tokens) for delta in found] == [1, 5, 5, 5, 5, 5], "four guesses and one more"
        assert (found[-1].accepted, found[-1].rejected) == (20, 0)


@pytest.mark.parametrize("method", ["chain", "rsd_c", "rsd_s"])
def test_the_drafts_cache_holds_what_a_run_token_by_token_leaves(decoder64, near, letters, method):
    engine, _, drafter = build(decoder64, near, letters, chunk=5)
    engine.add(request("a", [*PROMPT, *PROMPT], method, max_tokens=40))
    for _ in range(12):
        engine.step()
    tokens = engine._streams["a", 0].tokens
    row = drafter.cache.rows[0]
    assert row.committed > 16
    plain = LocalRunner(near, kv_bytes=8 << 20, max_rows=8, prefill_chunk=64)
    other = Engine(plain, letters, eos_ids=[1])
    other.add(request("b", tokens, None, max_tokens=2))
    other.step()
    other.step()
    for a, b in zip(row.layers, plain.cache.rows[0].layers, strict=True):
        torch.testing.assert_close(
            a.extent[:, :, : row.committed], b.extent[:, :, : row.committed], rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("method", METHODS)
def test_rejection_keeps_the_law(make_decoder, letters, method):
    """Three tokens of a model of 11, drafted by another one, 1,500 times; with other seeds the statistic
    exceeds its bound in one of 1,000 runs. Trees have two levels, of two nodes where they branch."""
    target, draft = make_decoder(vocab_size=11, seed=3), make_decoder(vocab_size=11, seed=4)
    engine, _, _ = build(target, draft, letters, rows=64)
    prompt, count = [2, 3, 4, 2], 1500
    settings = {"temperature": 3.0, "top_p": 0.9, "max_tokens": 3, "verify": "rrs", "depth": 2}
    settings |= {} if method == "chain" else {"width": 2}
    law = enumerated(target, prompt, 3.0, 0.9)
    seen = torch.zeros(11, 11, 11)
    for first in range(0, count, 60):
        found = drain(
            engine, *(request(str(i), prompt, method, seed=i, **settings) for i in range(first, first + 60))
        )
        for deltas in found.values():
            seen[tuple(tokens_of(deltas))] += 1
    assert float(seen[law == 0].sum()) == 0
    assert chi_square(seen, law) < bound(law, count)
    stats = engine.stats().drafts[method]
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


def test_a_draft_model_that_fails_leaves_requests_alone(decoder64, near, letters, caplog):
    engine, _, drafter = build(decoder64, near, letters)
    want = {name: tokens_of(drain(engine, request(name, method=None))[name]) for name in "abc"}
    compute, calls = drafter.compute, []

    def fail(checked, hidden_ND=None):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("a bug")
        return compute(checked, hidden_ND)

    drafter.compute = fail
    with caplog.at_level(logging.ERROR, logger="axicon"):
        found = drain(engine, request("a"), request("b"))
        later = drain(engine, request("c"))
    assert [tokens_of(found[name]) for name in "ab"] == [want[name] for name in "ab"]
    assert tokens_of(later["c"]) == want["c"]
    assert "request a goes on without speculation" in caplog.text
    assert later["c"][-1].accepted > 0, "a later request guesses again"
    assert engine.stats().drafts["rsd_s"].failed == 2
    assert drafter.cache.bytes_in_use == 0


def test_a_draft_model_that_does_not_pay_is_switched_off(decoder64, make_decoder, letters, caplog):
    engine, _, _ = build(decoder64, make_decoder(seed=9), letters, always=False)
    for i in range(300):
        engine.speculator.note(1 + i % 8, 1.0 + 0.1 * (i % 8))
    engine.speculator.note = lambda nodes, seconds: None
    with caplog.at_level(logging.INFO, logger="axicon"):
        found = drain(engine, request("a", max_tokens=240))["a"]
    assert "speculation rsd_s is off: it does not pay with 1 streams" in caplog.text
    stats = engine.stats().drafts["rsd_s"]
    assert stats.gain < 1
    assert stats.left_out > 100
    assert 0 < sum(stats.drafted) < 1200
    assert tokens_of(found) == tokens_of(drain(engine, request("a", method=None, max_tokens=240))["a"])


def test_the_bits_are_the_same_on_the_kernels(make_decoder, letters):
    """Equality to the last bit, which float64 does not show: greedy and coupled in int8 on the C++ step."""
    try:
        native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    from axicon.compress.llm_int8 import LLMInt8
    from axicon.compress.walk import Compress

    config = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    models = [
        Compress(LLMInt8())(make_decoder(torch.bfloat16, seed=seed, num_hidden_layers=3, **config))
        for seed in (0, 0)
    ]
    draft = skip_blocks(models[1], 2, torch.arange(2, 30))
    runner, drafter = (
        LocalRunner(one, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16, kernels="native")
        for one in (models[0], draft)
    )
    engine = Engine(runner, letters, eos_ids=[1], speculator=Speculator(DraftModel(drafter), always=True))
    cases = [
        {},
        {"temperature": 0.9, "seed": 1},
        {"logprobs": 3},
        {"temperature": 1.3, "seed": 2, "logprobs": 1},
    ]
    for method in ("rsd_s", "rsd_c", "chain", "lookup"):
        plain, found = {}, {}
        for i, params in enumerate(cases):
            plain |= drain(engine, request(str(i), PROMPT * (i + 1), None, max_tokens=40, **params))
        asked = [request(str(i), PROMPT * (i + 1), method, max_tokens=40, **p) for i, p in enumerate(cases)]
        found = drain(engine, *asked)
        for name in plain:
            a, b = (tuple(x for d in one[name] for x in d.tokens) for one in (found, plain))
            assert a == b
            a, b = ([(e.token, e.logprob) for d in one[name] for e in d.logprobs] for one in (found, plain))
            assert a == b, "log-probabilities to the last bit"


def test_the_best_of_many():
    torch.manual_seed(0)
    logits = torch.randn(3, 64 * 50)
    for count in (1, 3, 32, 49, 60):
        values, ids = best(logits, count)
        want = logits.topk(count)
        assert torch.equal(values, want.values)
        assert torch.equal(logits.gather(1, ids), values)


def test_a_copy_without_the_blocks_that_do_least(make_decoder):
    decoder = make_decoder(num_hidden_layers=4)
    with torch.no_grad():
        for i, share in ((1, 0.01), (3, 0.1)):
            decoder.blocks[i].out.weight *= share
            decoder.blocks[i].down.weight *= share
    tokens = torch.arange(2, 40)
    shares = influence(decoder, tokens)
    assert sorted(range(4), key=lambda i: shares[i])[:2] == [1, 3]
    draft = skip_blocks(decoder, 2, tokens)
    assert draft.shape.layers == len(draft.blocks) == 2
    assert [block.index for block in draft.blocks] == [0, 1]
    for mine, whole in ((0, 0), (1, 2)):
        assert torch.equal(draft.blocks[mine].qkv.weight, decoder.blocks[whole].qkv.weight)
    draft.lm_head.weight.data += 1
    assert not torch.equal(draft.lm_head.weight, decoder.lm_head.weight), "a copy, not the same"
    with pytest.raises(AxiconError, match="keep 1 to 3"):
        skip_blocks(decoder, 4, tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.services.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("draft", ["skip:1", "model"])
def test_an_engine_is_built_with_its_draft_model(folder, draft):
    name = str(folder) if draft == "model" else draft
    engine = build_engine(str(folder), kv_gib=0.02, threads=1, draft=name, draft_nodes=12)
    target, drafter = engine.runner.capacity, engine.speculator._draft.runner.capacity
    assert drafter.slots >= target.slots, "whoever is admitted fits into both"
    plain = drain(engine, request("a", method=None))["a"]
    engine.speculator.always = True
    found = drain(engine, request("a"))["a"]
    assert everything(found) == everything(plain)
    assert found[-1].accepted + found[-1].rejected > 0
    with pytest.raises(RequestError, match="may have 15 nodes, and at most 12"):
        engine.add(request("b", width=3, depth=5))


def test_a_draft_of_another_vocabulary_is_refused(folder):
    with pytest.raises(AxiconError, match="a draft model needs the same tokenizer"):
        build_engine(str(folder), kv_gib=0.02, threads=1, draft="demo")
    with pytest.raises(AxiconError, match="as in draft=skip:20"):
        build_engine(str(folder), kv_gib=0.02, threads=1, draft="skip:some")


def test_who_finds_no_room_in_the_drafts_cache_goes_without(decoder64, near, letters):
    runner = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=8)
    drafter = LocalRunner(near, kv_bytes=512 * 96 * 3 // 2, max_rows=8)
    engine = Engine(runner, letters, eos_ids=[1], speculator=Speculator(DraftModel(drafter), always=True))
    assert drafter.capacity.slots < 2 * drafter.slots_reserved(39)
    found = drain(engine, request("a", max_tokens=40), request("b", max_tokens=4))
    alone = drain(engine, request("b", max_tokens=4))["b"]
    assert found["a"][-1].accepted > 0
    assert (found["b"][-1].accepted, found["b"][-1].rejected) == (0, 0)
    assert alone[-1].accepted + alone[-1].rejected > 0
    assert tokens_of(found["b"]) == tokens_of(alone)
