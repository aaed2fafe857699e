"""Group codes: golden bytes, every pattern of bits there and back, and what a reader refuses."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from axicon.kernels import native
from axicon.model.group_int import SCALE_DTYPES, GroupIntLinear, kernel_group, pack, row_bytes, unpack


def codes(outputs: int, inputs: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (outputs, inputs), generator=torch.Generator().manual_seed(bits))


def linear(bits: int = 4, group: int = 16, *, zero: bool = True, order: bool = False) -> GroupIntLinear:
    made = torch.Generator().manual_seed(0)
    count = 48 // group if group > 0 else 1
    return GroupIntLinear.from_codes(
        codes(10, 48, bits), torch.rand(10, count, generator=made).half(),
        torch.randint(0, 2**bits, (10, count), generator=made) if zero else None,
        torch.randn(10, generator=made), bits=bits, group=group,
        order=torch.randperm(48, generator=made) if order else None,
    )  # fmt: skip


def test_golden_bytes() -> None:
    # 4 bits, low half first: symmetric codes 1, -1, 7, -7 with 8 added are 9, 7, 15, 1.
    assert pack(torch.tensor([[9, 7, 15, 1]]), 4).tolist() == [[0x79, 0x1F]]
    # 3 bits: 1 + (2 << 3) + (3 << 6) + (4 << 9) + ... as one number of 24 bits.
    eight = [1, 2, 3, 4, 5, 6, 7, 0]
    number = sum(code << (3 * i) for i, code in enumerate(eight))
    assert bytes(pack(torch.tensor([eight]), 3)[0].tolist()) == number.to_bytes(3, "little")
    assert pack(torch.tensor([[3, 0, 1, 2, 1]]), 2).tolist() == [[0b10010011, 0b01]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("inputs", [1, 7, 8, 29, 64])
def test_packing_is_the_identity(bits: int, inputs: int) -> None:
    want = codes(5, inputs, bits)
    packed = pack(want, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, row_bytes(inputs, bits)))
    assert torch.equal(unpack(packed, bits, inputs).long(), want)


def test_all_bytes_are_two_codes() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack(unpack(every, 4, 2), 4), every)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_meaning(bits: int, group: int, zero: bool, order: bool) -> None:
    layer = linear(bits, group, zero=zero, order=order)
    code, width = codes(10, 48, bits), 48 // layer.scale.shape[1]
    want = torch.empty(10, 48)
    for o in range(10):
        for j in range(48):
            middle = 2 ** (bits - 1) if layer.zero is None else int(layer.zero[o, j // width])
            column = j if layer.order is None else int(layer.order[j])
            want[o, column] = float(layer.scale[o, j // width]) * (int(code[o, j]) - middle)
    assert torch.equal(layer.unpack(), want)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ want.T + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "order"), [(4, False), (3, True), (8, False)])
def test_shards_of_outputs_are_rows(bits: int, order: bool) -> None:
    layer = linear(bits, order=order)
    parts = [layer.shard(rank, 2, "out") for rank in range(2)]
    assert torch.equal(torch.cat([part.unpack() for part in parts]), layer.unpack())
    assert torch.equal(torch.cat([part.bias for part in parts if part.bias is not None]), layer.bias)


@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_shards_of_inputs_are_columns(bits: int, group: int) -> None:
    layer = linear(bits, group)
    parts = [layer.shard(rank, 3, "in") for rank in range(3)]
    assert torch.equal(torch.cat([part.unpack() for part in parts], 1), layer.unpack())
    assert [part.bias is None for part in parts] == [False, True, True]


def test_a_cut_through_groups_or_a_changed_order_is_refused() -> None:
    with pytest.raises(ValueError, match="through groups of 16"):
        linear().shard(0, 2, "in")
    with pytest.raises(ValueError, match="another order"):
        linear(order=True).shard(0, 3, "in")
    with pytest.raises(ValueError, match="through a byte"):
        linear(bits=3, group=4).shard(0, 4, "in")


SETTINGS = {"bits": 4, "group": 16, "asymmetric": True, "permuted": False, "scale_dtype": "float16"}


def test_a_reader_gets_the_same_buffers_to_fill() -> None:
    for zero, order, dtype in [(True, True, "float16"), (False, False, "bfloat16"), (True, False, "float32")]:
        layer = linear(zero=zero, order=order)
        layer.scale, layer.scale_dtype = layer.scale.to(SCALE_DTYPES[dtype]), dtype
        made = GroupIntLinear.empty(
            10, 48, torch.float32, {name: getattr(layer, name) for name in layer.settings}
        )
        shapes = [{n: (b.shape, b.dtype) for n, b in m.named_buffers()} for m in (layer, made)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("change", "says"), [
    ({"bits": 9}, "2 to 8"), ({"bits": 1}, "2 to 8"), ({"bits": 4.0}, "whole number"),
    ({"bits": True}, "whole number"),
    ({"group": -1}, "from 0 on"), ({"asymmetric": 1}, "true or false"), ({"scale_dtype": "int8"}, "one of"),
    ({"scale_dtype": 3}, "one of"),
    ({"group": 32}, r"a group of 32 does not divide 48 inputs; take 48 or -1 \(the whole row\)"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GroupIntLinear.empty(10, 48, None, SETTINGS | change)  # type: ignore[arg-type]


def test_an_order_that_is_none_is_refused() -> None:
    layer = linear(order=True)
    layer.check()
    assert layer.order is not None
    layer.order[3] = layer.order[4]
    with pytest.raises(ValueError, match="every input once"):
        layer.check()


def through_kernels(packed: GroupIntLinear, x: Tensor) -> Tensor:
    try:
        library = native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    descriptor, kept = packed.native(library)
    assert kept[0].nbytes == packed.native_bytes()
    descriptor.weight = kept[0].data_ptr()
    y = torch.empty(len(x), packed.outputs)
    library.axicon_linear(ctypes.addressof(descriptor), x.contiguous().data_ptr(), len(x), y.data_ptr(), 2)
    return y


def in_float64(packed: GroupIntLinear, x: Tensor) -> Tensor:
    """The same product from its definition: activations as int8 codes of each row and group of columns."""
    assert packed.bias is not None
    size = kernel_group(packed.inputs, packed.group)
    assert size is not None
    if packed.order is not None:
        x = x[:, packed.order.long()]
    groups = x.view(len(x), -1, size)
    top = groups.abs().amax(-1, keepdim=True)
    rounded = (groups * (torch.full_like(top, 127.0) / top)).round() * (top.double() / 127.0)
    return rounded.view(len(x), -1) @ packed.stored().double().T + packed.bias.double()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [0, 32, 192])
@pytest.mark.parametrize(
    ("zero", "order", "dtype"),
    [
        (False, False, torch.float16),
        (True, False, torch.bfloat16),
        (False, True, torch.float32),
        (True, True, torch.float16),
    ],
)
def test_the_kernels_equal_the_definition(
    bits: int, group: int, zero: bool, order: bool, dtype: torch.dtype
) -> None:
    made = torch.Generator().manual_seed(bits)
    count = 576 // group if group else 1
    packed = GroupIntLinear.from_codes(
        codes(48, 576, bits), torch.rand(48, count, generator=made).to(dtype),
        torch.randint(0, 2**bits, (48, count), generator=made) if zero else None,
        torch.randn(48, generator=made), bits=bits, group=group,
        order=torch.randperm(576, generator=made) if order else None,
    )  # fmt: skip
    x = torch.randn(11, 576, generator=made)
    x[3, 7] = 50.0
    got, want = through_kernels(packed, x), in_float64(packed, x)
    assert (got - want).abs().max() < 2e-6 * want.abs().max()
    # Beside the product of rounded codes with activations that are not rounded.
    assert (got - packed(x)).norm() < 0.03 * got.norm()
    for row in (0, 3, 10):
        assert torch.equal(through_kernels(packed, x[row : row + 1])[0], got[row])


def test_the_kernels_hand_on_what_is_not_a_number() -> None:
    packed = GroupIntLinear.from_codes(
        codes(16, 64, 4), torch.ones(16, 2).half(), None, torch.zeros(16), bits=4, group=32
    )
    x = torch.ones(3, 64)
    x[1, 40], x[2] = torch.nan, 0.0
    got = through_kernels(packed, x)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()
    assert torch.equal(got[2], torch.zeros(16))


def test_groups_of_the_kernels() -> None:
    sizes = {(576, 64): 64, (576, 0): 96, (576, 192): 96, (2048, 0): 128, (96, 24): None, (64, 8): None}
    assert {of: kernel_group(*of) for of in sizes} == sizes
    assert "groups of 24" in str(linear(group=24).why_not_native())
    assert linear(group=16).why_not_native() is None
