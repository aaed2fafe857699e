"""Schemes: what trains, where it begins, and what becomes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from axicon.compress import COMPRESSORS
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.adapters import SCHEMES, Head, Lora, Prefix, SoftPrompt, peft_tensors
from axicon.model.decoder import Decoder
from axicon.model.lowrank import LoraLinear
from axicon.model.shape import ModelShape
from axicon.protocols import Moment
from tests.finetune.small import LLAMA, OPT, decoder

KEY = Moment(0, 1).key
TOKENS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("name", ["full", "head", "lora"])
def test_a_scheme_begins_as_the_model(name: str, config: dict[str, Any]) -> None:
    model = decoder(config)
    want = model.logits(TOKENS)
    SCHEMES[name]().install(model, KEY)
    assert torch.equal(model.logits(TOKENS), want)
    assert any(p.requires_grad for p in model.parameters())
    SCHEMES[name]().merge(model)
    assert torch.equal(model.logits(TOKENS), want)


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_merged_adapters_compute_as_before(config: dict[str, Any]) -> None:
    model, scheme = decoder(config), Lora(r=3, targets=("q", "v", "down"))
    scheme.install(model, KEY)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    want = model.logits(TOKENS)
    assert not torch.allclose(want, decoder(config).logits(TOKENS), atol=1e-3)
    scheme.merge(model)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert torch.allclose(model.logits(TOKENS), want, atol=1e-4)


def test_only_the_rows_of_a_target_change() -> None:
    model = decoder()
    Lora(targets=("k",)).install(model, KEY)
    base = copy.deepcopy(model.blocks[0].qkv.base.weight)
    nn.init.normal_(model.blocks[0].qkv.k_b)
    Lora(targets=("k",)).merge(model)
    changed = (model.blocks[0].qkv.weight != base).any(1)
    rows = model.blocks[0].shape.parts("qkv")["k"]
    assert changed[rows].all()
    assert int(changed.sum()) == rows.stop - rows.start


@pytest.mark.parametrize("method", ["llm_int8", "group_int4"])
def test_packed_products_stay_packed_and_pass_gradients(method: str) -> None:
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 64}
    model = compress(COMPRESSORS[method](), decoder(config))
    packed = {n: b.clone() for n, b in model.named_buffers()}
    Lora().install(model, KEY)
    nn.init.normal_(model.blocks[0].qkv.q_b, std=0.1)
    dense = copy.deepcopy(model)
    for block in dense.blocks:
        for name in ("qkv", "out", "gate_up", "down"):
            product = getattr(block, name)
            inner = product.base if isinstance(product, LoraLinear) else product
            plain = nn.Linear(inner.inputs, inner.outputs, bias=False).requires_grad_(False)
            plain.weight.copy_(inner.unpack())
            if isinstance(product, LoraLinear):
                product.base = plain
            else:
                setattr(block, name, plain)
    for one in (model, dense):
        one.logits(TOKENS).square().mean().backward()
    got, want = (one.blocks[0].qkv.q_a.grad for one in (model, dense))
    assert got is not None
    assert (got - want).norm() / want.norm() < 0.1
    names = {n.replace("qkv.base.", "qkv."): b for n, b in model.named_buffers()}
    assert all(torch.equal(names[n], b) for n, b in packed.items())
    with pytest.raises(AxiconError, match="take output=adapter"):
        Lora().merge(model)


def test_a_head_of_its_own_leaves_the_embedding() -> None:
    model = decoder()
    Head().install(model, KEY)
    assert model.lm_head.weight is not model.embed_tokens.weight
    assert not model.shape.tie_head
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_a_prefix_is_what_those_tokens_would_have_left() -> None:
    """Behind the prefix of random tokens, text computes as behind the tokens themselves."""
    for config in (LLAMA, OPT):
        model, scheme = decoder(config), Prefix(length=4)
        scheme.install(model, KEY)
        assert [p.shape[0] for p in model.parameters() if p.requires_grad] == [4] * 4
        got = model.states(TOKENS)
        ragged = model.states(TOKENS, [7, 3, 5])
        tokens = torch.cat([lead(model).expand(3, 4), TOKENS], dim=1)
        want = decoder(config).states(tokens)[:, 4:]
        assert torch.allclose(got, want, atol=1e-5)
        assert torch.allclose(ragged[1, :3], got[1, :3], atol=1e-5)


def test_a_soft_prompt_begins_as_tokens() -> None:
    for config in (LLAMA, OPT):
        model, scheme = decoder(config), SoftPrompt(length=4)
        scheme.install(model, KEY)
        assert model.prompt is not None
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt"]
        tokens = torch.cat([lead(model).expand(3, 4), TOKENS], dim=1)
        want = decoder(config).states(tokens)[:, 4:]
        assert torch.allclose(model.states(TOKENS), want, atol=1e-5)
        assert torch.allclose(model.states(TOKENS, [7, 3, 5])[1, :3], want[1, :3], atol=1e-5)


def lead(model: Decoder) -> torch.Tensor:
    """The random tokens of the schemes."""
    from axicon.kernels.directions import uniforms

    return uniforms(KEY("adapters"), 0, 0, 4) % model.shape.vocab


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_reach_what_trains(name: str) -> None:
    model = compress(COMPRESSORS["magnitude"](), decoder())  # or perp has nothing to repair
    SCHEMES[name]().install(model, KEY)
    model.logits(TOKENS).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None for g in grads)
    assert any(bool(g.any()) for g in grads if g is not None)


def test_peft_names_and_shapes() -> None:
    model = decoder()
    Lora(r=3, targets=("q", "v", "gate")).install(model, KEY)
    shapes = {name: list(value.shape) for name, value in peft_tensors(model).items()}
    layer = "base_model.model.model.layers.1"
    assert shapes[f"{layer}.self_attn.v_proj.lora_A.weight"] == [3, 32]
    assert shapes[f"{layer}.self_attn.v_proj.lora_B.weight"] == [16, 3]
    assert shapes[f"{layer}.mlp.gate_proj.lora_B.weight"] == [48, 3]
    assert len(shapes) == 12
    model = decoder()
    Prefix(length=4).install(model, KEY)
    assert list(peft_tensors(model)["prompt_embeddings"].shape) == [4, 2 * 2 * 16]


def test_neox_adapters_have_no_names_elsewhere() -> None:
    config = {
        "model_type": "gpt_neox", "vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    model = Decoder(ModelShape.from_config(config)).requires_grad_(False)
    Lora().install(model, KEY)
    with pytest.raises(AxiconError, match="output=merged"):
        peft_tensors(model)


def test_what_a_model_has_not() -> None:
    with pytest.raises(AxiconError, match="no product gate"):
        Lora(targets=("gate",)).install(decoder(OPT), KEY)
    with pytest.raises(ValueError, match="length"):
        Prefix(length=0)
