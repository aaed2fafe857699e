"""The text that copies of a model are measured on where the user names none: the model writes it itself.

The dense model writes at temperature 1 from a fixed seed, another one than calibration samples have. On such
a text the logarithm of perplexity less that of the dense model estimates, in nats per token, the divergence
of what the copy says from what the model says (KL, dense first). It is no measure of what the model knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from axicon.model import checkpoint
from axicon.model.artefact import write_atomically
from axicon.recipe import Dtype
from jobs.calibration import written
from jobs.progress import Reporter

SEED = 7_919
"""Calibration takes small numbers."""


def write_text(
    path: Path,
    source: Path,
    *,
    windows: int,
    window: int,
    seed: int,
    dtype: Dtype,
    threads: int,
    reporter: Reporter,
    what: str = "text to measure on",
) -> None:
    """Write the text, unless it is there.

    It is longer than the windows by a half: a text that is read again has other tokens, and may have fewer.
    """
    if path.exists():
        return
    torch.set_num_threads(threads)
    tokens = written(source, windows + windows // 2, window, SEED + seed, reporter, dtype=dtype, what=what)
    tokenizer: Any = checkpoint.load_tokenizer(source)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tolist()]
    write_atomically(path, "\n\n".join(texts) + "\n")
