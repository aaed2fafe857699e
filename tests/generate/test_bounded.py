"""Bounded rows against a simulation that keeps lists: what stays, what comes of it, which bytes go back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from axicon.generate.eviction import KV_POLICIES, METHODS
from axicon.generate.eviction.h2o import DECAY
from axicon.generate.runner import LocalRunner
from axicon.kernels import native
from axicon.model.cache import size_class
from axicon.model.decoder import Decoder
from axicon.protocols import LastRows
from axicon.step import LayeredPrompt, RowPolicy, StepInput

PROMPT, ANSWER, EVERY = 45, 41, 8
TEXT = (2 + torch.randperm(94, generator=torch.Generator().manual_seed(5))[: PROMPT + ANSWER]).tolist()
"""No token twice: equal keys would be equal scores, up to rounding."""
Kept = list[list[list[int]]]
"""Positions of each head of each layer."""


class Simulation:
    """A decoder with one request, whose heads hold lists: positions, keys, values, attention received."""

    def __init__(self, decoder: Decoder, policy: RowPolicy) -> None:
        name, budget, recent, sinks = METHODS[policy.method], policy.budget, policy.recent, policy.sinks
        self.decoder, self.method = decoder, KV_POLICIES[name]
        self.variant = (*self.method.variants, "")[policy.variant]
        self.budget, self.recent, self.sinks = budget, recent, sinks
        self.policy = name
        shape = decoder.shape.blocks[0]
        self.heads: list[list[dict[str, Any]]] = [
            [{"at": [], "k": [], "v": [], "paid": []} for _ in range(shape.kv_heads)] for _ in decoder.blocks
        ]

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], start: int, end_of_prompt: bool = False) -> Tensor:
        self.rows = range(start, start + len(tokens))
        self.end_of_prompt = end_of_prompt
        x = self.decoder(torch.tensor(tokens), torch.tensor(self.rows), self.attend)
        return self.decoder.head(x)

    def attend(self, block: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        out = torch.empty_like(q_NHK)
        group = q_NHK.shape[1] // k_NGK.shape[1]
        for g, head in enumerate(self.heads[block.index]):
            for n, position in enumerate(self.rows):
                head["at"].append(position)
                head["k"].append(k_NGK[n, g])
                head["v"].append(v_NGK[n, g])
                head["paid"].append(0.0)
                seen = torch.tensor([block.window is None or p > position - block.window for p in head["at"]])
                keys, values = torch.stack(head["k"]), torch.stack(head["v"])
                total = torch.zeros(len(seen), dtype=torch.float64)
                for h in range(g * group, (g + 1) * group):
                    scores = (keys.double() @ q_NHK[n, h].double()) * block.scale
                    shares = scores.masked_fill(~seen, -torch.inf).softmax(0)
                    out[n, h] = (shares @ values.double()).to(out.dtype)
                    total += shares
                needs = self.method.needs
                if isinstance(needs, LastRows):
                    fresh = not self.end_of_prompt or position == self.rows[-1] - needs.count + 1
                    watched = position > self.rows[-1] - needs.count
                    old = [0.0] * len(seen) if fresh else head["paid"]
                    head["paid"] = [a + float(b) * watched for a, b in zip(old, total, strict=True)]
                else:
                    left = DECAY if self.variant == "decay" else 1.0
                    head["paid"] = [left * a + float(b) for a, b in zip(head["paid"], total, strict=True)]
        if self.end_of_prompt:
            self.cut(block.index, block.window)
        return out

    def cut(self, layer: int, window: int | None) -> None:
        heads = self.heads[layer]
        mean = torch.tensor([head["paid"] for head in heads]).mean(0) if self.policy == "tova" else None
        for head in heads:
            paid = torch.tensor(head["paid"], dtype=torch.float64)
            if mean is not None:
                paid = mean
            if self.variant == "mean":
                paid = paid / (max(head["at"]) + 1 - torch.tensor(head["at"]))
            if self.policy == "key_norm":
                paid = -torch.stack(head["k"]).norm(dim=1)
            if self.policy == "snapkv":
                padded = torch.cat([torch.zeros(2), paid, torch.zeros(2)])
                paid = torch.stack([padded[i : i + 5].mean() for i in range(len(paid))])
            budget, recent, sinks = self.budget, self.recent, self.sinks
            if window is not None or self.policy == "window":
                paid = torch.tensor(head["at"]).double()
            if window is not None:
                budget, recent, sinks = min(budget, window), 0, 0
            at = head["at"]
            certain = {i for i in range(len(at)) if at[i] < sinks or i >= len(at) - recent}
            rest = sorted(set(range(len(at))) - certain, key=lambda i: (-float(paid[i]), i))
            keep = sorted(certain | set(rest[: max(0, budget - len(certain))]))
            for name in head:
                head[name] = [head[name][i] for i in keep]

    def run(self) -> tuple[Tensor, list[Kept]]:
        logits, kept = [self(TEXT[:PROMPT], 0, end_of_prompt=True)[-1:]], [self.kept()]
        for position in range(PROMPT, PROMPT + ANSWER):
            logits.append(self(TEXT[position : position + 1], position))
            if (position + 1) % EVERY == 0 and not self.method.once:
                for layer, block in enumerate(self.decoder.blocks):
                    self.cut(layer, block.window)
            kept.append(self.kept())
        return torch.cat(logits), kept

    def kept(self) -> Kept:
        return [[list(head["at"]) for head in heads] for heads in self.heads]


def held(runner: LocalRunner, row: int = 0) -> Kept:
    cache = runner.cache.rows[row]
    assert cache.lengths_LG is not None
    return [
        [layer.positions(n)[g].tolist() for g, n in enumerate(lengths)]
        for layer, lengths in zip(cache.layers, cache.lengths_LG.tolist(), strict=True)
    ]


def drive(
    runner: LocalRunner, make_step: Callable[..., StepInput], policy: RowPolicy, blocks: int = 1
) -> tuple[Tensor, list[Kept]]:
    """The text through the runner as the engine would send it, its answer given."""
    once = KV_POLICIES[METHODS[policy.method]].once
    nodes = [(token, i, 0, i - 1) for i, token in enumerate(TEXT[:PROMPT])]
    layers, reserved = runner.capacity.blocks, policy.budget + (ANSWER if once else EVERY)
    logits, kept = [], []
    for passed in range(0, layers, blocks):
        going = (LayeredPrompt(0, min(blocks, layers - passed)),)
        first = {"reserves": ((0, reserved),), "policies": (policy,)}
        step = make_step(nodes, forced=True, **first) if passed == 0 else make_step()
        wanted_N = torch.arange(len(step)) == PROMPT - 1
        step = dataclasses.replace(step, layered=going, wanted_N=wanted_N)
        logits.append(runner.forward(step).logits_WV)
    kept.append(held(runner))
    commits: tuple[int, ...] = ()
    for position in range(PROMPT, PROMPT + ANSWER + 1):
        due = position % EVERY == 0 and position > PROMPT and not once
        nodes = [(TEXT[position], position, 0, -1)] if position < PROMPT + ANSWER else []
        step = make_step(nodes, commits=commits, evictions=(0,) if due else ())
        logits.append(runner.forward(step).logits_WV)
        if commits:
            kept.append(held(runner))
        commits = (0,)
    return torch.cat(logits), kept


CONFIGS = {
    "llama": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 12},
    "wide window": {"model_type": "mistral", "sliding_window": 30},
    "some layers slide": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 48, "num_attention_heads": 6},
}
SMALL = {
    "hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}  # fmt: skip


def new_decoder(
    make_decoder: Callable[..., Decoder], name: str, dtype: torch.dtype, **more: object
) -> Decoder:
    if name != "opt":
        return make_decoder(dtype, **CONFIGS[name], **more)
    from axicon.model.shape import ModelShape

    torch.manual_seed(0)
    decoder = Decoder(ModelShape.from_config(SMALL | CONFIGS["opt"] | more))
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 2.0 / parameter.shape[1] ** 0.5)
    return decoder.to(dtype).eval().requires_grad_(False)


def settings(name: str, budget: int = 20) -> RowPolicy:
    name, _, variant = name.partition(" ")
    recent = {"h2o": 7, "window": budget - 4, "snapkv": 8, "tova": 1, "key_norm": 6}[name]
    spare = 0 if KV_POLICIES[name].once else EVERY
    number = KV_POLICIES[name].variants.index(variant) if variant else 0
    return RowPolicy(0, METHODS.index(name), budget, recent, 4, spare, number)


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", [*KV_POLICIES, "h2o mean", "h2o decay"])
def test_every_policy_equals_the_simulation(make_decoder, make_step, model, name) -> None:
    decoder = new_decoder(make_decoder, model, torch.float64)
    policy = settings(name)
    want, want_kept = Simulation(decoder, policy).run()
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    got, got_kept = drive(runner, make_step, policy)
    assert got_kept == want_kept
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)
    assert (
        all(len(at) <= policy.budget + EVERY for layer in got_kept[-1] for at in layer) or policy.spare == 0
    )
    runner.forward(make_step(releases=(0,)))
    assert runner.cache.bytes_in_use == 0


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv", "window"])
def test_the_kernels_compute_from_what_they_kept(make_decoder, make_step, model, name) -> None:
    """The dense model with every answer row masked to the slots that were there gives the same logits."""
    sizes = {"hidden_size": 64, "head_dim": 32}
    if model == "opt":
        sizes = {"hidden_size": 96, "num_attention_heads": 3, "word_embed_proj_dim": 96}
    decoder = new_decoder(make_decoder, model, torch.bfloat16, **sizes)
    try:
        native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    exact = new_decoder(make_decoder, model, torch.bfloat16, **sizes).double()
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16, kernels="native")
    policy = settings(name)
    got, kept = drive(runner, make_step, policy, blocks=2)
    tally = runner.cache.rows[0].tally
    if tally is not None and model == "llama" and name == "h2o":
        assert tally.sums_LGC.sum() > 0

    def attend(block: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        out, group = torch.empty_like(q_NHK), q_NHK.shape[1] // k_NGK.shape[1]
        for h in range(q_NHK.shape[1]):
            mask = torch.ones(len(q_NHK), len(q_NHK)).tril().bool()
            for n in range(PROMPT, PROMPT + ANSWER):
                mask[n] = False
                mask[n, [*kept[n - PROMPT][block.index][h // group], n]] = True
            if block.window is not None:
                age = torch.arange(len(mask))[:, None] - torch.arange(len(mask))
                mask &= age < block.window
            scores = q_NHK[:, h] @ k_NGK[:, h // group].T * block.scale
            out[:, h] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v_NGK[:, h // group]
        return out

    with torch.inference_mode():
        x = exact(torch.tensor(TEXT), torch.arange(PROMPT + ANSWER), attend)
        want = exact.head(x)[PROMPT - 1 :]
    error = (got - want).abs().amax(1) / want.abs().amax(1)
    assert error.max() < 0.12
    assert error.median() < 0.02


@pytest.mark.parametrize("name", [*KV_POLICIES, "h2o mean", "h2o decay"])
def test_what_stays_does_not_depend_on_the_chunks_of_the_prompt(make_decoder, make_step, name) -> None:
    decoder = new_decoder(make_decoder, "some layers slide", torch.float64)
    found = [
        drive(
            LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=chunk), make_step, settings(name)
        )
        for chunk in (1, 7, 16, 64)
    ]
    assert all(kept == found[0][1] for _, kept in found)
    for logits, _ in found:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KV_POLICIES)
def test_a_group_of_equal_heads_keeps_what_each_would_keep(make_decoder, make_step, name) -> None:
    """Two key heads for six query heads, of which three and three are alike, against six key heads."""
    few = make_decoder(torch.float64)
    many = make_decoder(torch.float64, num_key_value_heads=6)
    for ours, theirs in zip(few.blocks, many.blocks, strict=True):
        q_HKD = ours.qkv.weight.data[:48].view(6, 8, 48)
        q_HKD[1:3], q_HKD[4:] = q_HKD[0], q_HKD[3]
        k_GKD, v_GKD = ours.qkv.weight.data[48:].view(2, 2, 8, 48)
        parts = [q_HKD, k_GKD.repeat_interleave(3, 0), v_GKD.repeat_interleave(3, 0)]
        shared = ours.state_dict() | {"qkv.weight": torch.cat(parts).flatten(0, 1)}
        theirs.load_state_dict(shared)
    many.load_state_dict({k: v for k, v in few.state_dict().items() if "qkv" not in k}, strict=False)
    runs = [
        drive(LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16), make_step, settings(name))
        for decoder in (few, many)
    ]
    assert [[[heads[g] for g in (0, 0, 0, 1, 1, 1)] for heads in step] for step in runs[0][1]] == runs[1][1]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-4)


def test_column_sums_are_what_the_queries_gave(make_decoder, make_step) -> None:
    """While nothing goes, a head's sums add up to one for each query and query head; and both paths agree."""
    found = []
    for kernels in ("torch", "native"):
        decoder = make_decoder(torch.bfloat16, hidden_size=64, num_attention_heads=6, head_dim=32)
        try:
            runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16, kernels=kernels)
        except Exception as reason:
            pytest.skip(f"no CPU kernels here: {reason}")
        drive(runner, make_step, settings("h2o", budget=PROMPT + ANSWER))
        tally = runner.cache.rows[0].tally
        assert tally is not None
        assert torch.allclose(tally.sums_LGC.sum(2), torch.tensor(3.0 * (PROMPT + ANSWER)), rtol=1e-4)
        found.append(tally.sums_LGC)
    assert torch.allclose(found[0], found[1], atol=0.3)


