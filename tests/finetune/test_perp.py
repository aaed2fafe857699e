"""PERP: what trains, what stays as it was pruned, and what a repaired model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from axicon.compress import COMPRESSORS
from axicon.compress.walk import compress
from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.objectives import OBJECTIVES
from axicon.finetune.shards import Alone
from axicon.finetune.updates import UPDATE_RULES
from axicon.model.adapters import Full, Lora, Scheme
from axicon.model.decoder import Decoder
from axicon.model.lowrank import products
from axicon.model.masks import kept, make_room, prune
from axicon.model.perp import Perp, Repaired
from axicon.model.shape import ModelShape
from axicon.protocols import Moment
from tests.finetune.small import LLAMA, OPT, decoder

KEY = Moment(0, 1).key
TOKENS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(2))
KINDS = ("mask_lora", "lora_prune", "scale_lora")
ALL = ("norms", "biases")


def pruned(config: dict[str, Any] | None = None, **settings: Any) -> Decoder:
    return compress(COMPRESSORS["magnitude"](**settings), decoder(config))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask for name, m in model.named_modules() if (mask := kept(m)) is not None}


def scramble(model: Decoder) -> None:
    """As if it had trained."""
    made = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=made).to(p.dtype), alpha=0.1)


# What is pruned stays pruned


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("scheme", [
    Full(), Perp(adapters=None), *(Perp(adapters=kind, r=2, alpha=2) for kind in KINDS)
], ids=lambda scheme: str(getattr(scheme, "adapters", "full")))  # fmt: skip
def test_the_mask_is_the_same_after_merging(scheme: Scheme, pattern: str, config: dict[str, Any]) -> None:
    model = pruned(config, pattern=pattern)
    with torch.no_grad():
        rows, columns = kept(model.blocks[1].down).nonzero().unbind(1)  # type: ignore[union-attr]
        model.blocks[1].down.weight[rows[0], columns[0]] = 0  # type: ignore[index, operator, union-attr]
    before = masks(model)
    scheme.install(model, KEY)
    scramble(model)
    scheme.merge(model)
    after = masks(model)
    assert len(after) == len(before) == 2 * len(list(products(model.blocks[0])))
    for name, mask in before.items():
        assert torch.equal(after[name], mask)
        weight = model.get_parameter(f"{name}.weight")
        assert not weight[~mask].any()
        if not (isinstance(scheme, Perp) and scheme.adapters in (None, "scale_lora")):
            assert weight[mask].all()  # a kept 0 among them, which W != 0 would have lost
        if pattern == "2:4":
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    assert not any(isinstance(m, Repaired) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_adapters_that_fill_what_was_pruned_stay_beside() -> None:
    model = pruned()
    Lora().install(model, KEY)
    with pytest.raises(AxiconError, match="would fill what was pruned; take output=adapter"):
        Lora().merge(model)


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_pruned_model(kind: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
    model = pruned(config).to(dtype)
    want = model.logits(TOKENS)
    Perp(adapters=kind, r=4).install(model, KEY)
    got = model.logits(TOKENS)
    if kind == "scale_lora":  # B A is 1 but for the last bits of float32
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    else:
        assert torch.equal(got, want)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", None])
def test_merging_changes_no_bit(kind: Any, dtype: torch.dtype) -> None:
    model, scheme = pruned(OPT).to(dtype), Perp(adapters=kind, r=2)
    scheme.install(model, KEY)
    scramble(model)
    want = model.logits(TOKENS)
    assert not torch.allclose(want, pruned(OPT).to(dtype).logits(TOKENS), atol=1e-3)
    scheme.merge(model)
    assert torch.equal(model.logits(TOKENS), want)


def test_mask_lora_is_its_formula() -> None:
    model = pruned()
    base = copy.deepcopy(model.blocks[0].qkv)
    Perp(r=3, alpha=6, targets=("k",)).install(model, KEY)
    scramble(model)
    got = model.blocks[0].qkv
    a, b = got.pair("k")
    rows = model.blocks[0].shape.parts("qkv")["k"]
    want = base.weight.clone()
    want[rows] += 2 * kept(base)[rows] * (b @ a).detach()  # type: ignore[index]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got(x), x @ want.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.merged().weight, want, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_gradients_are_those_of_the_plain_formula(kind: Any) -> None:
    """Against autograd of the sum written out, and forward mode against both; a column whose weights are all
    pruned pulls at nothing."""
    linear = nn.Linear(8, 6).requires_grad_(False)
    keep = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    keep[:, 3] = False
    prune(linear, keep)
    one = Repaired(linear, {"out": slice(0, 4)}, Perp(adapters=kind, r=2), 0, "x", biased=True)
    for p in one.parameters():
        if p.requires_grad:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    a, b = one.pair("out")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert one.bias is not None

    def plain() -> Tensor:
        low = b @ a
        top = linear.weight[:4]
        top = top * low if kind == "scale_lora" else top + one.scale * keep[:4] * low
        return x @ torch.cat([top, linear.weight[4:]]).T + one.bias

    leaves = [x, a, b, one.bias]
    want = torch.autograd.grad(plain().square().sum(), leaves)
    got = torch.autograd.grad(one(x).square().sum(), leaves)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not got[1][:, 3].any()
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v.detach(), t) for v, t in zip(leaves, tangents, strict=True)]
        one._parameters |= {"out_a": duals[1], "out_b": duals[2], "bias": duals[3]}  # type: ignore[dict-item]
        slope = forward_ad.unpack_dual(one(duals[0]).square().sum()).tangent
    torch.testing.assert_close(slope, sum((g * t).sum() for g, t in zip(want, tangents, strict=True)))


def test_a_finite_difference_says_the_same() -> None:
    model = pruned().double()
    Perp(r=2, targets=("down",), train=()).install(model, KEY)
    scramble(model)
    p = model.blocks[1].down.down_a
    loss = model.logits(TOKENS).square().mean()
    loss.backward()
    step = 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            p[1, 5] += sign * step
            ends.append(float(model.logits(TOKENS).square().mean()))
            p[1, 5] -= sign * step
    assert p.grad is not None
    assert float(p.grad[1, 5]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)


# What trains


@pytest.mark.parametrize(("train", "adapters", "trains"), [
    (("norms",), None, {"norm.weight", "norm.bias"}),
    (("biases",), None, {"norm.bias", "qkv.bias", "out.bias", "up.bias", "down.bias"}),
    ((), "mask_lora", {"_a", "_b"}),
])  # fmt: skip
def test_only_what_is_chosen_changes(train: Any, adapters: Any, trains: set[str]) -> None:
    model, scheme = pruned(OPT), Perp(train=train, adapters=adapters, r=2)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    scheme.install(model, KEY)
    chosen = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(any(n.endswith(end) for end in trains) for n in chosen)
    assert all(any(n.endswith(end) for n in chosen) for end in trains)
    scramble(model)
    scheme.merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    ends = {".weight"} if adapters is not None else trains
    assert changed
    assert all(any(n.endswith(end) for end in ends) for n in changed)
    if adapters is not None:
        assert not any("norm" in n or "embed" in n or "head" in n for n in changed)


def opt(width: int, layers: int, heads: int) -> Decoder:
    """An OPT shape without memory, whose products have masks."""
    config = {
        "model_type": "opt", "vocab_size": 50272, "num_hidden_layers": layers, "hidden_size": width,
        "ffn_dim": 4 * width, "num_attention_heads": heads, "max_position_embeddings": 2048,
        "word_embed_proj_dim": width,
    }  # fmt: skip
    return meta(config)


def meta(config: dict[str, Any]) -> Decoder:
    with torch.device("meta"):
        model = Decoder(ModelShape.from_config(config))
        for block in model.blocks:
            for _, product in products(block):
                make_room(product)  # type: ignore[arg-type]
    return model


def trained(model: Decoder, **settings: Any) -> tuple[int, float]:
    whole = sum(p.numel() for p in model.parameters())
    Perp(**settings).install(model, KEY)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return count, count / whole


@pytest.mark.parametrize(("size", "norms", "biases", "both", "lora"), [
    ((768, 12, 12), 0.031, 0.082, 0.097, 2.12),
    ((2560, 32, 32), 0.0125, 0.034, 0.040, 0.89),
    ((4096, 32, 32), 0.0080, 0.022, 0.026, 0.57),
    ((5120, 40, 40), 0.0065, 0.018, 0.021, 0.46),
    ((7168, 48, 56), 0.0046, 0.013, 0.015, 0.33),
], ids=["125m", "2.7B", "6.7B", "13B", "30B"])  # fmt: skip
def test_shares_of_opt(
    size: tuple[int, int, int], norms: float, biases: float, both: float, lora: float
) -> None:
    """The figures of the paper's kind of table, in per cent as they are printed there."""
    width, layers, _ = size
    count, share = trained(opt(*size), adapters=None, train=("norms",))
    assert count == 2 * (2 * layers + 1) * width
    assert 100 * share == pytest.approx(norms, abs=0.6 * 10 ** -(4 if norms < 0.02 else 3))
    count, share = trained(opt(*size), adapters=None, train=("biases",))
    assert count == 9 * width * layers + (2 * layers + 1) * width
    assert 100 * share == pytest.approx(biases, abs=6e-4)
    assert 100 * trained(opt(*size), adapters=None)[1] == pytest.approx(both, abs=6e-4)
    if width <= 2560:  # larger ones have the same formula, and take a while to draw
        count, share = trained(opt(*size), train=(), r=16)
        assert count == 18 * 16 * width * layers
        assert 100 * share == pytest.approx(lora, abs=6e-3)


