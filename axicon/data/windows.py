"""Plain text to train on: windows of tokens, of which every token but the first is scored."""

from __future__ import annotations

from collections.abc import Sequence

from axicon.data.text import join_rows
from axicon.data.tokenised import Example, Row, Tokenised, Tokenizer
from axicon.errors import AxiconError


def windows(
    rows: Sequence[str], tokenizer: Tokenizer, *, window: int, batch: int = 16, seed: int = 0
) -> Tokenised:
    """Rows joined as for perplexity and cut into windows that do not overlap; what is left over is dropped.

    Raises AxiconError for a text with less than one window.
    """
    if window < 2:
        raise AxiconError(f"window={window}: a window needs at least 2 tokens")
    ids: list[int] = tokenizer(join_rows(rows), add_special_tokens=True, verbose=False)["input_ids"]
    whole = len(ids) // window
    if whole == 0:
        raise AxiconError(f"the text has {len(ids)} tokens, less than one window of {window}: give more text")
    scored = (False, *[True] * (window - 1))
    cut = (tuple(ids[i * window : (i + 1) * window]) for i in range(whole))
    return Tokenised([Example((Row(tokens, scored),)) for tokens in cut], batch, seed)
