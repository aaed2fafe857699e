"""Texts as vectors: the mean over tokens of what a model's last norm gives, which a small head then reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from axicon.data.table import Placed
from axicon.errors import AxiconError
from axicon.model import checkpoint

AT_ONCE, MOST_TOKENS = 16, 128


def texts_of(table: Sequence[Placed], column: str) -> list[str]:
    """Raises AxiconError for a record without text."""
    found = []
    for one in table:
        value = one.record.get(column)
        if not isinstance(value, str) or not value.strip():
            one.refuse(f"no text in field {column!r}; its fields are {', '.join(one.record)}")
        found.append(value)
    return found


@torch.no_grad()
def features(
    source: Path,
    texts: Sequence[Sequence[str]],
    max_tokens: int | None,
    advance: Callable[[int, int, str], None],
) -> list[Tensor]:
    """float32 (N, width) for each list of texts: the mean over the first `max_tokens` tokens of a text
    (None: 128, or as many as the model knows).

    The model computes in float32. Texts of like length go together; a text's features do not depend on that
    but for last bits. Raises AxiconError for a model that cannot be loaded.
    """
    tokenizer = checkpoint.load_tokenizer(source)
    most = checkpoint.shape_of(source).max_positions
    if max_tokens is not None and max_tokens > most:
        raise AxiconError(f"text.max_tokens={max_tokens}: the model knows {most} positions")
    max_tokens = max_tokens or min(MOST_TOKENS, most)
    model = checkpoint.load(source, dtype=torch.float32)
    total, done = sum(map(len, texts)), 0
    found = []
    for one in texts:
        rows = [
            tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"][:max_tokens] for text in one
        ]
        pooled = torch.empty(len(rows), model.shape.blocks[-1].width_out)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for begin in range(0, len(rows), AT_ONCE):
            chosen = by_length[begin : begin + AT_ONCE]
            lengths = [len(rows[i]) for i in chosen]
            tokens = torch.zeros(len(chosen), max(lengths), dtype=torch.int64)
            for row, i in enumerate(chosen):
                tokens[row, : lengths[row]] = torch.tensor(rows[i])
            states_BTD = model.states(tokens, lengths)
            if model.final_norm is not None:
                states_BTD = model.final_norm(states_BTD)
            for row, i in enumerate(chosen):
                pooled[i] = states_BTD[row, : lengths[row]].float().mean(dim=0)
            done += len(chosen)
            advance(done, total, "")
        found.append(pooled)
    return found
