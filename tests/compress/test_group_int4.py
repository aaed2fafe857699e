"""GLM-130B's rounding against the checks of its paper's scheme, and rules by product name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from axicon.compress.group_int4 import GroupInt4, quantise
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.group_int import GroupIntLinear
from axicon.model.int8 import Int8Linear
from axicon.model.shape import ModelShape
from axicon.settings import Method


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def normal(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def signed(packed: GroupIntLinear) -> Tensor:
    return packed.codes().int() - 2 ** (packed.bits - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, -1])
def test_codes_and_error_bound(bits: int, group: int) -> None:
    weight = normal(32, 128)
    packed = quantise(linear(weight), bits, group)
    top = 2 ** (bits - 1) - 1
    width = group if group > 0 else 128
    assert (signed(packed).abs().view(-1, width).amax(1) == top).all()  # and so never -top - 1
    step = packed.scale.float().repeat_interleave(width, 1)
    assert ((packed.unpack() - weight).abs() <= step / 2 * (1 + 2**-10)).all()
    absmax = weight.view(-1, width).abs().amax(1)
    assert torch.equal(packed.scale.flatten(), (absmax / top).half())


@pytest.mark.parametrize("bits", [4, 8])
def test_powers_of_two_scale_the_scales_alone(bits: int) -> None:
    one, four = (quantise(linear(factor * normal(8, 64)), bits, -1) for factor in (1.0, 4.0))
    assert torch.equal(one.qweight, four.qweight)
    assert torch.equal(4 * one.scale, four.scale)


@pytest.mark.parametrize(("inputs", "error"), [(64, 0.109), (576, 0.137), (4096, 0.157)])
def test_error_of_normal_weights(inputs: int, error: float) -> None:
    weight = normal(64, inputs)
    got = quantise(linear(weight), 4, -1).unpack()
    assert abs(float((got - weight).norm() / weight.norm()) - error) < 0.01


def test_groups_err_less_than_rows_and_eight_bits_less_than_four() -> None:
    weight = normal(64, 256)
    errors = [
        float((quantise(linear(weight), bits, group).unpack() - weight).norm())
        for bits, group in ((4, -1), (4, 64), (8, -1))
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_float16_can_hardly_scale(bits: int) -> None:
    weight = normal(6, 64)
    weight[0] = 0
    weight[1] = 0
    weight[1, 5] = -3.0
    weight[2] *= 1.9e-5 / weight[2].abs().amax()
    weight[3] *= 6e-7 / weight[3].abs().amax()
    weight[4] *= 1e-8 / weight[4].abs().amax()
    packed = quantise(linear(weight), bits, -1)
    got, top = packed.unpack(), 2 ** (bits - 1) - 1
    assert got.isfinite().all()
    assert signed(packed).abs().amax() <= top
    assert not got[[0, 4]].any()
    assert got[1].nonzero().tolist() == [[5]]
    assert abs(float(got[1, 5]) + 3.0) < 0.002
    assert ((got[2:4] * weight[2:4]) >= 0).all()  # clamped, not wrapped to the other sign


def test_sharded_then_rounded_and_rounded_then_sharded() -> None:
    weight = normal(32, 128)
    whole = quantise(linear(weight), 4, -1)
    rows = [quantise(linear(part.contiguous()), 4, -1) for part in weight.chunk(2)]
    assert torch.equal(torch.cat([part.unpack() for part in rows]), whole.unpack())
    columns = [quantise(linear(part.contiguous()), 4, -1) for part in weight.chunk(2, 1)]
    own = torch.cat([part.unpack() for part in columns], 1)
    assert torch.equal(own, quantise(linear(weight), 4, 64).unpack())
    assert (own - weight).norm() < (whole.unpack() - weight).norm()


def test_bytes() -> None:
    for bits in (4, 8):
        buffers = dict(quantise(linear(normal(32, 128)), bits, -1).named_buffers())
        assert sum(b.nbytes for b in buffers.values()) == 32 * 128 * bits // 8 + 2 * 32


def decoder() -> Decoder:
    torch.manual_seed(0)
    config = {"model_type": "llama", "vocab_size": 90, "num_hidden_layers": 3, "hidden_size": 64,
              "intermediate_size": 96, "num_attention_heads": 2, "max_position_embeddings": 64}
    return Decoder(ModelShape.from_config(config)).requires_grad_(False)


def built(**settings: object) -> GroupInt4:
    return Method.model_validate({"method": "group_int4", **settings}).build(
        {"group_int4": GroupInt4}, "compressor")


class TestRules:
    def test_the_last_pattern_holds(self) -> None:
        rules = {"*.down": {"bits": 8}, "blocks.0.*": "skip", "blocks.0.qkv": {"group": 16}}
        model = compress(built(group=32, rules=rules, head="int8"), decoder())
        first, second = model.blocks[0], model.blocks[1]
        assert (first.qkv.bits, first.qkv.group) == (4, 16)
        assert type(first.down) is type(first.out) is nn.Linear
        assert (second.down.bits, second.down.group, second.qkv.bits) == (8, 32, 4)
        assert isinstance(model.lm_head, Int8Linear)

    @pytest.mark.parametrize(("rules", "says"), [
        ({"*.down": {"bit": 8}}, r"rules of '\*\.down': unknown key 'bit': known are bits, group, or skip"),
        ({"*.down": {"bits": 5}}, "bits=5: known are 4 and 8"),
        ({"*.down": {"bits": "8"}}, "bits=8 must be a whole number"),
        ({"*.down": "leave"}, r"compressor\.rules"),
    ])  # fmt: skip
    def test_a_wrong_rule_is_refused(self, rules: dict[str, object], says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            built(rules=rules)

    def test_a_group_that_does_not_divide_names_the_product(self) -> None:
        with pytest.raises(AxiconError, match=(
            r"group_int4: blocks\.0\.down: a group of 64 does not divide 96 inputs; take 32, 48, 96 or -1"
        )):
            compress(GroupInt4(group=64), decoder())
        compress(GroupInt4(group=64, rules={"*.down": {"group": 32}}), decoder())

    def test_a_product_packed_already_is_named(self) -> None:
        model = compress(GroupInt4(rules={"*.qkv": "skip", "blocks.0.*": "skip"}), decoder())
        with pytest.raises(AxiconError, match=r"group_int4: blocks\.1\.out is packed already \(group_int\)"):
            compress(GroupInt4(), model)


@pytest.mark.usefixtures("own_cache")
def test_served_directories_hold_it(tmp_path: Path) -> None:
    from axicon.compress.directory import write_compressed
    from axicon.model import checkpoint
    from tests.parity.variants import saved

    saved("llama_tied", tmp_path / "dense")
    (tmp_path / "small").mkdir()
    method = GroupInt4(group=16, rules={"*.down": {"bits": 8, "group": -1}, "blocks.1.qkv": "skip"})
    write_compressed(method, tmp_path / "dense", tmp_path / "small", dtype=torch.bfloat16)
    want = compress(method, checkpoint.load(tmp_path / "dense"))
    got = checkpoint.load(tmp_path / "small")
    tokens = torch.arange(20)[None]
    assert torch.equal(got.logits(tokens), want.logits(tokens))
    assert (got.blocks[0].down.bits, got.blocks[0].down.group) == (8, 0)
