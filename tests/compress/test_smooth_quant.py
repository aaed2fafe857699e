"""SmoothQuant: the equation of its scales, its limits, and what it does for a layer with an outlier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from axicon.compress.calibration import Calibration, embedded, observe, sequences
from axicon.compress.scaling import Pair
from axicon.compress.smooth_quant import SmoothQuant
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.int8 import Int8Linear
from axicon.model.shape import ModelShape

NORM = Pair("attention_norm", "qkv")


def layer(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(256, 64, generator=made), torch.randn(48, 64, generator=made)
    x[:, 9] *= 100
    return x, weight


class TestScales:
    def test_half_makes_inputs_and_weights_equal(self) -> None:
        x, weight = layer(0)
        a, w = x.abs().amax(0), weight.abs().amax(0)
        scale = SmoothQuant(alpha=0.5).scales(NORM, a, weight)
        assert torch.allclose((x / scale).abs().amax(0), (a * w).sqrt(), rtol=1e-5)
        assert torch.allclose((weight * scale).abs().amax(0), (a * w).sqrt(), rtol=1e-5)

    def test_the_ends(self) -> None:
        x, weight = layer(1)
        a = x.abs().amax(0)
        all_of_it = SmoothQuant(alpha=1.0).scales(NORM, a, weight)
        none_of_it = SmoothQuant(alpha=0.0).scales(NORM, a, weight)
        assert torch.allclose((x / all_of_it).abs().amax(0), torch.ones(64))
        assert torch.allclose((weight * none_of_it).abs().amax(0), torch.ones(64))

    def test_channels_without_inputs_or_weights(self) -> None:
        x, weight = layer(2)
        x[:, 3], weight[:, 4] = 0, 0
        scale = SmoothQuant().scales(NORM, x.abs().amax(0), weight)
        assert scale.isfinite().all()
        assert 0 < scale[3] < 2
        assert scale[4] == pytest.approx((float(x[:, 4].abs().max()) / 1e-5) ** 0.5, rel=1e-5)

    def test_an_outlier_costs_a_third_at_most(self) -> None:
        for seed in range(5):
            x, weight = layer(seed)
            scale = SmoothQuant().scales(NORM, x.abs().amax(0), weight)
            plain, smooth = (nn.Linear(64, 48, bias=False).requires_grad_(False) for _ in range(2))
            plain.weight.copy_(weight)
            smooth.weight.copy_(weight * scale)
            want = x @ weight.T
            before = Int8Linear.from_linear(plain, threshold=0.0)(x) - want
            after = Int8Linear.from_linear(smooth, threshold=0.0)(x / scale) - want
            assert after.norm() < before.norm() / 3


CONFIG = {"vocab_size": 90, "num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 64}
CONFIGS = {
    "llama": CONFIG | {"model_type": "llama", "intermediate_size": 96, "num_attention_heads": 4,
                       "num_key_value_heads": 2},
    "opt": CONFIG | {"model_type": "opt", "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(1)))


def decoder(family: str, loud: float = 200) -> Decoder:
    """With one loud channel behind each norm."""
    torch.manual_seed(0)
    model = Decoder(ModelShape.from_config(CONFIGS[family])).requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        for norm in (block.attention_norm, block.mlp_norm):
            assert norm.weight is not None
            norm.weight[5] *= loud
    return model


def error(model: Decoder, dense: Decoder) -> float:
    x = next(iter(embedded(dense, SAMPLE.tokens_WT)))
    want = sequences(dense.blocks[0], x)
    return float((sequences(model.blocks[0], x) - want).norm() / want.norm())


def largest_inputs(block: Block, name: str) -> Tensor:
    seen = []
    observe(block, list(embedded(decoder_of(block), SAMPLE.tokens_WT)), {name: seen.append})
    return torch.cat(seen).abs().amax(0)


def decoder_of(block: Block) -> Decoder:
    return decoder("llama" if block.gated else "opt")


@pytest.mark.parametrize("family", CONFIGS)
class TestInAModel:
    def test_what_products_see_is_smooth(self, family: str) -> None:
        dense, got = decoder(family).blocks[0], compress(SmoothQuant(), decoder(family), SAMPLE).blocks[0]
        for name in ("qkv", "gate_up" if family == "llama" else "up"):
            before, after = largest_inputs(dense, name), largest_inputs(got, name)
            weight = getattr(got, name).unpack().abs().amax(0)
            assert before.argmax() == 5
            assert before.max() > 50 * before.median()
            # Weights and inputs are as large as each other, but for int8 and the product before.
            assert torch.allclose(after, weight, rtol=0.15, atol=0.02)

    def test_it_errs_less_than_int8_alone(self, family: str) -> None:
        dense = decoder(family)
        plain = decoder(family)
        for name, module in list(plain.blocks[0].named_children()):
            if isinstance(module, nn.Linear):
                setattr(plain.blocks[0], name, Int8Linear.from_linear(module, threshold=0.0))
        assert error(compress(SmoothQuant(), decoder(family), SAMPLE), dense) < error(plain, dense) / 2

    def test_all_pairs(self, family: str) -> None:
        """With a loud channel in the values and in the MLP."""
        errors = []
        for pairs in ("norms", "all"):
            dense, model = decoder(family, loud=1), decoder(family, loud=1)
            for block in (dense.blocks[0], model.blocks[0]):
                block.qkv.weight[-1] *= 100
                (block.gate_up if family == "llama" else block.up).weight[-1] *= 100
            errors.append(error(compress(SmoothQuant(pairs=pairs), model, SAMPLE), dense))
        assert errors[1] < errors[0] / 1.5

    def test_what_stays_dense_stays_as_it_is(self, family: str) -> None:
        dense = decoder(family).blocks[0]
        got = compress(SmoothQuant(rules={"*.qkv": "skip"}), decoder(family), SAMPLE).blocks[0]
        assert torch.equal(got.qkv.weight, dense.qkv.weight)
        assert torch.equal(got.attention_norm.weight, dense.attention_norm.weight)
        assert not torch.equal(got.mlp_norm.weight, dense.mlp_norm.weight)

    def test_rules_and_outliers(self, family: str) -> None:
        rules = {"*.down": {"relative": 5.0}}
        got = compress(SmoothQuant(rules=rules), decoder(family), SAMPLE).blocks[1]
        assert (got.down.relative, got.out.relative, got.down.threshold) == (5.0, 0.0, 0.0)

    def test_biases_have_the_dtype_of_the_model(self, family: str) -> None:
        model = compress(SmoothQuant(pairs="all"), decoder(family).bfloat16(), SAMPLE)
        for module in model.modules():
            if isinstance(module, Int8Linear) and module.bias is not None:
                assert module.bias.dtype == torch.bfloat16
        assert model.blocks[0].attention_norm.weight.dtype == torch.bfloat16

    def test_inputs_that_are_no_numbers_name_the_product(self, family: str) -> None:
        sample = [torch.full((1, 8, 64), torch.nan)]
        said = r"smooth_quant: blocks\.0\.qkv: its inputs hold NaN or infinite values"
        with pytest.raises(AxiconError, match=said):
            SmoothQuant().block(decoder(family).blocks[0], sample)


def test_norms_behind_the_sum_are_refused() -> None:
    model = Decoder(ModelShape.from_config(CONFIGS["opt"] | {"do_layer_norm_before": False}))
    with pytest.raises(AxiconError, match="smooth_quant: the norms of this model follow the residual sum"):
        compress(SmoothQuant(), model.requires_grad_(False), SAMPLE)


@pytest.mark.parametrize(("settings", "says"), [
    ({"alpha": 1.5}, r"alpha=1\.5: must be from 0 to 1"), ({"relative": -1.0}, "is negative"),
    ({"rules": {"*": {"alpha": 2.0}}}, "must be from 0 to 1"), ({"rules": {"*": {"bits": 4}}}, "known are a"),
])  # fmt: skip
def test_settings_out_of_range(settings: dict[str, float], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        SmoothQuant(**settings)
