"""Directions: known answers, equality of the C++ and the torch functions, and that a part is a part."""

from __future__ import annotations

import pytest
import torch

from axicon.kernels import directions, native

KEY, STREAM = 0x0123456789ABCDEF, 77


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFFFFFFFFFF, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_authors_known_answers(
    key: int, counter: int, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if counter < 0:  # all counter words are ones there, and ours has zeros in the last two
        monkeypatch.setattr(torch, "zeros_like", lambda x: torch.full_like(x, 0xFFFFFFFF))
        counter = 0xFFFFFFFF
    assert directions.philox_torch(key, counter, torch.tensor([counter])).tolist() == [words]


def test_both_philox_agree() -> None:
    want = directions.philox_torch(KEY, STREAM, torch.arange(5, 305))
    assert torch.equal(directions.philox(KEY, STREAM, 5, 300), want)


@pytest.mark.parametrize("make", [directions.signs, directions.normals, directions.uniforms])
def test_a_slice_is_a_slice(make) -> None:  # type: ignore[no-untyped-def]
    whole = make(KEY, STREAM, 0, 70_000)
    for first, count in ((0, 1), (127, 2), (32_767, 5), (1, 69_999), (40_001, 0)):
        assert torch.equal(make(KEY, STREAM, first, count), whole[first : first + count])
    assert not torch.equal(make(KEY, STREAM + 1, 0, 70_000), whole)
    assert not torch.equal(make(KEY + (1 << 40), STREAM, 0, 70_000), whole)


def test_directions_have_mean_zero_and_variance_one() -> None:
    signs, normals = directions.signs(KEY, STREAM, 0, 1 << 20), directions.normals(KEY, STREAM, 0, 1 << 20)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    for z in (signs, normals):
        assert abs(z.mean()) < 0.005
        assert abs(z.var() - 1) < 0.01
    assert abs(normals.pow(4).mean() - 3) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "count", "keep"), [(0, 40_000, 1.0), (5, 77, 0.9), (130, 33_000, 0.9)])
def test_cpp_equals_torch(dtype: torch.dtype, first: int, count: int, keep: float) -> None:
    if native.why_unavailable():
        pytest.skip(str(native.why_unavailable()))
    source = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, want = torch.empty_like(source), torch.empty_like(source)
    directions.add_signs(source, got, 0.0123, key=KEY, stream=STREAM, keep=keep, where=first)
    directions.add_signs_torch(source, want, 0.0123, key=KEY, stream=STREAM, keep=keep, where=first)
    assert torch.equal(got, want)
    z = directions.signs(KEY, STREAM, first, count)
    assert torch.equal(want, (source.float() * keep + 0.0123 * z).to(dtype))


@pytest.mark.parametrize("function", [directions.add_signs, directions.add_signs_torch])
def test_rows_are_rows_of_the_whole(function) -> None:  # type: ignore[no-untyped-def]
    table, rows = torch.randn(50, 33), torch.tensor([49, 0, 7, 7])
    moved, got = table.clone(), torch.empty(4, 33)
    function(moved, moved, -0.5, key=KEY, stream=STREAM)
    function(table[rows], got, -0.5, key=KEY, stream=STREAM, where=rows)
    assert torch.equal(got, moved[rows])