def test_shares_of_smollm2() -> None:
    config = {
        "model_type": "llama", "vocab_size": 49152, "num_hidden_layers": 30, "hidden_size": 576,
        "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    assert trained(meta(config), adapters=None)[0] == 35136
    assert trained(meta(config), train=())[0] == 4884480
    count, share = trained(meta(config), r=4)
    assert count == 35136 + 4884480 // 4
    assert share < 0.01


def test_a_tied_head_trains_only_once_it_is_untied() -> None:
    tied, scheme = pruned(), Perp(train=("head",), r=2)
    with pytest.raises(AxiconError, match=r"tied to the embedding.*scheme.untie=true"):
        scheme.install(tied, KEY)
    scheme = Perp(train=("head",), r=2, untie=True)
    scheme.install(tied, KEY)
    embedding = tied.embed_tokens.weight.clone()
    scramble(tied)
    want = tied.logits(TOKENS)
    scheme.merge(tied)
    torch.testing.assert_close(tied.logits(TOKENS), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(tied.embed_tokens.weight, embedding)
    assert not torch.equal(tied.lm_head.weight, embedding)
    assert not tied.shape.tie_head


def test_what_has_nothing_to_keep_is_refused() -> None:
    with pytest.raises(AxiconError, match=r"no product of this model has a mask.*scheme.mask=zeros"):
        Perp().install(decoder(), KEY)
    packed = compress(COMPRESSORS["group_int4"](group=-1), pruned())
    with pytest.raises(AxiconError, match="stored as group_int here; repair the pruned model first"):
        Perp().install(packed, KEY)
    with pytest.raises(AxiconError, match="no product gate"):
        Perp(targets=("gate", "up")).install(pruned(OPT), KEY)
    with pytest.raises(ValueError, match="adapters are mask_lora"):
        Perp(adapters="lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train are some of"):
        Perp(train=("everything",))  # type: ignore[arg-type]


def test_zeros_of_another_program_become_masks() -> None:
    model = pruned()
    want = masks(model)
    for module in model.modules():
        module._buffers.pop("mask", None)
    scheme = Perp(mask="zeros", r=2)
    scheme.install(model, KEY)
    scramble(model)
    scheme.merge(model)
    got = masks(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], mask) for name, mask in want.items())


