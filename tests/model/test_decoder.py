"""What the decoder promises beyond parity: shapes that compression needs, stages, and rows that do not mix.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from axicon.model.attention import causal_mask, dense_attention, reference_attention
from axicon.model.decoder import Decoder, Norm, inverse_frequencies, rotary, rotate
from axicon.model.shape import ModelShape, Rope

SHAPE = ModelShape.from_config({
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
})
TOKENS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def decoder(shape: ModelShape = SHAPE) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape).eval().requires_grad_(False)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_dense_attention_equals_the_reference(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 20, 6, 8), torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2, 8)
    fast = dense_attention(q, k, v, 0.3, window)
    mask = causal_mask(20, window)
    for b in range(2):
        torch.testing.assert_close(fast[b], reference_attention(q[b], k[b], v[b], mask, 0.3))


def test_the_mask_is_what_the_window_says() -> None:
    assert causal_mask(4, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert causal_mask(3, None).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_rotation_by_hand() -> None:
    """Pair (i, i + K/2) turns by position * theta^(-2i/K)."""
    frequencies = inverse_frequencies(Rope(theta=100.0), head_width=4)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    y = rotate(x, rotary(torch.tensor([5]), frequencies, torch.float32))[0, 0]
    for i, angle in enumerate([5.0, 0.5]):
        pair = torch.view_as_complex(torch.stack([x[0, 0, i], x[0, 0, i + 2]]))
        turned = pair * torch.polar(torch.tensor(1.0), torch.tensor(angle))
        torch.testing.assert_close(torch.view_as_complex(torch.stack([y[i], y[i + 2]])), turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_rotations_of_a_row_do_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Bit for bit: the promise of equal answers in any batch rests on it."""
    torch.manual_seed(0)
    frequencies = inverse_frequencies(Rope(), head_width=64)
    x, positions = torch.randn(64, 12, 64, dtype=dtype), torch.randint(0, 100_000, (64,))
    norms = [Norm(kind, 576, 1e-5).to(dtype) for kind in ("rms", "layer")]
    rows = torch.randn(64, 576, dtype=dtype)
    for n in (1, 2, 3, 5, 8, 16, 17, 33):
        alone = rotate(x[:n], rotary(positions[:n], frequencies, dtype))
        assert torch.equal(alone, rotate(x, rotary(positions, frequencies, dtype))[:n])
        for norm in norms:
            assert torch.equal(norm(rows[:n]), norm(rows)[:n])


def test_a_norm_over_deleted_channels_keeps_the_original_divisor() -> None:
    """Deleting channels that are zero changes nothing (SliceGPT): the mean still divides by the old width."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 12), torch.randn(12)
    x[:, 8:] = 0
    sliced = Norm("rms", 8, 1e-3, divisor=12)
    sliced.weight = torch.nn.Parameter(weight[:8])
    torch.testing.assert_close(sliced(x[:, :8]), F.rms_norm(x, (12,), weight, 1e-3)[:, :8])
    with pytest.raises(ValueError, match="layer norm over 8 channels"):
        Norm("layer", 8, 1e-5, divisor=12)


def test_identity_shortcuts_and_widths_change_nothing() -> None:
    """The same function with a matrix on every shortcut, as a sliced model has."""
    plain = decoder()
    blocks = tuple(replace(b, attention_shortcut=True, mlp_shortcut=True) for b in SHAPE.blocks)
    turned = Decoder(replace(SHAPE, blocks=blocks)).requires_grad_(False)
    missing = turned.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 6
    for name in missing:
        turned.get_parameter(name).copy_(torch.eye(48))
    torch.testing.assert_close(turned.logits(TOKENS), plain.logits(TOKENS))


def test_a_sliced_model_equals_its_dense_original() -> None:
    """Channels that stay zero everywhere are deleted: narrower stream, original divisor, same logits."""
    keep = 40
    dense = decoder()
    for name, p in dense.named_parameters():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and name.startswith("embed"):
            p[:, keep:] = 0
        if name.endswith(("out.weight", "down.weight")):
            p[keep:] = 0
    blocks = tuple(replace(b, width_in=keep, width_middle=keep, width_out=keep) for b in SHAPE.blocks)
    narrow = Decoder(replace(SHAPE, blocks=blocks, embedding_width=keep, head_width=keep))
    narrow.requires_grad_(False)
    for name, p in narrow.named_parameters():
        p.copy_(dense.get_parameter(name)[tuple(slice(n) for n in p.shape)])
    torch.testing.assert_close(narrow.logits(TOKENS), dense.logits(TOKENS))


def test_each_block_may_have_its_own_widths() -> None:
    first, second, third = SHAPE.blocks
    blocks = (
        replace(first, width_middle=40, width_out=36, attention_shortcut=True, mlp_shortcut=True, hidden=70),
        replace(second, width_in=36, width_middle=36, width_out=36),
        replace(third, width_in=36, width_middle=36, width_out=32, mlp_shortcut=True, heads=4),
    )
    model = decoder(replace(SHAPE, blocks=blocks, norm_width=48))
    assert model.project_out is not None
    assert model.project_out.weight.shape == (48, 32)
    assert model.logits(TOKENS).shape == (2, 40, 97)


def test_a_linear_layer_may_be_replaced_by_anything_that_multiplies() -> None:
    class Doubled(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * 0.5) * 2

    plain, packed = decoder(), decoder()
    for block in packed.blocks:
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(block, name, Doubled(getattr(block, name)))
    packed.lm_head = Doubled(packed.lm_head)
    torch.testing.assert_close(packed.logits(TOKENS), plain.logits(TOKENS))


def test_sequences_of_a_batch_do_not_mix_and_the_future_is_unseen() -> None:
    model = decoder()
    whole = model.logits(TOKENS)
    torch.testing.assert_close(model.logits(TOKENS[:1])[0], whole[0])
    torch.testing.assert_close(model.logits(TOKENS[:, :11]), whole[:, :11])


def test_wrong_ranges_and_lengths_are_refused() -> None:
    for blocks in (range(0), range(2, 4), range(-1, 2), range(0, 3, 2)):
        with pytest.raises(ValueError, match="not a range of the model's 3 blocks"):
            Decoder(SHAPE, blocks)
    with pytest.raises(ValueError, match="65 tokens, the model knows 64"):
        decoder().logits(torch.zeros(1, 65, dtype=torch.long))


def test_a_stage_without_the_first_block_names_its_blocks_by_their_place_in_the_model() -> None:
    stage = Decoder(SHAPE, range(1, 3))
    assert [block.index for block in stage.blocks] == [1, 2]
    assert (stage.first, stage.last, stage.has_embedding, stage.has_head) == (1, 3, False, True)
