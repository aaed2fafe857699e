"""Magnitude and Wanda: which weights go, the masks beside them, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from axicon.compress import prune
from axicon.compress.calibration import Calibration
from axicon.compress.magnitude import Magnitude
from axicon.compress.moments import Squares
from axicon.compress.walk import compress
from axicon.compress.wanda import Wanda
from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.masks import kept
from axicon.model.shape import ModelShape
from tests.compress.cases import correlated, error

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0)))
PRODUCTS = ("qkv", "out", "gate_up", "down")


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)


def masks(model: Decoder) -> dict[str, Tensor]:
    found = {name: kept(module) for name, module in model.named_modules()}
    return {name: mask for name, mask in found.items() if mask is not None}


def wanda(weight: Tensor, x: Tensor, **settings: object) -> Tensor:
    """The mask of one product, by the rule as the method applies it."""
    seen = Squares(x.shape[1])
    seen.add(x)
    return prune.kept_best(weight.abs() * seen.sum("x").sqrt(), Wanda(**settings))  # type: ignore[arg-type]


class TestHowMany:
    @pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.53, 0.9])
    def test_exactly_the_share_that_was_asked_for_of_each_output(self, sparsity: float) -> None:
        for method in (Magnitude(sparsity=sparsity, scope="row"), Wanda(sparsity=sparsity)):
            model = compress(method, decoder(), SAMPLE)
            for name, mask in masks(model).items():
                assert ((~mask).sum(1) == int(mask.shape[1] * sparsity)).all()
                weight = model.get_submodule(name).weight
                assert not weight[~mask].any()
            assert len(masks(model)) == 2 * len(PRODUCTS)

    def test_of_each_matrix_of_the_checkpoint_also_where_products_are_fused(self) -> None:
        model = decoder()
        model.blocks[0].qkv.weight[64:96] *= 100  # keys: ranked with the queries they would all stay
        mask = masks(compress(Magnitude(sparsity=0.5), model))["blocks.0.qkv"]
        for rows in (slice(0, 64), slice(64, 96), slice(96, 128)):
            assert int((~mask[rows]).sum()) == mask[rows].numel() // 2

    @pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
    def test_patterns_hold_in_every_group(self, pattern: str, sparsity: float) -> None:
        keep, group = map(int, pattern.split(":"))
        for method in (Magnitude, Wanda):
            made = method(pattern=pattern, sparsity=sparsity)
            for mask in masks(compress(made, decoder(), SAMPLE)).values():
                assert (mask.view(-1, group).sum(1) == keep).all()

    def test_equal_scores_go_from_the_left(self) -> None:
        assert prune.without_lowest(torch.ones(2, 4), 2).tolist() == [[False, False, True, True]] * 2


class TestWhich:
    def test_with_inputs_of_one_size_wanda_is_magnitude_of_rows(self) -> None:
        weight = torch.randn(8, 16)
        want = prune.kept_best(weight.abs(), Magnitude(scope="row"))
        assert torch.equal(wanda(weight, torch.ones(5, 16)), want)

    def test_wanda_keeps_a_huge_input_in_every_output_and_ignores_the_scale_of_outputs(self) -> None:
        x, weight = correlated(0)
        x[:, 7] = 1e4
        mask = wanda(weight, x)
        assert mask[:, 7].all()
        assert torch.equal(wanda(weight * torch.rand(48, 1).add(0.1), x), mask)

    def test_batches_add_up(self) -> None:
        x, _ = correlated(1)
        parts = Squares(64)
        for piece in x.split(100):
            parts.add(piece)
        whole = Squares(64)
        whole.add(x)
        assert torch.allclose(parts.sum("x"), whole.sum("x"), rtol=1e-5)

    def test_wanda_errs_less_than_half_of_magnitude_every_time(self) -> None:
        for seed in range(20):
            x, weight = correlated(seed)
            plain = weight * prune.kept_best(weight.abs(), Magnitude(scope="row"))
            assert error(x, weight, weight * wanda(weight, x)) < 0.55 * error(x, weight, plain)

    def test_inputs_come_from_pruned_blocks_and_whole_products(self) -> None:
        """The second block is shown what the pruned first one makes of the sample."""
        dense, method = decoder(), Wanda(sparsity=0.6)
        pruned = compress(method, copy.deepcopy(dense), SAMPLE)
        half = copy.deepcopy(pruned)
        half.blocks[1] = copy.deepcopy(dense.blocks[1])
        seen: list[Tensor] = []
        hook = half.blocks[1].down.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        for window in SAMPLE.tokens_WT:
            half.logits(window[None])
        hook.remove()
        want = wanda(dense.blocks[1].down.weight, torch.cat(seen), sparsity=0.6)
        assert torch.equal(masks(pruned)["blocks.1.down"], want)


class TestGoingOn:
    def test_what_is_removed_stays_removed_and_counts(self) -> None:
        once = compress(Magnitude(sparsity=0.3, scope="row"), decoder())
        before = masks(once)
        twice = masks(compress(Wanda(sparsity=0.6, continued=True), once, SAMPLE))
        for name, mask in twice.items():
            assert not (mask & ~before[name]).any()
            assert ((~mask).sum(1) == int(mask.shape[1] * 0.6)).all()

    def test_a_pruned_model_is_refused_unless_asked_for(self) -> None:
        once = compress(Magnitude(), decoder())
        with pytest.raises(AxiconError, match=r"wanda: blocks.0.qkv is pruned already \(50.0%.*continued"):
            compress(Wanda(), once, SAMPLE)


class TestRefused:
    @pytest.mark.parametrize("method", [Magnitude, Wanda])
    @pytest.mark.parametrize(("settings", "says"), [
        ({"sparsity": 1.0}, "sparsity=1: the share"),
        ({"sparsity": -0.1}, "sparsity=-0.1: the share"),
        ({"sparsity": float("nan")}, "sparsity=nan: the share"),
        ({"pattern": "4:2"}, "pattern=4:2: unstructured, or n:m"),
        ({"pattern": "two of four"}, "pattern=two of four: unstructured, or n:m"),
        ({"pattern": "1:4"}, "pattern=1:4 removes 0.75 of the weights.*set sparsity=0.75"),
        ({"rules": {"*.down": {"sparsity": 2.0}}}, "sparsity=2: the share"),
        ({"rules": {"*.down": {"scope": "row"}}}, "unknown key 'scope'"),
    ])  # fmt: skip
    def test_settings(self, method: type, settings: dict[str, object], says: str) -> None:
        with pytest.raises(AxiconError, match=says):
            method(**settings)

    def test_a_pattern_that_does_not_divide(self) -> None:
        method = Magnitude(pattern="5:10")
        with pytest.raises(AxiconError, match=r"blocks.0.qkv has 64 inputs, which groups of 10 do not"):
            compress(method, decoder())

    def test_damaged_weights(self) -> None:
        model = decoder()
        model.blocks[1].out.weight[0, 0] = torch.nan
        with pytest.raises(AxiconError, match=r"blocks.1.out holds NaN"):
            compress(Magnitude(), model)

    def test_rules_leave_products_alone(self) -> None:
        rules = {"*": "skip", "blocks.1.down": {"sparsity": 0.25}}
        found = masks(compress(Magnitude(rules=rules, scope="row"), decoder()))
        assert list(found) == ["blocks.1.down"]
        assert ((~found["blocks.1.down"]).sum(1) == 24).all()


def test_biases_and_everything_else_stay() -> None:
    dense = decoder()
    pruned = compress(Wanda(), copy.deepcopy(dense), SAMPLE)
    products = {f"blocks.{i}.{name}.weight" for i in range(2) for name in PRODUCTS}
    state = pruned.state_dict()
    same = {name for name, value in dense.state_dict().items() if torch.equal(value, state[name])}
    assert dense.state_dict().keys() - same == products
    assert isinstance(pruned.blocks[0].qkv, nn.Linear)
