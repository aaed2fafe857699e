"""AWQ against plain rounding, against the released code's loops done slowly, and in models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from axicon.compress.awq import AWQ
from axicon.compress.calibration import Calibration, embedded, sequences
from axicon.compress.grid import Grid, groups_of
from axicon.compress.moments import GroupHessian, Magnitude
from axicon.compress.scaling import Pair
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.decoder import Block, Decoder
from axicon.model.shape import ModelShape

NORM = Pair("attention_norm", "qkv")
WHOLE = slice(0, None)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def layer(seed: int, loud: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs (N, 64), one of them 50 times as large as the others, and a weight (48, 64)."""
    made = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(512, 64, generator=made), torch.randn(48, 64, generator=made)
    if loud is not None:
        x[:, loud] *= 50
    return x, weight


def hessian(x: Tensor, group: int) -> Tensor:
    found = GroupHessian(x.shape[1], group)
    for part in x.split(200):
        found.add(part)
    return found.sum_GKK


def size(x: Tensor) -> Tensor:
    found = Magnitude(x.shape[1])
    for part in x.split(100):
        found.add(part)
    return found.mean("x")


def plain(weight: Tensor, method: AWQ) -> Tensor:
    groups = groups_of(weight, method.group)
    return Grid.fit(groups, method.bits, method.grid).round(groups).view_as(weight)


def cost(x: Tensor, weight: Tensor) -> Callable[[Tensor], float]:
    return lambda got: float((x @ (got - weight).T).square().sum())


def searched(x: Tensor, weight: Tensor, method: AWQ) -> tuple[Tensor, Tensor]:
    """Scales, and the weight that the product then stands for."""
    scale = method.search(linear(weight), NORM, size(x), cost(x, weight))
    scaled = linear(weight * scale)
    rounded = method.round(scaled, hessian(x / scale, method.group), WHOLE, torch.float32)
    return scale, rounded.unpack() / scale


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("group", [16, -1])
def test_a_loud_channel_costs_half_of_plain_rounding_at_most(group: int, clip: bool) -> None:
    method = AWQ(bits=3, group=group, clip=clip)
    for seed in range(5):
        x, weight = layer(seed, loud=7)
        scale, got = searched(x, weight, method)
        assert scale.argmax() == 7
        error = cost(x, weight)
        assert error(got) < 0.5 * error(plain(weight, method))


@pytest.mark.parametrize("bits", [3, 4])
def test_it_never_errs_more_than_plain_rounding(bits: int) -> None:
    method = AWQ(bits=bits, group=16, clip=False)
    for seed in range(10):
        x, weight = layer(seed)
        x = x * torch.randn(64, generator=torch.Generator().manual_seed(seed)).exp()
        _, got = searched(x, weight, method)
        # The stored scales are float16 in both.
        assert cost(x, weight)(got) <= 1.0001 * cost(x, weight)(plain(weight, method))


def slow_search(x: Tensor, weight: Tensor, bits: int, group: int) -> Tensor:
    """auto_scale of the released code, for one product and a grid that holds 0."""
    best, least = None, float("inf")
    for i in range(20):
        scale = x.abs().mean(0).pow(i / 20).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = plain(weight * scale, AWQ(bits=bits, group=group)) / scale
        loss = (x @ weight.T - x @ rounded.T).square().mean().item()
        if loss < least:
            best, least = scale, loss
    assert best is not None
    return best


def slow_clip(x: Tensor, weight: Tensor, bits: int, group: int) -> Tensor:
    """auto_clip of the released code over all rows, group after group of each output."""
    result = weight.clone()
    for output in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            part = weight[output, start : start + group]
            want, least = x[:, start : start + group] @ part, float("inf")
            for i in range(10):
                limit = part.abs().max() * (1 - i / 20)
                narrow = part.clamp(-limit, limit)
                rounded = Grid.fit(narrow[None], bits, "asymmetric").round(narrow[None])[0]
                loss = (x[:, start : start + group] @ rounded - want).square().mean().item()
                if loss < least:
                    result[output, start : start + group], least = narrow, loss
    return result


def test_it_is_the_released_codes_search() -> None:
    x, weight = layer(3, loud=20)
    want = slow_search(x, weight, 3, 16)
    error = cost(x, weight)
    got = AWQ(bits=3, group=16).search(linear(weight), NORM, size(x), error)
    assert torch.allclose(got, want, rtol=1e-5)


def test_moments_of_groups_and_of_scaled_inputs() -> None:
    x, _ = layer(2)
    scale = torch.rand(64) + 0.5
    found = GroupHessian(64, 16)
    found.add(x)
    found.divide(scale)
    y = x / scale
    want = torch.stack([y[:, i : i + 16].T @ y[:, i : i + 16] for i in range(0, 64, 16)])
    assert torch.allclose(found.sum_GKK, want, rtol=1e-4, atol=1e-3)
    assert hessian(x, -1).shape == (1, 64, 64)


