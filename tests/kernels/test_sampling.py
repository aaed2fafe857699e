"""The C++ kernels of sampling against their torch references."""

from __future__ import annotations

import pytest
import torch

from axicon.kernels import native, sampling

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None, reason=f"no C++ kernels: {native.why_unavailable()}"
)

SIZES = (1, 15, 16, 17, 63, 65, 1000, 4097, 49152)


def logits(rows, vocab, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", SIZES)
def test_softmax_equals_the_reference(vocab):
    x_RV = logits(4, vocab)
    heats = [1.0, 0.7, 0.01, 2.5]
    got, good = sampling.softmax(list(x_RV), heats)
    want, _ = sampling.softmax_torch(list(x_RV.double()), heats)
    assert good == [True] * 4
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(got.sum(1), torch.ones(4), rtol=1e-5, atol=0)


def test_a_banned_token_has_no_probability():
    x_RV = logits(1, 100)
    x_RV[0, 7] = -torch.inf
    assert sampling.softmax(list(x_RV), [1.0])[0][0, 7] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 31, 99])
def test_bad_rows_are_named(bad, place):
    x_RV = logits(3, 100)
    x_RV[1, place] = bad
    assert sampling.softmax(list(x_RV), [1.0] * 3)[1] == [True, False, True]
    assert sampling.softmax([torch.full((100,), -torch.inf)], [1.0])[1] == [False]


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize(
    "settings", [(0, 0.9, 0.0), (40, 1.0, 0.0), (900, 0.8, 0.0), (0, 1.0, 0.1), (60, 0.99, 0.01)]
)
@pytest.mark.parametrize("steps", [None, 4])
def test_truncation_equals_the_reference(vocab, settings, steps):
    """`steps` makes equal entries, which stay or go together."""
    x_RV = logits(3, vocab, scale=0.5 if vocab == 49152 else 3.0)
    if steps:
        x_RV = (x_RV * steps).round() / steps
    got, _ = sampling.softmax(list(x_RV), [1.0] * 3)
    want = got.clone()
    sampling.truncate(got, [sampling.Truncation(*settings)] * 3)
    sampling.truncate_torch(want, [sampling.Truncation(*settings)] * 3)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", SIZES)
def test_draws_are_those_of_the_reference(count):
    """Logarithms may differ in the last bit, which decides between two candidates once in some 10^6 draws."""
    rows = 200
    probs = torch.softmax(logits(rows, count, scale=2.0), 1)
    probs[:, 1::3] = 0
    ids = torch.arange(count).flip(0).expand(rows, count)
    keys = [sampling.splitmix(key) for key in range(rows)]
    assert torch.equal(sampling.draw(probs, ids, keys), sampling.draw_torch(probs, ids, keys))


def test_a_row_does_not_depend_on_the_others():
    x_RV = logits(5, 5000)
    heats = [1.0, 0.5, 0.8, 1.3, 0.9]
    probs, _ = sampling.softmax(list(x_RV), heats)
    for r in range(5):
        assert torch.equal(sampling.softmax([x_RV[r]], heats[r : r + 1])[0][0], probs[r])