def test_wrong_guesses_leave_no_trace(decoder64, make_step) -> None:
    """A tree whose accepted path is committed leaves the slots and scores of a run without a tree."""
    policy = settings("h2o")
    _, want = drive(LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16), make_step, policy)
    runner = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    nodes = [(token, i, 0, i - 1) for i, token in enumerate(TEXT[:PROMPT])]
    first = {"reserves": ((0, 40),), "policies": (policy,), "layered": (LayeredPrompt(0, 2),)}
    runner.forward(make_step(nodes, forced=True, **first))
    commits, evictions, position = (), (), PROMPT
    while position + 3 <= PROMPT + ANSWER:
        # Root, a wrong sibling of its child, the right child, a wrong grandchild, the right one.
        a, b, c = TEXT[position : position + 3]
        count = 3 if position % EVERY + 3 <= EVERY else EVERY - position % EVERY
        tree = [(a, position, 0, -1), (90, position + 1, 0, 0), (b, position + 1, 0, 0),
                (91, position + 2, 0, 2), (c, position + 2, 0, 2)]  # fmt: skip
        runner.forward(make_step(tree, commits=commits, evictions=evictions))
        commits = (0, 2, 4)[:count]
        position += count
        evictions = (0,) if position % EVERY == 0 else ()
    runner.forward(make_step(commits=commits, evictions=evictions))
    assert held(runner) == want[position - PROMPT]


