"""The engine on the C++ kernels: the same text alone, in a batch, in chunks; trees; and who computes is
never a secret.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch

from axicon.errors import AxiconError
from axicon.generate.engine import Engine
from axicon.generate.request import Delta, Request, SamplingParams
from axicon.generate.runner import LocalRunner
from axicon.generate.thread import EngineThread
from axicon.generate.watchdog import StepWatchdog
from axicon.kernels import native
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape
from axicon.step import StepInput

CONFIG = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def tiny(**changes: object) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(ModelShape.from_config(CONFIG | changes)).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    return decoder.to(torch.bfloat16)


def runner(decoder: Decoder, chunk: int = 16) -> LocalRunner:
    try:
        native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    return LocalRunner(decoder, kv_bytes=8 << 20, max_rows=8, prefill_chunk=chunk, kernels="native")


def answers(engine: Engine, prompts: list[list[int]], together: bool) -> list[tuple[int, ...]]:
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=20, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True)
        engine.add(Request(id=str(i), prompt=prompt, params=params))
        while not together and engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] += delta.tokens
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.tokens
    return [tuple(t) for t in tokens.values()]


def test_same_tokens_alone_together_and_in_other_chunks(letters: object) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 160, (n,), generator=generator).tolist() for n in (3, 40, 17, 1, 64, 33)]
    want = None
    for chunk, together in ((16, False), (16, True), (64, True)):
        engine = Engine(runner(tiny(), chunk), letters, eos_ids=[1])  # type: ignore[arg-type]
        got = answers(engine, prompts, together)
        want = want or got
        assert got == want
    assert len(set(want or ())) == len(prompts)


def test_fingerprint_names_the_kernels() -> None:
    fast = runner(tiny())
    assert fast.describe()["kernels"] == native_version(fast)
    assert fast.describe()["kernels"] != LocalRunner(tiny(), kv_bytes=8 << 20).describe()["kernels"]
    assert fast.fingerprint != LocalRunner(tiny(), kv_bytes=8 << 20).fingerprint
    assert fast.same_bits_with(1)


def native_version(fast: LocalRunner) -> str:
    assert fast.native is not None
    return fast.native.version


def test_falls_back_only_aloud(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"head_dim": 16}
    with pytest.raises(AxiconError, match="head width is not one of"):
        LocalRunner(tiny(**odd), kv_bytes=8 << 20, kernels="native")
    with caplog.at_level(logging.WARNING, logger="axicon"):
        slow = LocalRunner(tiny(**odd), kv_bytes=8 << 20, kernels="auto")
    assert slow.native is None
    assert "head width is not one of" in caplog.text


def test_a_tree_through_the_runner_is_what_torch_computes(make_step: Callable[..., StepInput]) -> None:
    """The kernels get every node's ancestors from the parents in the step: siblings do not see each other."""
    prompt = [(token, i, 0, i - 1) for i, token in enumerate([9, 30, 4, 77, 12])]
    tree = [(5, 5, 0, -1), (6, 5, 0, -1), (7, 6, 0, 0), (8, 6, 0, 0), (9, 7, 0, 3)]
    got = []
    for one in (runner(tiny()), LocalRunner(tiny(), kv_bytes=8 << 20, max_rows=8, prefill_chunk=16)):
        one.forward(make_step(prompt, forced=True, reserves=((0, 64),)))
        logits = one.forward(make_step(tree, commits=tuple(range(5)))).logits_WV
        after = one.forward(make_step([(3, 8, 0, -1)], commits=(0, 3, 4))).logits_WV
        got.append(torch.cat([logits, after]))
    error = (got[0] - got[1]).abs().amax(1)
    assert (error <= 0.03 * got[1].abs().amax(1)).all()


def asked(thread: EngineThread) -> tuple[set[int], tuple[int, ...]]:
    """The compute threads during one request, and its tokens."""
    threads: set[int] = set()
    tokens: list[int] = []
    done = threading.Event()

    def receive(delta: Delta) -> None:
        threads.add(torch.get_num_threads())
        tokens.extend(delta.tokens)
        if delta.finish_reason:
            done.set()

    params = SamplingParams(max_tokens=12, temperature=0.9, seed=3, ignore_eos=True)
    thread.submit(Request(id="a", prompt=[5, 6, 7], params=params), receive)
    assert done.wait(30)
    return threads, tuple(tokens)


def test_one_thread_while_a_job_shares_the_machine_and_the_same_text(
    letters: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine steps are uneven, and threads would be fewer for that.
    monkeypatch.setattr(StepWatchdog, "too_uneven", lambda *about: False)
    fast, before = runner(tiny()), torch.get_num_threads()

    def build() -> Engine:
        torch.set_num_threads(2)
        return Engine(fast, letters, eos_ids=[1])  # type: ignore[arg-type]

    thread, seen = EngineThread(build), []
    thread.start(30)
    try:
        for sharing in (False, True, True, False):
            thread.share(sharing)
            asked(thread)  # the change comes with the end of a step
            seen.append(asked(thread))
    finally:
        thread.close(20)
        torch.set_num_threads(before)
    assert [threads for threads, _ in seen] == [{2}, {1}, {1}, {2}]
    assert len({tokens for _, tokens in seen}) == 1
