"""Which slots stay: the oracles of the H2O note, and the compiled kernels against the definition."""

from __future__ import annotations

import pytest
import torch

from axicon.generate.bounded import evict_in_torch
from axicon.kernels import native
from axicon.kernels.eviction import select
from axicon.model.cache import RowCache
from axicon.model.native import KeepBest, NativeDecoder


def kept(scores: list[list[float]], budget: int, recent: int, sinks: int = 0) -> list[list[int]]:
    scores_GS = torch.tensor(scores)
    heads, slots = scores_GS.shape
    positions_GS = torch.arange(slots, dtype=torch.int32).expand(heads, slots)
    keep_GS = select(scores_GS, positions_GS, torch.full((heads,), slots), budget, recent, sinks)
    return [row.nonzero().flatten().tolist() for row in keep_GS]


def test_selection_oracle() -> None:
    scores = [[5, 1, 4, 0.5, 3, 2, 0.1, 0.2], [0.2, 0.1, 2, 5, 1, 4, 0.5, 3]]
    assert kept(scores, 5, 3) == [[0, 2, 5, 6, 7], [2, 3, 5, 6, 7]]


def test_sinks_count_and_of_equal_scores_the_earlier_stays() -> None:
    assert kept([[0, 0, 9, 1, 1, 1, 1, 0]], 6, 1, 2) == [[0, 1, 2, 3, 4, 7]]
    assert kept([[1, 2, 3]], 5, 1, 1) == [[0, 1, 2]]
    assert kept([[1, 9, 3, 4]], 2, 1, 1) == [[0, 3]]


def test_golden_trajectory_of_h2o() -> None:
    """One head, one heavy hitter, two recent slots, no sinks; a query's attention is the softmax of static
    logits over the slots it can see.
    """
    logits = torch.tensor([2.0, 0.1, 1.0, -0.5, 1.5, 0.0, 0.7, -1.0])
    scores = torch.zeros(4)
    for i in range(4):
        scores[: i + 1] += logits[: i + 1].softmax(0)
    assert scores.tolist() == pytest.approx([3.154075, 0.322182, 0.472425, 0.051318], abs=1e-6)
    held, seen = torch.arange(4), []
    for token in (3, 4, 5, 6, 7):
        if token > 3:
            held, scores = torch.cat([held, torch.tensor([token])]), torch.cat([scores, torch.zeros(1)])
            scores = scores + logits[held].softmax(0)
        keep = select(scores[None], held[None], torch.tensor([len(held)]), 3, 2, 0)[0]
        held, scores = held[keep], scores[keep]
        seen.append(held.tolist())
    assert seen == [[0, 2, 3], [0, 3, 4], [0, 4, 5], [0, 5, 6], [0, 6, 7]]
    assert scores.tolist() == pytest.approx([5.371060, 0.322258, 0.034156], abs=1e-6)


def ragged(lengths: list[int]) -> RowCache:
    """One layer whose heads hold so many slots, with a hole in their positions."""
    from axicon.model.cache import LayerCache

    extent = torch.randn(2, len(lengths), 96, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    row = RowCache([LayerCache(extent)], 96)
    row.ragged()
    assert row.lengths_LG is not None
    row.lengths_LG[0] = lengths
    row.layers[0].positions_GC = torch.stack(
        [torch.arange(96, dtype=torch.int32) * (1 + (g > 0)) for g in range(3)]
    )
    return row


@pytest.mark.parametrize(
    "keep", [KeepBest(20, 5, 4), KeepBest(7, 0, 0), KeepBest(90, 60, 10), KeepBest(9, 5, 4)]
)
@pytest.mark.parametrize("broken", [0, 1, 5])
def test_kernels_keep_and_move_what_the_definition_does(keep: KeepBest, broken: int) -> None:
    """`broken`: every so many scores is NaN, as a model may make them; 0: none is."""
    try:
        library = native.library()
    except native.Unavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    lengths = [80, 96, 11]
    scores = torch.randint(0, 9, (3, 96), generator=torch.Generator().manual_seed(1)).float()
    if broken:
        scores[:, ::broken] = torch.nan
    rows, sums = [ragged(lengths), ragged(lengths)], [scores.clone() * 2, scores.clone() * 2]
    evict_in_torch(rows[0].layers[0], keep, scores, sums[0])
    kernels = NativeDecoder.__new__(NativeDecoder)
    kernels.library = library
    kernels.evict([rows[1].layers[0]], [keep], [scores], [sums[1]])
    (one,), (other,) = (row.layers for row in rows)
    assert one.lengths is not None
    assert other.lengths is not None
    assert one.lengths.tolist() == other.lengths.tolist() == [min(keep.budget, n) for n in lengths]
    for g, count in enumerate(one.lengths.tolist()):
        assert torch.equal(one.positions(count)[g], other.positions(count)[g])
        assert torch.equal(one.extent[:, g, :count], other.extent[:, g, :count])
        assert torch.equal(
            sums[0][g, : lengths[g]].nan_to_num(-1.0), sums[1][g, : lengths[g]].nan_to_num(-1.0)
        )
