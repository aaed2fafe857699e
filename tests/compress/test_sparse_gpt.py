"""SparseGPT against what is known of its result, against Wanda and magnitude, and at its edges."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor

from axicon.compress.calibration import Calibration
from axicon.compress.magnitude import Magnitude
from axicon.compress.prune import kept_best
from axicon.compress.sparse_gpt import SparseGPT
from axicon.compress.walk import compress
from axicon.compress.wanda import Wanda
from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.masks import kept
from axicon.model.shape import ModelShape
from tests.compress.cases import correlated, error, hessian

CONFIG = {
    "model_type": "opt", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 64, "ffn_dim": 96,
    "num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0)))


def refit(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The least squares of each output over its kept columns."""
    h, best = x.T @ x, torch.zeros_like(weight)
    for o, keep in enumerate(mask):
        best[o, keep] = torch.linalg.solve(h[keep][:, keep], (h @ weight[o])[keep])
    return best


def slowly(weight: Tensor, h: Tensor, sparsity: float, damping: float, width: int) -> Tensor:
    """Algorithm 1 column after column, with the inverse of what is left of H, in float64."""
    h = h.double() + damping * h.diagonal().mean() * torch.eye(len(h))
    w, size = weight.double().clone(), len(h)
    inverses = [h[j:, j:].inverse() for j in range(size)]
    saliency = torch.stack([inverse[0, 0] for inverse in inverses])
    for start in range(0, size, width):
        piece = slice(start, start + width)
        score = w[:, piece].square() / saliency[piece]
        gone = torch.zeros_like(score, dtype=torch.bool).flatten()
        gone[score.flatten().argsort()[: int(score.numel() * sparsity)]] = True
        for j, column in zip(range(start, start + width), gone.view_as(score).T, strict=True):
            error = w[:, j].masked_fill(~column, 0) / saliency[j]
            w[:, j:] -= error[:, None] * inverses[j][0]
            w[column, j] = 0
    return w


