"""Objectives against plain transformers, in whole padded logits and without any of our shortcuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from axicon.compress import COMPRESSORS
from axicon.data.batch import UNSCORED, Batch
from axicon.data.tokenised import Example, Row, Tokenised, collate
from axicon.errors import AxiconError
from axicon.finetune import scored as scoring
from axicon.finetune.accuracy import quality
from axicon.finetune.objectives import OBJECTIVES
from axicon.finetune.objectives.choice import Choice
from axicon.finetune.objectives.language import Language
from axicon.model.checkpoint import load
from axicon.model.decoder import Decoder
from tests.evaluate.tiny import make_tokenizer

LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.5,
}  # fmt: skip
OPT = {
    "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "opt"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Decoder]:
    torch.manual_seed(0)
    family: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    }[request.param]
    theirs = family().eval()
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    theirs.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return theirs, load(folder, dtype=torch.float32)


def tokens(length: int, seed: int) -> tuple[int, ...]:
    made = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(made.tolist())


def words(batch: int = 5) -> Batch:
    """Rows of different lengths, the last token of each an answer among three."""
    choices = (7, 80, 33)
    examples = []
    for i in range(batch):
        length = 4 + 3 * i
        row = Row((*tokens(length, i), choices[i % 3]), (*[False] * length, True))
        examples.append(Example((row,), i % 3))
    return collate(examples, choices)


def texts() -> Batch:
    """Two continuations of different lengths per example."""
    examples = []
    for i in range(3):
        start = tokens(5 + i, i)
        ends = tokens(2, 10 + i), tokens(4, 20 + i)
        rows = (Row(start + end, (*[False] * len(start), *[True] * len(end))) for end in ends)
        examples.append(Example(tuple(rows), i % 2))
    return collate(examples)


def windows() -> Batch:
    return collate([Example((Row(tokens(20, i), (False, *[True] * 19)),)) for i in range(3)])


def reference_rows(theirs: PreTrainedModel, batch: Batch) -> Tensor:
    """(R,): mean log-likelihood of the scored tokens, from all logits of padded rows."""
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits.float()
    law = logits[:, :-1].log_softmax(-1)
    labels = batch.labels[:, 1:]
    chosen = law.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != UNSCORED)
    return chosen.sum(1) / (labels != UNSCORED).sum(1)


def reference_choices(theirs: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, C): logits of the choices at the last real token but one, one row at a time and without padding."""
    rows = []
    for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
        logits = theirs(input_ids=ids[mask][None, :-1]).logits[0, -1]
        rows.append(logits[batch.choices])
    return torch.stack(rows)


def check(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [words(), windows()], ids=["words", "windows"])
def test_language_is_the_mean_over_scored_tokens(pair: Any, batch: Batch) -> None:
    theirs, ours = pair
    with torch.no_grad():
        check(Language().loss(ours, batch), -reference_rows(theirs, batch))


def test_choice_of_a_word(pair: Any) -> None:
    theirs, ours = pair
    batch = words()
    with torch.no_grad():
        check(Choice().loss(ours, batch), -reference_rows(theirs, batch))
        scores = reference_choices(theirs, batch)
        expected = F.cross_entropy(scores, batch.answer, reduction="none")  # type: ignore[arg-type]
        losses, answers = Choice(over="choices").judge(ours, batch)
        check(losses, expected)
        assert answers.tolist() == scores.argmax(1).tolist()
        assert len(set(answers.tolist())) > 1, "a test in which the model always answers the same"


def test_choice_of_a_text(pair: Any) -> None:
    theirs, ours = pair
    batch = texts()
    with torch.no_grad():
        scores = reference_rows(theirs, batch).view(3, 2)
        check(Choice().loss(ours, batch), -scores[torch.arange(3), batch.answer])
        check(
            Choice(over="choices").loss(ours, batch),
            F.cross_entropy(scores, batch.answer, reduction="none"),  # type: ignore[arg-type]
        )
        losses, answers = Choice().judge(ours, batch)
        check(losses, -scores[torch.arange(3), batch.answer])
        assert answers.tolist() == scores.argmax(1).tolist()


