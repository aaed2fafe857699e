"""Requests of one step with different adapters: each gets its own text, bit for bit, and nobody else's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch

from axicon.generate.engine import Engine
from axicon.generate.request import KVSettings, Limits, Request, RequestError, SamplingParams, Speculation
from axicon.generate.runner import LocalRunner
from axicon.kernels import native
from axicon.model.adapterfile import Adapter, Pair, install
from axicon.model.decoder import Decoder
from axicon.model.lowrank import parts_of, products
from axicon.model.shape import ModelShape

CONFIG = {
    "model_type": "llama", "vocab_size": 160, "hidden_size": 96, "num_hidden_layers": 2,
    "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
EVERY = ("q", "k", "v", "out", "gate", "up", "down")


def tiny(dtype: torch.dtype = torch.bfloat16) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    return decoder.to(dtype)


def adapter(seed: int, parts: tuple[str, ...] = EVERY, rank: int = 4) -> Adapter:
    """Large enough to change every text."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[tuple[int, str], tuple[Pair, ...]] = {}
    for i, block in enumerate(tiny().blocks):
        for name, product in products(block):
            found = tuple(
                Pair(
                    rows,
                    torch.randn(rank, product.in_features, generator=generator) * 0.1,
                    torch.randn(len(range(product.out_features)[rows]), rank, generator=generator) * 0.1,
                )
                for part, rows in parts_of(block, name).items()
                if part in parts
            )
            if found:
                pairs[i, name] = found
    return Adapter(pairs, f"{seed:064x}", None)


ADAPTERS = {1: adapter(1), 2: adapter(2, ("q", "v"), rank=7)}


def engine(kernels: str, letters: object, held: Mapping[int, Adapter] = ADAPTERS) -> Engine:
    if kernels == "native" and (reason := native.why_unavailable()):
        pytest.skip(f"no CPU kernels here: {reason}")
    dtype = torch.bfloat16 if kernels == "native" else torch.float32
    runner = LocalRunner(tiny(dtype), kv_bytes=8 << 20, max_rows=8, prefill_chunk=64, kernels=kernels)  # type: ignore[arg-type]
    made = Engine(runner, letters, eos_ids=[1], limits=Limits(prefix_cache=0.5, kv_floor=4))  # type: ignore[arg-type]
    for number, one in held.items():
        made.hold(number, one)
    return made


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 160, (n,), generator=generator).tolist() for n in (3, 70, 17, 1, 130, 33)]


def request(i: int, which: int, **changes: object) -> Request:
    params = SamplingParams(
        max_tokens=12, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True, logprobs=1,
        **{"speculation": changes.pop("speculation", None)},  # type: ignore[arg-type]
    )  # fmt: skip
    return Request(id=f"{i}-{which}", prompt=prompts()[i], params=params, adapter=which, **changes)  # type: ignore[arg-type]


Answers = dict[str, list[tuple[int, float | None]]]


def run(made: Engine, requests: list[Request], together: bool = True) -> Answers:
    """Tokens with their log-probabilities."""
    found: Answers = {one.id: [] for one in requests}
    for one in requests:
        made.add(one)
        while made.has_work and (one is requests[-1] or not together):
            for delta in made.step():
                assert delta.error is None
                found[delta.request_id] += [(p.token, p.logprob) for p in delta.logprobs]
    return found


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_mixed_steps_give_each_row_its_own_bits(kernels: str, letters: object) -> None:
    requests = [request(i, which) for i in range(6) for which in (0, 1, 2)]
    together = run(engine(kernels, letters), requests)
    base = run(engine(kernels, letters, {}), [one for one in requests if one.adapter == 0])
    alone = run(engine(kernels, letters), requests, together=False)
    own: Answers = {}
    for which, one in ADAPTERS.items():  # the model as it is served where the adapter is all there is
        mine = [dataclasses.replace(r, adapter=0) for r in requests if r.adapter == which]
        own |= run(engine(kernels, letters, {0: one}), mine)
    assert together == alone == base | own
    texts = [tuple(t for t, _ in together[f"{i}-{which}"]) for i in range(6) for which in (0, 1, 2)]
    assert len(set(texts)) == len(texts)


def test_the_kernels_add_what_torch_adds(letters: object) -> None:
    """Log-probabilities of a prompt: as near as bfloat16 comes, and in torch those of LoRA modules."""
    scored = dataclasses.replace(request(2, 1), params=SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = []
    for made in (engine("native", letters), engine("torch", letters)):
        made.add(scored)
        deltas = []
        while made.has_work:
            deltas += made.step()
        logprobs = next(d.prompt_logprobs for d in deltas if d.prompt_logprobs)
        found.append(torch.tensor([p.logprob for p in logprobs[1:]]))
    model = tiny(torch.float32)
    install(model, ADAPTERS[1])
    tokens = torch.tensor(scored.prompt)[None]
    with torch.no_grad():
        logits_TV = model.head(model.states(tokens)[0]).log_softmax(-1)
    want = logits_TV[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert torch.allclose(found[1], want, atol=1e-4)
    assert (found[0] - want).abs().max() < 0.15
    assert (found[0] - want).abs().mean() < 0.05


def test_beginnings_are_shared_only_under_one_adapter(letters: object) -> None:
    made, fresh = engine("native", letters), engine("native", letters)
    for which in (0, 1, 2):
        first = run(made, [request(4, which)])
        again = dataclasses.replace(request(4, which), id="again")
        assert run(made, [again])["again"] == first[f"4-{which}"]
    assert made.stats().prefixes.requests_total == 3
    assert run(fresh, [request(4, 2)]) == first


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_bounded_caches_and_guesses_of_an_adapter(kernels: str, letters: object) -> None:
    kept = KVSettings(policy="h2o", budget=0.5)
    for more in ({"kv": kept}, {"speculation": Speculation(method="lookup", verify="coupled")}):
        mixed = [request(i, which, **more) for i in (2, 4) for which in (0, 1)]
        got = run(engine(kernels, letters), mixed)
        for one in mixed:
            which = {0: ADAPTERS[1]} if one.adapter else {}
            want = run(engine(kernels, letters, which), [dataclasses.replace(one, adapter=0)])[one.id]
            if kernels == "native":
                assert got[one.id] == want
            else:  # a tree takes another kernel there
                assert [t for t, _ in got[one.id]] == [t for t, _ in want]


def test_an_adapter_that_is_given_up_stays_for_those_who_have_it(letters: object) -> None:
    made, want = engine("native", letters), run(engine("native", letters), [request(1, 1)])
    made.add(request(1, 1))
    found = list(made.step())
    made.give_up(1)
    with pytest.raises(RequestError, match="adapter 1 is not held"):
        made.add(request(2, 1))
    while made.has_work:
        found += made.step()
    assert [(p.token, p.logprob) for d in found for p in d.logprobs] == want["1-1"]
    made.step()
    assert made.runner.native.held.keys() == {2}  # type: ignore[attr-defined]