# What it is worth


def windows(seed: int, rows: int) -> Batch:
    """Sequences that count up by a step of their own: the third token is known from the two before it."""
    made = torch.Generator().manual_seed(seed)
    first, step = torch.randint(0, 64, (2, rows, 1), generator=made)
    tokens = (first + step % 5 * torch.arange(12)) % 64
    labels = tokens.clone()
    labels[:, :2] = -100
    return Batch(input_ids=tokens, mask=tokens >= 0, labels=labels)


def after(model: Decoder, scheme: Scheme, steps: int, lr: float, seed: int = 0) -> tuple[float, float]:
    """Loss on held-out windows before and after merging."""
    scheme.install(model, Moment(0, seed).key)
    rule, objective, test = UPDATE_RULES["adamw"](lr=lr), OBJECTIVES["language"](), windows(99, 64)  # type: ignore[call-arg]
    rule.prepare(model)
    for step in range(steps):
        rule.step(model, objective, windows(100 * seed + step, 16), Alone(), Moment(step, seed))
    rule.finish(model)
    with torch.no_grad():
        before = float(objective.loss(model, test).mean())
        scheme.merge(model)
        return before, float(objective.loss(model, test).mean())


@pytest.fixture(scope="module")
def learned() -> Decoder:
    """A small model that can do it."""
    model = decoder()
    after(model, Full(), 300, 4e-3)
    return model


def test_the_order_of_the_paper(learned: Decoder) -> None:
    """At 70 %: norms repair some of it, adapters more, all kept weights most."""
    model = compress(COMPRESSORS["magnitude"](sparsity=0.7), copy.deepcopy(learned))
    loss = [after(copy.deepcopy(model), Perp(adapters=None), 0, 1e-2)[1]]
    loss += [after(copy.deepcopy(model), scheme, 100, lr)[1] for scheme, lr in (
        (Perp(adapters=None), 1e-2), (Perp(r=4), 5e-3), (Full(), 4e-3)
    )]  # fmt: skip
    pruned_, norms, adapters, full = loss
    assert norms < 0.9 * pruned_
    assert adapters < 0.9 * norms
    assert full < 1.1 * adapters


def test_lora_prune_jumps_where_it_is_merged_and_mask_lora_does_not(learned: Decoder) -> None:
    ends: dict[str, list[float]] = {"mask_lora": [], "lora_prune": []}
    for seed in range(3):
        for kind, found in ends.items():
            model = compress(COMPRESSORS["magnitude"](sparsity=0.7), copy.deepcopy(learned))
            before, merged = after(model, Perp(adapters=kind, r=4, alpha=8), 60, 5e-3, seed)  # type: ignore[arg-type]
            found.append(merged)
            assert merged == before if kind == "mask_lora" else merged > before
    assert sum(ends["mask_lora"]) < sum(ends["lora_prune"])


@pytest.mark.parametrize("rule", ["zo_sgd", "forward_grad", "sgd"])
def test_any_rule_repairs(rule: str) -> None:
    model, scheme = pruned(), Perp(r=2)
    before = masks(model)
    scheme.install(model, KEY)
    one = UPDATE_RULES[rule]()
    one.prepare(model)
    loss = one.step(model, OBJECTIVES["language"](), windows(0, 4), Alone(), Moment(0, 1))
    one.finish(model)
    assert loss > 0
    scheme.merge(model)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    assert not model.blocks[0].down.weight[~before["blocks.0.down"]].any()