def test_it_is_the_released_codes_clipping() -> None:
    x, weight = layer(4)
    weight = weight[:6] * weight[:6].abs()  # long tails
    want = slow_clip(x, weight, 3, 16)
    got = AWQ(bits=3, group=16).clipped(weight, hessian(x, 16))
    assert not torch.equal(got, weight)
    assert torch.equal(got, want)


def test_clipping_never_errs_more() -> None:
    for group in (8, 32):
        method = AWQ(bits=3, group=group)
        x, weight = layer(5)
        before = plain(weight, method) - weight
        after = plain(method.clipped(weight, hessian(x, group)), method) - weight
        for start in range(0, 64, group):
            part = slice(start, start + group)
            sums = [(x[:, part] @ off[:, part].T).square().sum(0) for off in (before, after)]
            assert (sums[1] <= sums[0] * 1.0001).all()
        assert (after != before).any()


def test_inputs_of_equal_size_leave_the_weight_as_it_is() -> None:
    x, weight = layer(6)
    got = AWQ(group=16).search(linear(weight), NORM, torch.full((64,), 0.3), cost(x, weight))
    assert torch.allclose(got, torch.ones(64))


CONFIG = {"vocab_size": 90, "num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 64}
CONFIGS = {
    "llama": CONFIG | {"model_type": "llama", "intermediate_size": 96, "num_attention_heads": 4,
                       "num_key_value_heads": 2},
    "opt": CONFIG | {"model_type": "opt", "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(1)))


def decoder(family: str) -> Decoder:
    """With channels of very different sizes behind the norms."""
    torch.manual_seed(0)
    model = Decoder(ModelShape.from_config(CONFIGS[family])).requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        for norm in (block.attention_norm, block.mlp_norm):
            assert norm.weight is not None
            norm.weight *= torch.randn(64).exp()
    return model


@pytest.mark.parametrize("family", CONFIGS)
class TestInAModel:
    def test_every_part_helps(self, family: str) -> None:
        """The output of the first block: plain rounding, clipping alone, and both."""
        errors = []
        x = next(iter(embedded(decoder(family), SAMPLE.tokens_WT)))
        want = sequences(decoder(family).blocks[0], x)
        for ratios, clip in ((1, False), (20, False), (20, True)):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("axicon.compress.awq.RATIOS", ratios)
                model = compress(AWQ(bits=3, group=32, clip=clip), decoder(family), SAMPLE)
            errors.append(float((sequences(model.blocks[0], x) - want).norm()))
        assert errors[1] < 0.9 * errors[0]
        assert errors[2] < errors[1]

    def test_queries_and_keys_are_not_clipped(self, family: str) -> None:
        whole, clipped = (
            compress(AWQ(bits=3, group=32, clip=clip), decoder(family), SAMPLE).blocks[0]
            for clip in (False, True)
        )
        values = whole.shape.parts("qkv")["v"]
        assert torch.equal(whole.qkv.scale[: values.start], clipped.qkv.scale[: values.start])
        assert (clipped.qkv.scale[values] < whole.qkv.scale[values]).any()

    def test_what_stays_dense_stays_as_it_is(self, family: str) -> None:
        dense = decoder(family).blocks[0]
        rules = {"*.qkv": "skip", "*.down": {"bits": 8}}
        got = compress(AWQ(bits=3, group=32, rules=rules), decoder(family), SAMPLE).blocks[0]
        assert torch.equal(got.qkv.weight, dense.qkv.weight)
        assert torch.equal(got.attention_norm.weight, dense.attention_norm.weight)
        assert not torch.equal(got.mlp_norm.weight, dense.mlp_norm.weight)
        assert (got.down.bits, got.out.bits) == (8, 3)

    def test_inputs_that_are_no_numbers_name_the_product(self, family: str) -> None:
        model = decoder(family)
        sample = [torch.full((1, 8, 64), torch.inf)]
        with pytest.raises(AxiconError, match=r"awq: blocks\.0\.qkv: its inputs hold NaN or infinite values"):
            AWQ(group=32).block(model.blocks[0], sample)

    def test_a_weight_that_is_no_number_names_the_product(self, family: str) -> None:
        model = decoder(family)
        model.blocks[1].out.weight[0, 0] = torch.nan
        with pytest.raises(AxiconError, match=r"awq: blocks\.1\.out holds NaN or infinite weights"):
            compress(AWQ(group=32), model, SAMPLE)


def test_norms_behind_the_sum_are_refused() -> None:
    config = CONFIGS["opt"] | {"do_layer_norm_before": False}
    model = Decoder(ModelShape.from_config(config)).requires_grad_(False)
    with pytest.raises(AxiconError, match="awq: the norms of this model follow the residual sum"):
        compress(AWQ(group=32), model, SAMPLE)


@pytest.mark.parametrize(("settings", "says"), [
    ({"bits": 9}, "bits=9: must be from 2 to 8"), ({"tokens": 0}, "tokens=0: must be at least 1"),
    ({"rules": {"*": {"clip": False}}}, "known are bits, group, grid"),
])  # fmt: skip
def test_settings_out_of_range(settings: dict[str, int], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        AWQ(**settings)
