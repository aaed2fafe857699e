"""Which of several settings each block gets, so that all fit a budget of bytes with the least sum of errors.

Exact for errors that add up: partial sums of bytes and errors are carried from block to block, and one that
another beats in both is dropped. Their number is that of different sums of bytes, which is small as long as
blocks are of the same shape: a few hundred for 30 blocks and 3 settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from axicon.errors import AxiconError


def allocate(
    errors_BC: Sequence[Sequence[float]], bytes_BC: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """The choice of each of B blocks among C settings. Of equal errors fewer bytes win.

    Raises AxiconError where even the smallest settings do not fit.
    """
    least = sum(min(sizes) for sizes in bytes_BC)
    if least > budget:
        raise AxiconError(f"the smallest settings of all blocks take {least} bytes, {budget} are allowed")
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for errors, sizes in zip(errors_BC, bytes_BC, strict=True):
        least -= min(sizes)
        further = sorted(
            (total + sizes[c], error + errors[c], (*chosen, c))
            for total, error, chosen in front
            for c in range(len(sizes))
            if total + sizes[c] + least <= budget  # what is left to choose must still fit
        )
        front = []
        for one in further:
            if not front or one[1] < front[-1][1]:
                front.append(one)
    return list(front[-1][2])