class TestAgainstTheOthers:
    @pytest.mark.parametrize(("pattern", "share"), [("unstructured", 0.2), ("2:4", 0.3)])
    def test_it_errs_less_every_time(self, pattern: str, share: float) -> None:
        for seed in range(20):
            x, weight = correlated(seed)
            got, _ = SparseGPT(pattern=pattern, block_size=32).pruned(weight, hessian(x))
            norm = x.square().sum(0).sqrt()
            plain = weight * kept_best(weight.abs(), Magnitude(pattern=pattern, scope="row"))
            wanda = weight * kept_best(weight.abs() * norm, Wanda(pattern=pattern))
            ours, second, last = (error(x, weight, one) for one in (got, wanda, plain))
            assert ours < 0.6 * second
            assert ours < share * last

    def test_least_squares_over_the_same_mask_is_little_better(self) -> None:
        for seed in range(5):
            x, weight = (one.double() for one in correlated(seed))
            got, mask = SparseGPT(damping=0.0, block_size=32).pruned(weight, 2 * x.T @ x / len(x))
            best, found = error(x, weight, refit(x, weight, mask)), error(x, weight, got)
            assert best <= found * (1 + 1e-9)
            assert found < 3 * best  # the order of the columns is fixed, and their scales differ much here

    @pytest.mark.parametrize("width", [8, 32])
    def test_it_is_the_papers_recursion(self, width: int) -> None:
        x, weight = correlated(9)
        method = SparseGPT(sparsity=0.5, block_size=width)
        got, _ = method.pruned(weight.double(), hessian(x).double())
        torch.testing.assert_close(got, slowly(weight, hessian(x), 0.5, 0.01, width), rtol=1e-6, atol=1e-6)

    def test_with_a_diagonal_hessian_nothing_is_made_good_and_the_choice_is_wandas(self) -> None:
        _, weight = correlated(0)
        size = torch.linspace(1, 5, 64)
        got, mask = SparseGPT(block_size=16, damping=0.0).pruned(weight, size.diag())
        assert torch.equal(got, weight * mask)
        score = weight.square() * size
        want = torch.cat([p > p.flatten().sort().values[p.numel() // 2 - 1] for p in score.split(16, 1)], 1)
        assert torch.equal(mask, want)


class TestClosedForms:
    def test_an_empty_mask_changes_nothing(self) -> None:
        x, weight = correlated(1)
        got, mask = SparseGPT(sparsity=0.0).pruned(weight, hessian(x))
        assert torch.equal(got, weight)
        assert mask.all()

    def test_without_the_first_column_the_others_are_refitted(self) -> None:
        x, weight = (one.double() for one in correlated(2))
        mask = torch.ones(48, 64, dtype=torch.bool)
        mask[:, 0] = False
        method = SparseGPT(sparsity=0.0, damping=0.0, block_size=7, continued=True)
        got, found = method.pruned(weight, 2 * x.T @ x / len(x), before_OI=mask)
        assert torch.equal(found, mask)
        torch.testing.assert_close(got, refit(x, weight, mask), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("block_size", [1, 5, 64, 128])
    def test_counts_are_exact_for_any_pieces(self, block_size: int) -> None:
        x, weight = correlated(3)
        parts = [slice(0, 31), slice(31, 48)]
        _, mask = SparseGPT(sparsity=0.37, block_size=block_size).pruned(weight, hessian(x), parts)
        for rows in parts:
            assert int((~mask[rows]).sum()) == int(mask[rows].numel() * 0.37)

    @pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
    def test_patterns_hold_in_every_group(self, pattern: str, sparsity: float) -> None:
        x, weight = correlated(4)
        method = SparseGPT(pattern=pattern, sparsity=sparsity, block_size=16)
        got, mask = method.pruned(weight, hessian(x))
        keep, group = map(int, pattern.split(":"))
        assert (mask.view(-1, group).sum(1) == keep).all()
        assert not got[~mask].any()

    def test_groups_are_chosen_from_weights_with_all_updates_in_them(self) -> None:
        """The same for any pieces: only when updates are made differs."""
        x, weight = correlated(5)
        masks = [
            SparseGPT(pattern="2:4", block_size=size).pruned(weight.double(), hessian(x).double())[1]
            for size in (4, 16, 64)
        ]
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[0], masks[2])
        plain = SparseGPT(pattern="2:4").pruned(weight.double(), hessian(x).double().diagonal().diag())[1]
        assert not torch.equal(masks[0], plain)


class TestEdges:
    def test_dead_inputs_go_and_change_nothing(self) -> None:
        x, weight = correlated(6)
        x[:, [3, 40]] = 0
        got, _ = SparseGPT(block_size=32).pruned(weight, hessian(x))
        assert got.isfinite().all()
        assert not got[:, [3, 40]].any()

    def test_a_sample_seen_twice_changes_nothing(self) -> None:
        x, weight = correlated(7)
        once, _ = SparseGPT().pruned(weight, hessian(x))
        twice, _ = SparseGPT().pruned(weight, hessian(torch.cat([x, x])))
        torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-4)

    def test_inputs_that_leave_h_singular_end_as_wanda_and_are_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, weight = correlated(8)
        broken = torch.full((64, 64), -1.0).fill_diagonal_(1.0)
        with caplog.at_level(logging.WARNING, "axicon"):
            got, mask = SparseGPT().pruned(weight, broken, name="blocks.3.down")
        assert "blocks.3.down is pruned as by wanda" in caplog.text
        assert torch.equal(got, weight * mask)

    def test_going_on_keeps_what_is_removed(self) -> None:
        torch.manual_seed(0)
        model = Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)
        once = compress(Wanda(sparsity=0.3), copy.deepcopy(model), SAMPLE)
        before = {n: kept(m) for n, m in once.named_modules() if kept(m) is not None}
        twice = compress(SparseGPT(sparsity=0.5, continued=True, block_size=24), once, SAMPLE)
        for name, mask in before.items():
            now = kept(twice.get_submodule(name))
            assert now is not None
            assert mask is not None
            assert not (now & ~mask).any()
            assert float((~now).double().mean()) == pytest.approx(0.5, abs=0.005)
            assert not twice.get_submodule(name).weight[~now].any()

    @pytest.mark.parametrize(("settings", "says"), [
        ({"sparsity": 1.5}, "sparsity=1.5: the share"),
        ({"damping": -1.0}, "damping=-1.0 and block_size=128"),
        ({"pattern": "2:4", "block_size": 6}, "groups do not divide block_size=6"),
    ])  # fmt: skip
    def test_settings_refused(self, settings: dict[str, object], says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            SparseGPT(**settings)  # type: ignore[arg-type]
