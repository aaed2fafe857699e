"""Binary codes: golden words, equality with uniform codes, products by lookup, and what a reader refuses."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from axicon.kernels import native
from axicon.kernels.binary_code import lookup_product, tables
from axicon.model.binary_code import BinaryCodeLinear, pack, unpack, word_count
from axicon.model.group_int import SCALE_DTYPES, GroupIntLinear
from axicon.model.packed import formats


def codes(outputs: int, inputs: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (outputs, inputs), generator=torch.Generator().manual_seed(bits))


def linear(bits: int = 3, group: int = 32, inputs: int = 96, *, offset: bool = True) -> BinaryCodeLinear:
    """Scales that are no powers of two of each other."""
    made = torch.Generator().manual_seed(0)
    count = inputs // group if group > 0 else 1
    return BinaryCodeLinear.from_codes(
        codes(10, inputs, bits), torch.rand(10, count, bits, generator=made).half(),
        torch.randn(10, count, generator=made).half() if offset else None, torch.randn(10, generator=made),
        group=group,
    )  # fmt: skip


def uniform(bits: int, group: int = 16, *, zero: bool = True, dtype: str = "float16") -> GroupIntLinear:
    made = torch.Generator().manual_seed(bits)
    count = 48 // group if group > 0 else 1
    scale = torch.rand(10, count, generator=made).to(SCALE_DTYPES[dtype])
    scale[3], scale[4] = 0, 2.0**-24  # the smallest float16
    return GroupIntLinear.from_codes(
        codes(10, 48, bits), scale, torch.randint(0, 2**bits, (10, count), generator=made) if zero else None,
        torch.randn(10, generator=made), bits=bits, group=group,
    )  # fmt: skip


def test_golden_words() -> None:
    first = (torch.arange(32) == 0)[None].int()
    assert pack(torch.ones(1, 32), 1).tolist() == [[[0xFFFFFFFF]]]
    assert pack(first, 1).tolist() == [[[0x00000001]]]
    # Plane 1 of input 33 is bit 1 of the second word's second plane.
    assert pack((torch.arange(40) == 33)[None].int() * 2, 2).tolist() == [[[0], [0]], [[0], [2]]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 96])
def test_packing_is_the_identity(bits: int, inputs: int) -> None:
    want = codes(5, inputs, bits)
    packed = pack(want, bits)
    assert (packed.dtype, packed.shape) == (torch.uint32, (word_count(inputs), bits, 5))
    assert torch.equal(unpack(packed, inputs).long(), want)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("group", [32, 12, -1])
@pytest.mark.parametrize("offset", [True, False])
def test_meaning(bits: int, group: int, offset: bool) -> None:
    layer, code = linear(bits, group, offset=offset), codes(10, 96, bits)
    width = 96 // len(layer.alpha)
    want = torch.empty(10, 96, dtype=torch.float64)
    for o in range(10):
        for k in range(96):
            want[o, k] = 0.0 if layer.offset is None else float(layer.offset[k // width, o])
            for i in range(bits):
                alpha = float(layer.alpha[k // width, i, o])
                want[o, k] += alpha if int(code[o, k]) >> i & 1 else -alpha
    assert torch.allclose(layer.unpack().double(), want, rtol=0, atol=1e-6)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    assert layer.bias is not None
    assert torch.allclose(layer(x), x @ layer.unpack().T + layer.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_codes_are_kept_exactly(bits: int, group: int, zero: bool) -> None:
    packed = uniform(bits, group, zero=zero)
    layer = BinaryCodeLinear.from_uniform(packed)
    assert torch.equal(layer.unpack(), packed.unpack())
    again = layer.as_uniform()
    assert again is not None
    assert torch.equal(again.qweight, packed.qweight)
    assert torch.equal(again.unpack(), packed.unpack())
    assert torch.equal(again.scale.float(), packed.scale.float())
    assert again.asymmetric == zero
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), packed(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_paper_s_equation_in_float64(bits: int) -> None:
    made = torch.Generator().manual_seed(bits)
    scale, zero = torch.rand(50, generator=made).double(), torch.randint(0, 2**bits, (50,), generator=made)
    code = torch.arange(2**bits)
    want = scale[:, None] * (code - zero[:, None])
    alpha = scale[:, None] * 2.0 ** torch.arange(bits) / 2
    offset = scale * (2**bits - 1) / 2 - scale * zero
    sign = (code[:, None] >> torch.arange(bits) & 1) * 2.0 - 1
    got = offset[:, None] + alpha @ sign.double().T
    assert (got - want).abs().max() <= 4e-16 * 2**bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_scales_are_kept(dtype: str) -> None:
    packed = uniform(4, dtype=dtype)
    layer = BinaryCodeLinear.from_uniform(packed)
    assert torch.allclose(layer.unpack(), packed.unpack(), rtol=0, atol=2e-6)
    assert dtype == "float32" or torch.equal(layer.unpack(), packed.unpack())


def test_what_is_not_uniform() -> None:
    assert BinaryCodeLinear.from_uniform(uniform(3)).is_uniform()
    assert not linear().is_uniform()
    for change in ("alpha", "offset"):
        layer = BinaryCodeLinear.from_uniform(uniform(3))
        getattr(layer, change)[0, ..., 0] *= 1.25
        assert not layer.is_uniform()
    assert not BinaryCodeLinear(layer.planes, layer.alpha, None, None, inputs=48, group=16).is_uniform()
    assert not linear(1).is_uniform()


def test_columns_in_another_order_are_refused() -> None:
    packed = GroupIntLinear.from_codes(
        codes(4, 32, 4), torch.ones(4, 1), bits=4, group=-1, order=torch.arange(32).flip(0))
    with pytest.raises(ValueError, match="static groups"):
        BinaryCodeLinear.from_uniform(packed)


def test_tables() -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
    table = tables(x)
    assert table.shape == (2, 2, 256)
    assert torch.allclose(table, -table.flip(2))
    assert torch.allclose(table[..., 255], x.view(2, 2, 8).sum(2))
    for v in range(256):
        sign = torch.tensor([1.0 if v >> j & 1 else -1.0 for j in range(8)], dtype=torch.float64)
        assert torch.allclose(table[..., v], x.view(2, 2, 8) @ sign)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(32, 8), (96, 32), (128, 64), (96, -1), (40, -1), (36, -1)])
@pytest.mark.parametrize("bits", range(1, 5))
def test_lookup_equals_the_dense_product(bits: int, inputs: int, group: int, offset: bool) -> None:
    layer = linear(bits, group, inputs, offset=offset)
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1))
    want = x @ layer.unpack().T
    got = lookup_product(x, layer.planes, layer.alpha, layer.offset, layer.group)
    assert (got - want).norm() / want.norm() < 1e-5


def test_lookup_wants_whole_bytes() -> None:
    layer = linear(group=12)
    with pytest.raises(ValueError, match="groups of 12"):
        lookup_product(torch.zeros(1, 96), layer.planes, layer.alpha, layer.offset, layer.group)


def test_a_dense_copy_follows_the_dtype() -> None:
    layer = linear()
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert torch.allclose(layer(x), x @ layer.unpack().T + layer.bias, rtol=1e-5, atol=1e-5)


def test_shards() -> None:
    layer = linear()
    rows = [layer.shard(rank, 2, "out") for rank in range(2)]
    assert torch.equal(torch.cat([part.unpack() for part in rows]), layer.unpack())
    columns = [layer.shard(rank, 3, "in") for rank in range(3)]
    assert torch.equal(torch.cat([part.unpack() for part in columns], 1), layer.unpack())
    assert [part.bias is None for part in columns] == [False, True, True]
    whole = [linear(group=-1).shard(rank, 3, "in") for rank in range(3)]
    assert torch.equal(torch.cat([part.unpack() for part in whole], 1), linear(group=-1).unpack())
    with pytest.raises(ValueError, match="through groups of 48"):
        linear(group=48).shard(0, 3, "in")
    with pytest.raises(ValueError, match="words of 32"):
        linear(group=12).shard(0, 4, "in")


SETTINGS = {"bits": 3, "group": 32, "shifted": True, "scale_dtype": "float16", "offset_dtype": "float16"}


@pytest.mark.parametrize("offset", [True, False])
def test_a_reader_gets_the_same_buffers_to_fill(offset: bool) -> None:
    for layer in (linear(offset=offset), BinaryCodeLinear.from_uniform(uniform(3))):
        made = BinaryCodeLinear.empty(
            10, layer.inputs, torch.float32, {name: getattr(layer, name) for name in layer.settings})
        shapes = [{n: (b.shape, b.dtype) for n, b in m.named_buffers()} for m in (layer, made)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("change", "says"), [
    ({"bits": 9}, "1 to 8"), ({"bits": 0}, "1 to 8"), ({"bits": True}, "whole number"),
    ({"group": -1}, "from 0 on"), ({"shifted": 1}, "true or false"), ({"scale_dtype": "int8"}, "one of"),
    ({"offset_dtype": 3}, "one of"), ({"group": 36}, "a group of 36 does not divide 96 inputs"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BinaryCodeLinear.empty(10, 96, None, SETTINGS | change)  # type: ignore[arg-type]


def test_buffers_that_do_not_fit_are_refused() -> None:
    layer = linear()
    with pytest.raises(ValueError, match="do not fit"):
        BinaryCodeLinear(layer.planes, layer.alpha[:2], None, None, inputs=96, group=32)
    with pytest.raises(ValueError, match="9 planes"):
        BinaryCodeLinear(pack(codes(2, 32, 8), 9), torch.ones(1, 9, 2), None, None, inputs=32, group=0)


def test_what_it_runs_as_is_said_and_is_no_part_of_it() -> None:
    uniform_codes = BinaryCodeLinear.from_uniform(uniform(3))
    for layer, words in ((uniform_codes, "binary_code as group_int"), (linear(), "binary_code as dense")):
        before = set(layer.state_dict())
        layer(torch.zeros(1, layer.inputs))
        assert layer.runs_as == words
        assert formats(torch.nn.Sequential(layer)) == {words}
        assert set(layer.state_dict()) == before
        assert not list(layer.children())


@pytest.mark.parametrize("kind", ["uniform", "other"])
def test_the_compiled_product(kind: str) -> None:
    """Uniform codes as `GroupIntLinear` multiplies them, others as a dense bfloat16 weight."""
    try:
        library = native.library()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    layer = BinaryCodeLinear.from_codes(
        codes(32, 64, 3), torch.rand(32, 2, 3, generator=torch.Generator().manual_seed(0)).half(),
        bias=torch.randn(32, generator=torch.Generator().manual_seed(1)), group=32)
    if kind == "uniform":
        scale = torch.full((32, 2), 0.25).half()
        packed = GroupIntLinear.from_codes(codes(32, 64, 3), scale, bits=3, group=32)
        layer = BinaryCodeLinear.from_uniform(packed)
    assert layer.why_not_native() is None
    descriptor, (weight, *_kept) = layer.native(library)
    assert weight.nbytes == layer.native_bytes() == (32 * 32 + 2 * 64 if kind == "uniform" else 2 * 32 * 64)
    descriptor.weight = weight.data_ptr()
    x, y = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)), torch.empty(3, 32)
    library.axicon_linear(ctypes.addressof(descriptor), x.data_ptr(), 3, y.data_ptr(), 1)
    assert (y - layer(x)).norm() / layer(x).norm() < 0.02
