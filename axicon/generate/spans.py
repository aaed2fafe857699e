"""The nodes of a step, grouped by request row: how a runner reads a `StepInput`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from axicon.model.cache import RowCache
from axicon.model.native import Rows
from axicon.step import StepInput


@dataclass(frozen=True, slots=True)
class Span:
    """The adjacent nodes of one request row in a step."""

    row: int
    start: int
    stop: int
    positions: tuple[int, ...]
    parents: tuple[int, ...]
    """Offsets inside the span; -1 follows the committed context."""
    forced: bool
    """Every node was given, none sampled: a prompt chunk or a replay."""
    adapter: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def chain(self) -> bool:
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def ancestors(self) -> Tensor:
        """bool (T, T): node i sees node j, itself included."""
        sees_TT = torch.eye(len(self), dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                sees_TT[i] |= sees_TT[parent]
        return sees_TT

    def check_positions(self, committed: int) -> None:
        """Raises ValueError unless roots follow the committed context and children their parents in time."""
        for offset, (position, parent) in enumerate(zip(self.positions, self.parents, strict=True)):
            expected = committed if parent < 0 else self.positions[parent] + 1
            if position != expected:
                raise ValueError(f"node {self.start + offset}: position {position}, expected {expected}")


def split_spans(step: StepInput) -> list[Span]:
    """Group a step's nodes by request row. Raises ValueError where the order of nodes breaks the contract."""
    rows, parents = step.rows_N.tolist(), step.parents_N.tolist()
    positions, forced = step.positions_N.tolist(), step.forced_N.tolist()
    adapters = step.adapters_N.tolist()
    spans: list[Span] = []
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop < len(rows) and rows[stop] == rows[start]:
            continue
        offsets = tuple(p - start if p >= 0 else -1 for p in parents[start:stop])
        if any(not -1 <= parent < i for i, parent in enumerate(offsets)):
            raise ValueError(f"nodes {start}..{stop - 1}: a parent lies outside its row or behind its child")
        if len(set(adapters[start:stop])) > 1:
            raise ValueError(f"nodes {start}..{stop - 1}: several adapters in one request row")
        spans.append(
            Span(
                rows[start], start, stop, tuple(positions[start:stop]), offsets, all(forced[start:stop]),
                adapters[start],
            )
        )  # fmt: skip
        start = stop
    if len({span.row for span in spans}) != len(spans):
        raise ValueError("the nodes of one request row are not adjacent")
    return spans


def committed_paths(spans: Sequence[Span], commits: Sequence[int]) -> dict[int, list[int]]:
    """Row -> offsets inside its span that stay. Raises ValueError unless they are one path from the root."""
    paths: dict[int, list[int]] = {}
    ends = iter(spans)
    span = next(ends, None)
    for node in commits:
        while span is not None and node >= span.stop:
            span = next(ends, None)
        if span is None or node < span.start:
            raise ValueError(f"commits {tuple(commits)}: not ascending nodes of the previous step")
        path = paths.setdefault(span.row, [])
        offset = node - span.start
        if span.parents[offset] != (path[-1] if path else -1):
            raise ValueError(f"commit of node {node} does not follow the committed path of its row")
        path.append(offset)
    return paths


def native_rows(step: StepInput, spans: Sequence[Span], caches: Sequence[RowCache]) -> Rows:
    """The step as the C++ kernels read it."""
    hidden = None if all(span.chain for span in spans) else _hidden(spans)
    return Rows(
        step.tokens_N, step.positions_N,
        [i for i, span in enumerate(spans) for _ in range(len(span))],
        [offset for span in spans for offset in range(len(span))],
        caches, step.wanted_N.nonzero().flatten().tolist(), hidden, [span.adapter for span in spans],
    )  # fmt: skip


def _hidden(spans: Sequence[Span]) -> np.ndarray:
    """uint64 (N, words): bit j of a node's row says that it does not see staged node j of its request."""
    words = -(-max(len(span) for span in spans) // 64)
    rows = []
    for span in spans:
        bits = np.zeros((len(span), words * 64), dtype=bool)
        bits[:, : len(span)] = ~span.ancestors().numpy()
        rows.append(np.packbits(bits, axis=1, bitorder="little").view("<u8"))
    return np.ascontiguousarray(np.concatenate(rows))


def renumber(spans: Sequence[Span]) -> list[Span]:
    """The same spans, lying one after the other from node 0."""
    result, start = [], 0
    for span in spans:
        result.append(replace(span, start=start, stop=start + len(span)))
        start += len(span)
    return result


def nodes_before(step: StepInput, spans: Sequence[Span]) -> StepInput:
    """The step without the nodes behind these spans, which are its first."""
    count = spans[-1].stop if spans else 0
    return replace(
        step, tokens_N=step.tokens_N[:count], positions_N=step.positions_N[:count],
        rows_N=step.rows_N[:count], parents_N=step.parents_N[:count], wanted_N=step.wanted_N[:count],
        adapters_N=step.adapters_N[:count], forced_N=step.forced_N[:count],
    )  # fmt: skip
