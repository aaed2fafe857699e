"""The promise: on a CPU, equal fingerprint, request and seed give equal bytes, alone or in any batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from axicon.generate.build import build_engine
from axicon.generate.engine import Engine
from axicon.generate.request import Request, SamplingParams
from axicon.generate.runner import LocalRunner
from axicon.model.native import why_not

PARAMS = [
    {"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_p": 0.9},
    {"seed": 3, "top_k": 20, "temperature": 0.7},
    {"seed": 4, "min_p": 0.05, "presence_penalty": 0.5}, {"temperature": 0.0, "repetition_penalty": 1.1},
    {"seed": 5, "temperature": 1.5}, {"seed": 6, "logit_bias": {7: 2.0}},
]  # fmt: skip


EVERYTHING = {"ignore_eos": True, "logprobs": 2, "prompt_logprobs": 0}


def requests(vocab, lengths, max_tokens):
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            id=str(i),
            prompt=torch.randint(2, vocab, (length,), generator=generator).tolist(),
            params=SamplingParams(**{"max_tokens": max_tokens, **EVERYTHING, **params}),
        )
        for i, (params, length) in enumerate(zip(PARAMS, lengths, strict=True))
    ]  # fmt: skip


def run(engine, arrivals):
    """arrivals: (step, request). Everything every request gets, log-probabilities to the last bit."""
    arrivals, found, step = list(arrivals), {}, 0
    while arrivals or engine.has_work:
        while arrivals and arrivals[0][0] <= step:
            engine.add(arrivals.pop(0)[1])
        for d in engine.step():
            found.setdefault(d.request_id, []).append((d.text, d.tokens, d.logprobs, d.prompt_logprobs))
        step += 1
    return found


def assert_promise(engine, work):
    alone = {}
    for one in work:
        alone |= run(engine, [(0, one)])
    together = run(engine, [(0, one) for one in work])
    staggered = run(engine, [(3 * i, one) for i, one in enumerate(reversed(work))])
    for one in work:
        assert together[one.id] == alone[one.id]
        assert staggered[one.id] == alone[one.id]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_bytes_alone_in_a_batch_and_staggered(make_decoder, letters, dtype):
    decoder = make_decoder(dtype, hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16)
    engine = Engine(runner, letters, eos_ids=[1])
    assert_promise(engine, requests(96, [1, 2, 15, 16, 17, 40, 33, 5], 12))


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_tiny_products_whose_last_bit_seldom_depends_on_the_batch(make_decoder, letters, seed):
    """One row of these is summed in another order than two; the probe must see what one number in ten
    thousand shows.
    """
    decoder = make_decoder(torch.bfloat16, hidden_size=64, head_dim=32)
    engine = Engine(
        LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16), letters, eos_ids=[1]
    )
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=2)
    work = []
    for i, length in enumerate((30, 41, 37, 50)):
        generator = torch.Generator().manual_seed(100 * seed + i)
        prompt = torch.randint(2, 96, (length,), generator=generator).tolist()
        work.append(Request(id=str(i), prompt=prompt, params=params))
    assert_promise(engine, work)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_other_path_keeps_the_promise_too(make_decoder, letters, dtype):
    decoder = make_decoder(dtype)
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16)
    runner.path = dataclasses.replace(runner.path, merged=False, body_tile=64, head_tile=64)
    assert_promise(Engine(runner, letters, eos_ids=[1]), requests(96, [1, 2, 15, 16, 17, 40, 33, 5], 8))


def test_the_kernels_keep_the_promise_wherever_prompts_are_cut(make_decoder, letters):
    """Alone a prompt goes in chunks of 32; beside others in pieces of whatever size is left."""
    decoder = make_decoder(torch.bfloat16, hidden_size=64, num_attention_heads=6, head_dim=32)
    reason = why_not(decoder)
    if reason is not None:
        pytest.skip(f"no C++ kernels: {reason}")
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, prefill_chunk=32, kernels="native")
    assert runner.capacity.free_chunks
    engine = Engine(runner, letters, eos_ids=[1])
    work = requests(96, [1, 2, 90, 33, 170, 40, 64, 5], 12)
    assert_promise(engine, work)
    whole = run(engine, [(0, work[4])])
    for chunk in (5, 16, 64):
        runner._capacity = dataclasses.replace(runner.capacity, prefill_chunk=chunk)
        assert run(Engine(runner, letters, eos_ids=[1]), [(0, work[4])]) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_embedded_model_keeps_the_promise(kernels):
    engine = build_engine("demo", kv_gib=0.25, threads=1, kernels=kernels)
    vocab = engine.runner.capacity.vocab
    assert_promise(engine, requests(vocab, [1, 270, 15, 16, 257, 40, 33, 5], 4))