def test_padding_and_company_change_nothing(pair: Any) -> None:
    _, ours = pair
    batch = words()
    with torch.no_grad():
        whole = Choice().loss(ours, batch)
        alone = torch.cat([Choice().loss(ours, batch.examples(i, i + 1)) for i in range(len(batch))])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


def test_logits_in_pieces_have_the_same_gradients(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair
    weight = ours.blocks[0].down.weight.requires_grad_()
    (whole,) = torch.autograd.grad(Language().loss(ours, windows()).mean(), weight)
    heads: list[int] = []
    head = ours.head
    monkeypatch.setattr(scoring, "HEAD_ROWS", 8)
    monkeypatch.setattr(ours, "head", lambda x: heads.append(len(x)) or head(x))
    (pieces,) = torch.autograd.grad(Language().loss(ours, windows()).mean(), weight)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)
    assert max(heads) == 8
    assert sum(heads) == 2 * 3 * 19, "each piece forward twice, once of it for the backward pass"
    weight.requires_grad_(False)


def test_what_is_not_scored_costs_nothing(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair
    rows: list[int] = []
    ours.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    heads: list[int] = []
    head = ours.head
    monkeypatch.setattr(ours, "head", lambda x: heads.append(len(x)) or head(x))
    batch = words()
    with torch.no_grad():
        Choice().loss(ours, batch)
    assert rows == [int(batch.mask.sum()) - len(batch)], "neither pads nor the answers"
    assert heads == [len(batch)]
    ours.blocks[0]._forward_pre_hooks.clear()


@pytest.mark.parametrize("method", ["llm_int8", "group_int4"])
def test_packed_products_are_scored_as_they_multiply(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    dense = load(tmp_path, dtype=torch.float32)
    packed = load(tmp_path, dtype=torch.float32)
    compressor = COMPRESSORS[method]()
    compressor.begin(packed)
    for block in packed.blocks:
        compressor.block(block, [])  # type: ignore[arg-type]
    compressor.finish(packed)
    with torch.no_grad():
        close, far = Language().loss(packed, windows()), Language().loss(dense, windows())
    assert not torch.equal(close, far)
    torch.testing.assert_close(close, far, rtol=0.25, atol=0.1)


def test_quality_counts_every_example_once(pair: Any) -> None:
    theirs, ours = pair
    choices = (7, 80, 33)
    examples = [
        Example((Row((*tokens(6, i), choices[i % 3]), (*[False] * 6, True)),), i % 3) for i in range(7)
    ]
    with torch.no_grad():
        scores = reference_choices(theirs, collate(examples, choices))
        expected = sum(int(s.argmax()) == i % 3 for i, s in enumerate(scores)) / 7
        found = quality(ours, Choice(), Tokenised(examples, batch_size=3, choices=choices))
        plain = quality(ours, Language(), Tokenised([Example(e.rows) for e in examples], batch_size=3))
    assert (found.examples, found.accuracy) == (7, expected)
    assert found.standard_error == pytest.approx((expected * (1 - expected) / 7) ** 0.5)
    assert plain.accuracy is None
    assert plain.loss == pytest.approx(found.loss, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error(pair: Any) -> None:
    class Broken:
        def loss(self, model: object, batch: Batch) -> Tensor:
            return torch.full((len(batch),), torch.nan)

    examples = [Example((Row(tokens(6, 0), (*[False] * 5, True)),))]
    with pytest.raises(AxiconError, match="the mean loss of 1 examples is nan"):
        quality(pair[1], Broken(), Tokenised(examples))


def test_what_cannot_be_scored_is_refused(pair: Any) -> None:
    _, ours = pair
    with pytest.raises(ValueError, match="examples of 2 rows"):
        Language().loss(ours, texts())
    with pytest.raises(ValueError, match="without an answer"):
        Choice().loss(ours, windows())
    nothing = collate([Example((Row((1, 2, 3), (False, False, False)),))])
    with pytest.raises(ValueError, match="every row has a scored token"):
        Language().loss(ours, nothing)


def test_every_objective_has_one_loss_per_example(pair: Any) -> None:
    for objective in OBJECTIVES.values():
        with torch.no_grad():
            assert objective().loss(pair[1], words()).shape == (5,)
