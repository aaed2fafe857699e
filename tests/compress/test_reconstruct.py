"""Block reconstruction: its targets, what it changes, and that no block becomes worse."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axicon.compress import COMPRESSORS
from axicon.compress.calibration import Calibration, embedded, sequences
from axicon.compress.chain import Chain
from axicon.compress.reconstruct import Reconstruct, mean_squared_error
from axicon.compress.walk import compress, step
from axicon.errors import AxiconError
from axicon.model.decoder import Block
from axicon.model.masks import kept
from tests.finetune.small import LLAMA, OPT, decoder

SAMPLE = Calibration(torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
QUICK = Reconstruct(r=4, alpha=8, lr=5e-3, passes=6)


def chain(repair: Reconstruct, pruner: str = "magnitude", **settings: Any) -> Chain:
    return Chain((pruner, "reconstruct"), (COMPRESSORS[pruner](**settings), repair))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask for name, m in model.named_modules() if (mask := kept(m)) is not None}


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize(("pruner", "pattern"), [("magnitude", "unstructured"), ("wanda", "2:4")])
def test_every_block_is_nearer_to_the_dense_one(pruner: str, pattern: str, config: dict[str, Any]) -> None:
    dense, repaired = decoder(config), decoder(config)
    _, errors = step(chain(QUICK, pruner, pattern=pattern), repaired, (), SAMPLE)
    assert len(errors) == 2
    pruned = compress(COMPRESSORS[pruner](pattern=pattern), decoder(config), SAMPLE)
    states = list(embedded(dense, SAMPLE.tokens_WT))
    for block, small, was in zip(repaired.blocks, pruned.blocks, dense.blocks, strict=True):
        assert isinstance(block, Block)
        assert isinstance(small, Block)
        assert isinstance(was, Block)
        # The mask of a later block by wanda depends on what the blocks before it hand on.
        if pruner == "magnitude" or block.index == 0:
            assert mean_squared_error(block, was, states) < 0.9 * mean_squared_error(small, was, states)
        states = [sequences(block, x) for x in states]


@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune", "scale_lora", None])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_stay(pattern: str, kind: Any) -> None:
    pruned = compress(COMPRESSORS["magnitude"](pattern=pattern), decoder())
    repair = Reconstruct(adapters=kind, r=2, alpha=2, passes=2)
    repaired = compress(chain(repair, pattern=pattern), decoder(), SAMPLE)
    want, got = masks(pruned), masks(repaired)
    assert got.keys() == want.keys()
    for name, mask in want.items():
        assert torch.equal(got[name], mask)
        weight = repaired.get_parameter(f"{name}.weight")
        assert not weight[~mask].any()
        assert torch.equal(weight, pruned.get_parameter(f"{name}.weight")) == (kind is None)
    assert repaired.state_dict().keys() == pruned.state_dict().keys()
    assert not any(p.requires_grad for p in repaired.parameters())
    for name in ("embed_tokens.weight", "final_norm.weight"):
        assert torch.equal(repaired.get_parameter(name), pruned.get_parameter(name))


def test_the_target_is_the_dense_block_on_the_inputs_it_gets_now() -> None:
    """By hand: the second block is shown what the first, repaired, makes, and so is its dense self."""
    together = compress(chain(QUICK), decoder(), SAMPLE)
    model, states = decoder(), list(embedded(decoder(), SAMPLE.tokens_WT))
    for block in model.blocks:
        assert isinstance(block, Block)
        dense = copy.deepcopy(block)
        COMPRESSORS["magnitude"]().block(block, ())
        repair = copy.deepcopy(QUICK)
        repair.remember(dense)
        repair.block(block, states)
        states = [sequences(block, x) for x in states]
    for name, p in together.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    other = compress(chain(QUICK), decoder(), Calibration(SAMPLE.tokens_WT, dense=True))
    names = [name for name, p in together.named_parameters() if not torch.equal(p, other.get_parameter(name))]
    assert names
    assert all(name.startswith("blocks.1.") for name in names)


def test_a_block_that_became_worse_stays_as_it_was_pruned(caplog: pytest.LogCaptureFixture) -> None:
    pruned = compress(COMPRESSORS["magnitude"](), decoder())
    with caplog.at_level(logging.WARNING, "axicon"):
        ruined = compress(chain(Reconstruct(lr=20.0, passes=1)), decoder(), SAMPLE)
    assert "blocks.0 stays as it was pruned" in caplog.text
    assert all(torch.equal(p, ruined.get_parameter(name)) for name, p in pruned.named_parameters())


def test_equal_seeds_make_equal_bits_and_a_block_left_dense_is_left_alone() -> None:
    rules = {"blocks.0.*": "skip"}
    first, second = (compress(chain(QUICK, rules=rules), decoder(), SAMPLE) for _ in range(2))
    assert all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())
    dense = decoder().blocks[0]
    assert all(torch.equal(p, first.blocks[0].get_parameter(n)) for n, p in dense.named_parameters())
    assert masks(first)


def test_it_follows_what_slices_and_what_packs_follows_it() -> None:
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    steps = {
        "slice_gpt": COMPRESSORS["slice_gpt"](fraction=0.25, max_size_ratio=2.0),  # type: ignore[call-arg]
        "magnitude": COMPRESSORS["magnitude"](), "reconstruct": QUICK,
        "tiled_sparse": COMPRESSORS["tiled_sparse"](),
    }  # fmt: skip
    model = compress(Chain(tuple(steps), tuple(steps.values())), decoder(config), SAMPLE)
    assert model.shape.blocks[0].width_in == 48
    alone = compress(Chain(tuple(steps)[:3], tuple(steps.values())[:3]), decoder(config), SAMPLE)
    tokens = SAMPLE.tokens_WT[:2]
    torch.testing.assert_close(model.logits(tokens), alone.logits(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("settings", "says"), [
    ({"lr": 0}, "lr more than 0"), ({"passes": 0}, "passes and batch at least 1"),
    ({"train": ("head",)}, "the head is in no block"), ({"r": 0}, "reconstruct: r and alpha"),
])  # fmt: skip
def test_settings_that_mean_nothing(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        Reconstruct(**settings)


def test_alone_it_has_nothing_to_go_back_to() -> None:
    with pytest.raises(AxiconError, match="put it behind the pruning, as chain=wanda,reconstruct"):
        compress(Reconstruct(), decoder(), SAMPLE)
    with pytest.raises(AxiconError, match=r"blocks\.0 has nothing that trains: no biases"):
        compress(chain(Reconstruct(train=("biases",), adapters=None)), decoder(), SAMPLE)
