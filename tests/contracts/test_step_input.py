"""StepInput as a process group carries it: one flat tensor there, the same step back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axicon.step import STEP_VERSION, KeptBlock, LayeredPrompt, RowPolicy, StepInput

NUMBERS = st.integers(-(2**63), 2**63 - 1)
ROWS = st.integers(0, 2**31)


def records(kind: Any) -> st.SearchStrategy[Any]:
    return st.builds(kind, *[ROWS] * len(kind._fields))


@st.composite
def steps(draw: st.DrawFn) -> StepInput:
    count = draw(st.integers(0, 12))

    def column(of: st.SearchStrategy[int]) -> torch.Tensor:
        return torch.tensor(draw(st.lists(of, min_size=count, max_size=count)), dtype=torch.int64)

    flags = st.integers(0, 1)
    return StepInput(
        *(column(NUMBERS) for _ in range(4)), column(flags).bool(), column(NUMBERS), column(flags).bool(),
        *(tuple(draw(st.lists(ROWS, max_size=5))) for _ in range(3)),
        reserves=tuple(draw(st.lists(st.tuples(ROWS, ROWS), max_size=4))),
        policies=tuple(draw(st.lists(records(RowPolicy), max_size=3))),
        layered=tuple(draw(st.lists(records(LayeredPrompt), max_size=3))),
        drops=tuple(draw(st.lists(ROWS, max_size=3))),
        keeps=tuple(draw(st.lists(records(KeptBlock), max_size=3))),
        reuses=tuple(draw(st.lists(records(KeptBlock), max_size=3))),
    )  # fmt: skip


@given(steps())
def test_unpack_is_the_inverse_of_pack(step: StepInput) -> None:
    packed = step.pack()
    assert packed.dtype == torch.int64
    assert packed.dim() == 1
    again = StepInput.unpack(packed)
    for name in StepInput.__slots__:
        ours, theirs = getattr(step, name), getattr(again, name)
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name


@given(steps(), st.integers(-(2**31), 2**31).filter(lambda v: v != STEP_VERSION))
def test_another_version_is_refused(step: StepInput, version: int) -> None:
    packed = step.pack()
    packed[0] = version
    with pytest.raises(ValueError, match=rf"version {version}, this process speaks {STEP_VERSION}"):
        StepInput.unpack(packed)


@given(steps(), st.data())
def test_a_step_cut_short_or_miscounted_is_refused(step: StepInput, data: st.DataObject) -> None:
    packed = step.pack()
    short = packed[: data.draw(st.integers(0, len(packed) - 1))]
    place = data.draw(st.integers(1, 10))
    wrong = packed.clone()
    wrong[place] += data.draw(st.sampled_from([-1, 1, 1 << 40, -(1 << 40)]))
    shifted = packed.clone()  # the length is right: one list has an entry more, reserves an entry less
    shifted[5] += 1
    shifted[6] -= 1
    negative = packed.clone()  # so is it here
    negative[2], negative[3] = -1, packed[2] + packed[3] + 1
    for bad in (short, torch.cat([packed, packed[:1]]), wrong, shifted, negative):
        with pytest.raises(ValueError, match="a StepInput of"):
            StepInput.unpack(bad)