def test_bytes_go_back_and_one_layer_at_most_is_whole(make_decoder, make_step) -> None:
    decoder = make_decoder(torch.float64, num_hidden_layers=6)
    runner = LocalRunner(decoder, kv_bytes=64 << 20, max_rows=4, prefill_chunk=64)
    length, budget = 400, 40
    policy = RowPolicy(0, METHODS.index("h2o"), budget, 20, 4, 16)
    peak = 0
    take = runner.cache.pool.take

    def watched(*shape: int) -> Tensor:
        nonlocal peak
        extent = take(*shape)
        peak = max(peak, runner.cache.bytes_in_use)
        return extent

    runner.cache.pool.take = watched  # type: ignore[method-assign]
    text = [(2 + i % 90, i, 0, i - 1) for i in range(length)]
    runner.forward(make_step(text, forced=True, reserves=((0, 56),), policies=(policy,), layered=((0, 6),)))
    one = runner.cache.bytes_per_slot // 6
    assert runner.cache.bytes_in_use == 6 * one * size_class(56)
    assert peak <= one * (size_class(length) + 6 * size_class(56))
    assert runner._held().evicted == {"h2o": length - budget}


def test_a_step_that_breaks_the_contract_is_refused(runner64, make_step) -> None:
    policy = settings("h2o")
    prompt = [(5, i, 0, i - 1) for i in range(30)]
    bad = {
        "no KV policy": make_step(evictions=(0,)),
        "its prompt is layered": make_step(prompt, reserves=((0, 64),), policies=(policy,)),
        "no row that begins": make_step(prompt, policies=(policy,), layered=((0, 1),)),
        "3 blocks to pass, 2 are left": make_step(
            prompt, reserves=((0, 64),), policies=(policy,), layered=((0, 3),)),
        "behind all others": make_step(
            [*prompt, (5, 0, 1, -1)], reserves=((0, 64), (1, 64)), policies=(policy,), layered=((0, 1),)),
        "no layered prompt to begin": make_step(layered=((0, 1),)),
        "no policy": make_step(
            prompt, reserves=((0, 64),), policies=(policy._replace(method=99),), layered=((0, 1),)),
        "or no policy": make_step(
            prompt, reserves=((0, 64),), policies=(policy._replace(variant=3),), layered=((0, 1),)),
    }  # fmt: skip
    for message, step in bad.items():
        with pytest.raises(ValueError, match=message):
            runner64.forward(step)
        assert not runner64.cache.rows
