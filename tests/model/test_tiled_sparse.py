"""Kept weights and a bitmap: nothing lost or cut off, bytes as said, and files that lie are refused."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor, nn

from axicon.compress.chain import Chain
from axicon.compress.magnitude import Magnitude
from axicon.compress.tiled_sparse import TiledSparse, byte_ratio
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.kernels import native
from axicon.model.decoder import Decoder
from axicon.model.masks import prune
from axicon.model.shape import ModelShape
from axicon.model.tiled_sparse import TiledSparseLinear, stored_bytes

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 128,
    "intermediate_size": 192, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
DENSITIES = (0.0, 0.01, 0.1, 0.5, 0.6, 0.9, 1.0)


def weight(density: float, outputs: int = 130, inputs: int = 300) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(round(100 * density))
    mask = torch.rand(outputs, inputs, generator=made) < density
    return torch.randn(outputs, inputs, generator=made) * mask, mask


def nbytes(packed: TiledSparseLinear) -> int:
    return sum(value.nbytes for name, value in packed.named_buffers() if name != "bias")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(130, 300), (64, 128), (1, 1), (128, 64)])
def test_what_went_in_comes_out(density: float, shape: tuple[int, int]) -> None:
    dense, mask = weight(density, *shape)
    packed = TiledSparseLinear.from_weight(dense, mask)
    assert torch.equal(packed.unpack(), dense)
    assert torch.equal(packed.mask(), mask)
    packed.check()
    assert nbytes(packed) == stored_bytes(*shape, int(mask.sum()), 4)


def test_tiles_may_be_full_while_others_are_empty() -> None:
    dense, mask = torch.zeros(256, 256), torch.zeros(256, 256, dtype=torch.bool)
    mask[64:128, 128:] = True
    dense[mask] = torch.arange(1.0, 64 * 128 + 1)
    packed = TiledSparseLinear.from_weight(dense, mask)
    assert torch.equal(packed.unpack(), dense)
    # values of a tile lie together, output after output
    assert packed.values.tolist() == list(range(1, 64 * 128 + 1))
    assert packed.start[64, 1] == 0
    assert packed.start[65, 1] == 128
    assert (packed.start[128:] == 64 * 128).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 64])
def test_the_product_is_the_dense_one(rows: int) -> None:
    dense, mask = weight(0.3, 1100, 200)
    bias = torch.randn(1100)
    packed, x = TiledSparseLinear.from_weight(dense, mask, bias), torch.randn(rows, 200)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, dense, bias), rtol=1e-5, atol=1e-4)


def test_a_kept_weight_may_be_0_and_a_mask_decides() -> None:
    linear = nn.Linear(128, 64).requires_grad_(False)
    mask = torch.rand(64, 128) < 0.3
    linear.weight[:, 5] = 0
    prune(linear, mask)
    packed = TiledSparseLinear.from_linear(linear.bfloat16())
    assert torch.equal(packed.mask(), mask)
    assert packed.values.dtype == torch.bfloat16
    assert packed.kept == int(mask.sum())


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("world", [2, 5])
def test_parts_are_those_of_the_dense_weight(dim: str, world: int) -> None:
    dense, mask = weight(0.4)
    packed = TiledSparseLinear.from_weight(dense, mask, torch.randn(130))
    parts = [packed.shard(rank, world, dim).unpack() for rank in range(world)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts, 0 if dim == "out" else 1), dense)


class TestBytes:
    def test_half_of_the_weights_gone_saves_two_fifths(self) -> None:
        """The paper's items of 32 bits would save nothing there."""
        dense, mask = weight(0.5, 1024, 1024)
        packed = TiledSparseLinear.from_weight(dense.bfloat16(), mask)
        share = nbytes(packed) / (2 * dense.numel())
        assert share == pytest.approx(0.5 + 1 / 16 + 1 / 64, abs=0.003)

    def test_what_saves_too_little_stays_dense(self) -> None:
        rules = {"*.down": {"sparsity": 0.1}}
        model = Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False).bfloat16()
        steps = (Magnitude(sparsity=0.7, rules=rules), TiledSparse())
        model = compress(Chain(("magnitude", "tiled_sparse"), steps), model)
        for block in model.blocks:
            assert isinstance(block.qkv, TiledSparseLinear)
            assert nbytes(block.qkv) < 0.4 * 2 * block.qkv.outputs * block.qkv.inputs
            assert isinstance(block.down, nn.Linear)
            assert byte_ratio(block.down) > 0.75

    def test_a_dense_model_is_refused(self) -> None:
        model = Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)
        with pytest.raises(AxiconError, match=r"nothing in blocks.0 would save 25%.*Prune more first"):
            compress(TiledSparse(), model)


class TestFiles:
    def made(self) -> TiledSparseLinear:
        dense, mask = weight(0.3)
        return TiledSparseLinear.from_weight(dense, mask)

    def test_a_bit_too_many(self) -> None:
        packed = self.made()
        packed.bitmap[3, 0] ^= 4
        with pytest.raises(ValueError, match=r"its bitmap marks \d+ weights, it has \d+ values"):
            packed.check()

    def test_a_start_beyond_the_end(self) -> None:
        packed = self.made()
        packed.start[7, 1] = 2**30
        with pytest.raises(ValueError, match="do not begin where its bitmap says"):
            packed.check()

    @pytest.mark.parametrize(("settings", "says"), [
        ({"kept": -1, "value_dtype": "bfloat16"}, "kept is -1"),
        ({"kept": 10**9, "value_dtype": "bfloat16"}, "kept is 1000000000"),
        ({"kept": True, "value_dtype": "bfloat16"}, "kept is True"),
        ({"kept": 5, "value_dtype": "int8"}, "value_dtype is 'int8'"),
    ])  # fmt: skip
    def test_settings(self, settings: dict[str, int | str], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            TiledSparseLinear.empty(64, 128, None, settings)


@pytest.mark.parametrize("rows", [1, 3, 13])
@pytest.mark.parametrize("density", DENSITIES)
def test_the_compiled_product_has_the_bits_of_the_dense_one(density: float, rows: int) -> None:
    try:
        library = native.library()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    dense, mask = weight(density, 80, 96)
    dense = dense.bfloat16()
    bias = torch.randn(80, generator=torch.Generator().manual_seed(1))
    packed = TiledSparseLinear.from_weight(dense, mask, bias)
    assert packed.why_not_native() is None
    descriptor, (sparse, *_kept) = packed.native(library)
    assert sparse.nbytes == packed.native_bytes()
    rounding = sparse.nbytes - 2 * packed.kept - 80 * 96 // 8  # to cache lines
    assert 0 <= rounding <= 64 * (80 // 16 + 1)
    descriptor.weight = sparse.data_ptr()
    whole = torch.empty_like(dense)
    library.axicon_pack_bf16(dense.data_ptr(), 80, 96, whole.data_ptr())
    reference = native.Linear(native.BF16, 80, 96, 0.0, 0.0, whole.data_ptr(), None, bias.data_ptr())
    x, y = torch.randn(rows, 96, generator=torch.Generator().manual_seed(2)), torch.empty(2, rows, 80)
    for linear, out in zip((descriptor, reference), y, strict=True):
        library.axicon_linear(ctypes.addressof(linear), x.data_ptr(), rows, out.data_ptr(), 2)
    assert torch.equal(*y)
    torch.testing.assert_close(y[0], packed(x), atol=0.1, rtol=0)
