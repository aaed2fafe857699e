"""Perplexity: closed forms, the plain way of computing it, and what must not change it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.errors import AxiconError
from axicon.evaluate import Perplexity, perplexity
from axicon.evaluate.perplexity import cut_windows

VOCAB = 97


class Cyclic:
    """A tokenizer of characters whose text `abc...` has the ids 0, 1, 2, ... modulo the vocabulary."""

    def __init__(self, prefix: Sequence[int] = ()) -> None:
        self.prefix = list(prefix)
        self.calls: list[str] = []

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        assert add_special_tokens
        self.calls.append(text)
        return {"input_ids": self.prefix + [ord(letter) % VOCAB for letter in text]}


class Fake:
    """A language model with the hidden state = its token, and a head made by the test."""

    device = torch.device("cpu")

    def __init__(self, logits: Any) -> None:
        self.logits = logits
        self.head_rows: list[int] = []

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
        assert len(tokens_N) == len(positions_N)
        return tokens_N[:, None].float()

    def head(self, x_ND: Tensor) -> Tensor:
        self.head_rows.append(len(x_ND))
        result: Tensor = self.logits(x_ND[:, 0].long())
        return result


def uniform(tokens_N: Tensor) -> Tensor:
    return torch.zeros(len(tokens_N), VOCAB)


def perfect(tokens_N: Tensor) -> Tensor:
    return 1e4 * F.one_hot((tokens_N + 1) % VOCAB, VOCAB).float()


def table(tokens_N: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(VOCAB, VOCAB, generator=generator) * 2)[tokens_N]


TEXT = "".join(chr(VOCAB + i % VOCAB) for i in range(1000))


def test_a_uniform_model_scores_the_vocabulary_size() -> None:
    assert perplexity(Fake(uniform), Cyclic(), TEXT, window=64).value == pytest.approx(VOCAB, rel=1e-6)


def test_a_perfect_model_scores_one() -> None:
    result = perplexity(Fake(perfect), Cyclic(), TEXT, window=64)
    assert result.value == 1.0
    assert result.nll == 0.0


def test_the_plain_computation_gives_the_same_value() -> None:
    tokens = torch.tensor([ord(letter) % VOCAB for letter in TEXT])
    total = 0.0
    for i in range(len(tokens) // 128):
        window = tokens[128 * i : 128 * (i + 1)]
        total += F.cross_entropy(table(window[:-1]), window[1:]).item() * 128
    expected = math.exp(total / (128 * (len(tokens) // 128)))
    result = perplexity(Fake(table), Cyclic(), TEXT, window=128)
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert (result.windows, result.window, result.tokens) == (7, 128, 1000)


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_batches_do_not_change_it(batch: int) -> None:
    alone = perplexity(Fake(table), Cyclic(), TEXT, window=64)
    together = perplexity(Fake(table), Cyclic(), TEXT, window=64, batch=batch)
    assert together == alone


def test_the_head_never_sees_a_whole_long_window() -> None:
    model = Fake(table)
    perplexity(model, Cyclic(), TEXT, window=1000)
    assert model.head_rows == [256, 256, 256, 231]


def test_windows_are_the_first_ones_and_progress_tells_them() -> None:
    seen: list[tuple[int, int, float]] = []
    some = perplexity(
        Fake(table), Cyclic(), TEXT, window=64, windows=3, progress=lambda *now: seen.append(now)
    )
    assert some.windows == 3
    assert some.value == perplexity(Fake(table), Cyclic(), TEXT[: 3 * 64], window=64).value
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert seen[-1] == (3, 3, pytest.approx(some.value))


def test_the_text_is_tokenised_once_with_its_special_tokens() -> None:
    tokenizer = Cyclic(prefix=[5])
    result = perplexity(Fake(table), tokenizer, TEXT, window=64)
    assert tokenizer.calls == [TEXT]
    assert result.tokens == 1001
    assert result.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert result.value != perplexity(Fake(table), Cyclic(), TEXT, window=64).value


def test_the_result_is_plain_data() -> None:
    result = Perplexity(value=2.0, nll=math.log(2), windows=1, window=8, tokens=8, text_sha256="0")
    assert result.as_dict() == {
        "value": 2.0,
        "nll": math.log(2),
        "windows": 1,
        "window": 8,
        "tokens": 8,
        "text_sha256": "0",
        "protocol": "gptq",
    }


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    assert cut_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 2048}, "1000 tokens, less than one window of 2048"),
        ({"window": 64, "windows": 16}, "15 windows of 64 tokens, not 16: ask for windows=15"),
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 64, "windows": 0}, "at least one window"),
        ({"window": 64, "batch": 0}, "at least one window goes"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(AxiconError, match=says):
        perplexity(Fake(table), Cyclic(), TEXT, **settings)


def test_a_model_shorter_than_the_window_is_refused() -> None:
    model = Fake(table)
    model.shape = type("Shape", (), {"max_positions": 32})()  # type: ignore[attr-defined]
    with pytest.raises(AxiconError, match="knows 32 positions; give window=32"):
        perplexity(model, Cyclic(), TEXT, window=64)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AxiconError, match="loss of window 0 is nan"):
        perplexity(Fake(lambda tokens: uniform(tokens) * math.nan), Cyclic(), TEXT, window=64)
