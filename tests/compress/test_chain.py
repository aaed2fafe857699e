"""Several methods on each block: what a later one sees and keeps, and which orders are refused."""

from __future__ import annotations

import copy

import pytest
import torch

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration
from axicon.compress.chain import STAGES, Chain
from axicon.compress.walk import compress
from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.masks import kept
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 128,
    "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
SAMPLE = Calibration(torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0)))
PACKERS = [name for name, cls in COMPRESSORS.items() if getattr(cls, "stage", "pack") == "pack"]


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelShape.from_config(CONFIG)).requires_grad_(False)


def chain(*names: str) -> Chain:
    return Chain(names, tuple(COMPRESSORS[name]() for name in names))


@pytest.mark.parametrize("packer", [name for name in PACKERS if name != "binary_code"])
def test_what_is_pruned_stays_0_when_it_is_packed(packer: str) -> None:
    pruned = compress(COMPRESSORS["wanda"](), decoder(), SAMPLE)
    packed = compress(COMPRESSORS[packer](), copy.deepcopy(pruned), SAMPLE)
    for name, module in pruned.blocks.named_modules():
        mask = kept(module)
        if mask is not None:
            one = packed.blocks.get_submodule(name)
            assert isinstance(one, PackedLinear)
            assert not one.unpack()[~mask].any()
            assert "mask" not in dict(one.named_buffers())


def test_gptq_in_act_order_keeps_zeros_too() -> None:
    pruned = compress(COMPRESSORS["magnitude"](), decoder())
    for static in (True, False):
        method = COMPRESSORS["gptq"](group=32, bits=3, act_order=True, static_groups=static)
        packed = compress(method, copy.deepcopy(pruned), SAMPLE)
        mask = kept(pruned.blocks[1].down)
        assert mask is not None
        assert not packed.blocks[1].down.unpack()[~mask].any()


def test_binary_codes_have_no_zero() -> None:
    pruned = compress(COMPRESSORS["magnitude"](), decoder())
    with pytest.raises(AxiconError, match=r"blocks.0.qkv is pruned, and levels of binary codes have no 0"):
        compress(COMPRESSORS["binary_code"](), pruned)


def test_a_block_goes_through_all_methods_before_the_next_is_seen() -> None:
    """Method after method for the first block; the second one is shown what comes out of both."""
    both = compress(chain("wanda", "gptq"), decoder(), SAMPLE)
    wanda, gptq = COMPRESSORS["wanda"](), COMPRESSORS["gptq"]()
    slow = decoder()
    positions = torch.arange(32)
    states = [slow.embed(window, positions)[None] for window in SAMPLE.tokens_WT]
    for block in slow.blocks:
        wanda.block(block, states)
        states = list(gptq.block(block, states))
    for name, value in slow.blocks.state_dict().items():
        assert torch.equal(both.blocks.state_dict()[name], value)


def test_methods_without_data_hand_on_what_they_make() -> None:
    both = compress(chain("wanda", "group_int4"), decoder(), SAMPLE)
    alone = compress(COMPRESSORS["group_int4"](), compress(COMPRESSORS["wanda"](), decoder(), SAMPLE))
    assert torch.equal(both.blocks[0].down.unpack(), alone.blocks[0].down.unpack())
    assert not torch.equal(both.blocks[1].down.unpack(), alone.blocks[1].down.unpack())


def test_every_method_has_a_place() -> None:
    for cls in COMPRESSORS.values():
        assert getattr(cls, "stage", "pack") in STAGES


@pytest.mark.parametrize(("names", "says"), [
    (("gptq", "wanda"), "wanda behind gptq would have to prune weights that are packed; the order is"),
    (("magnitude", "llm_int8", "sparse_gpt"), "the order is magnitude, sparse_gpt, llm_int8"),
    (("wanda", "awq", "gptq"), "awq and gptq both pack the weights; keep one"),
    (("reconstruct", "wanda"), "would prune what was repaired, .* the order is wanda, reconstruct"),
    (("magnitude", "gptq", "reconstruct"), "repair weights that are packed; the order is magnitude, rec"),
    (("wanda", "slice_gpt", "reconstruct"), "fill what was pruned; the order is slice_gpt, wanda, recon"),
    (("reconstruct", "gptq"), "put it behind the pruning, as chain=wanda,reconstruct; a model that is"),
])  # fmt: skip
def test_orders_that_destroy_are_refused_with_the_right_one(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        chain(*names)
