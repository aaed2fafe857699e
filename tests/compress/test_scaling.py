"""Scales that move between the products of a block: what a block computes stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axicon.compress.calibration import sequences
from axicon.compress.scaling import (
    Pair,
    float_copy,
    fold,
    keep_norms,
    living,
    norm_pairs,
    product_pairs,
)
from axicon.errors import AxiconError
from axicon.model import checkpoint
from axicon.model.decoder import Block
from tests.parity.variants import saved

pytestmark = pytest.mark.usefixtures("own_cache")

FOLDED = {
    "opt": 4, "opt_gelu": 3, "llama": 4, "llama_grouped": 4, "llama_one_kv_head": 4, "llama_biases": 4,
    "llama_wide_heads": 4, "mistral_window": 4, "qwen2": 4, "qwen3": 4, "neox": 3, "neox_sequential": 3,
    "neox_tied": 4,
}  # fmt: skip
"""Pairs of a block by variant: without `down` where the activation is neither gated nor ReLU."""


def block_of(variant: str, folder: Path, dtype: torch.dtype = torch.float32) -> Block:
    saved(variant, folder / "dense")
    block = checkpoint.load(folder / "dense", dtype=dtype).blocks[1]
    assert isinstance(block, Block)
    return block


def random_scales(block: Block, pair: Pair, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    width = getattr(block, pair.product).in_features // pair.repeats
    return torch.randn(width, generator=made).exp()


@pytest.mark.parametrize("variant", FOLDED)
def test_folding_changes_nothing(variant: str, tmp_path: Path) -> None:
    block = block_of(variant, tmp_path)
    x = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0))
    want = sequences(block, x)
    scaled = float_copy(block, "test")
    pairs = [*norm_pairs(block, "test"), *product_pairs(block)]
    assert len(pairs) == FOLDED[variant]
    for number, pair in enumerate(pairs):
        before = getattr(scaled, pair.product).weight.clone()
        scales = fold(scaled, pair, random_scales(block, pair, number), torch.float32)
        assert torch.equal(getattr(scaled, pair.product).weight, before * scales)
        assert scales.max() > 2
        got = sequences(scaled, x)
        assert (got - want).norm() / want.norm() < 1e-5
    assert torch.equal(sequences(block, x), want)  # the block itself is as it was


@pytest.mark.parametrize("variant", ["opt", "llama_grouped"])
def test_what_storing_a_norm_rounds_away_is_made_good(variant: str, tmp_path: Path) -> None:
    block = block_of(variant, tmp_path, torch.bfloat16)
    scaled, pairs = float_copy(block, "test"), norm_pairs(block, "test")
    x = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0))
    want = sequences(scaled, x)
    for number, pair in enumerate(pairs):
        fold(scaled, pair, random_scales(block, pair, number), torch.bfloat16)
    keep_norms(block, scaled, pairs)
    for pair in pairs:
        stored, norm = getattr(block, pair.producer), getattr(scaled, pair.producer)
        assert stored.weight.dtype == torch.bfloat16
        assert torch.equal(stored.weight.float(), norm.weight)
    assert (sequences(scaled, x) - want).norm() / want.norm() < 1e-5


def test_a_norm_weight_of_zero_stays_zero(tmp_path: Path) -> None:
    block = block_of("llama", tmp_path)
    block.mlp_norm.weight[3] = 0
    scaled, [_, pair] = float_copy(block, "test"), norm_pairs(block, "test")
    fold(scaled, pair, random_scales(block, pair, 0), torch.bfloat16)
    assert scaled.mlp_norm.weight[3] == 0
    assert scaled.gate_up.weight.isfinite().all()


def test_query_heads_that_share_values_share_scales() -> None:
    pair = Pair("qkv", "out", slice(0, 4), repeats=2, head_width=2)
    assert pair.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert pair.largest(torch.tensor([1.0, 9, 5, 6, 7, 1, 2, 8])).tolist() == [5, 9, 7, 8]


def test_channels_that_never_fired_count_as_the_smallest() -> None:
    assert living(torch.tensor([0.0, 3, 2, 0])).tolist() == [2, 3, 2, 2]
    assert living(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize(("variant", "says"), [
    ("opt_350m", "test: the norms of this model follow the residual sum"),
    ("opt_plain", "test: the norms of this model have no weights"),
])  # fmt: skip
def test_norms_that_take_no_scale(variant: str, says: str, tmp_path: Path) -> None:
    block = block_of(variant, tmp_path)
    with pytest.raises(AxiconError, match=says) as caught:
        norm_pairs(block, "test")
    assert "\n" not in str(caught.value)
    assert "take gptq or llm_int8" in str(caught.value)


def test_a_weight_that_is_no_number_names_the_product(tmp_path: Path) -> None:
    block = block_of("llama", tmp_path)
    block.down.weight[0, 0] = torch.nan
    with pytest.raises(AxiconError, match=r"test: blocks\.1\.down holds NaN or infinite weights"):
        float_copy(block, "test")
