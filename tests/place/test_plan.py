"""Plans: balanced by weights, and refused where a stage would be empty."""

from __future__ import annotations

import itertools
import random

import pytest

from axicon.errors import AxiconError
from axicon.model.decoder import Decoder
from axicon.model.shape import ModelShape
from axicon.place import Plan, Stage, balanced
from axicon.place.plan import _split


def shape(**config: object) -> ModelShape:
    return ModelShape.from_config(
        {
            "model_type": "llama", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "tie_word_embeddings": False, **config,
        }
    )  # fmt: skip


def held(model: ModelShape, stage: Stage) -> int:
    return sum(p.numel() for p in Decoder(model, stage.blocks).parameters())


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
@pytest.mark.parametrize(("vocab", "tied"), [(96, False), (4000, False), (4000, True)])
def test_no_other_split_has_a_smaller_largest_stage(vocab: int, tied: bool, stages: int) -> None:
    model = shape(vocab_size=vocab, tie_word_embeddings=tied)
    plan = balanced(model, stages)
    assert len(plan) == stages
    assert plan.layers == model.layers
    cuts = itertools.combinations(range(1, model.layers), stages - 1)
    splits = [[Stage(a, b) for a, b in itertools.pairwise([0, *cut, model.layers])] for cut in cuts]
    largest = [max(held(model, stage) for stage in split) for split in splits]
    assert max(held(model, stage) for stage in plan.stages) == min(largest)


def test_embedding_and_head_push_the_cut_away() -> None:
    assert str(balanced(shape(vocab_size=32), 2)) == "2x1: 0-2, 3-5"
    opt = ModelShape.from_config({
        "model_type": "opt", "vocab_size": 50, "hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 4,
        "num_attention_heads": 6, "max_position_embeddings": 4000, "word_embed_proj_dim": 48,
    })  # fmt: skip
    assert str(balanced(opt, 2)) == "2x1: 0-0, 1-3"


def test_many_blocks_are_cut_in_no_time() -> None:
    weights = tuple(random.Random(1).randrange(1, 100) for _ in range(200))
    stages = _split(weights, 12)
    assert (stages[0].first, stages[-1].last, len(stages)) == (0, 200, 12)
    largest = max(sum(weights[stage.first : stage.last]) for stage in stages)
    assert largest < sum(weights) / 12 + max(weights)


@pytest.mark.parametrize("stages", [0, 7])
def test_more_stages_than_blocks_are_refused_with_a_sentence(stages: int) -> None:
    with pytest.raises(AxiconError, match=rf"{stages} stages for a model of 6 blocks.*ask for 1 to 6"):
        balanced(shape(), stages)


@pytest.mark.parametrize("ends", [[], [(1, 3)], [(0, 2), (3, 4)], [(0, 2), (2, 2)], [(0, 2), (1, 4)]])
def test_a_plan_has_no_gap_and_no_empty_stage(ends: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="in a row"):
        Plan(tuple(Stage(*pair) for pair in ends))
