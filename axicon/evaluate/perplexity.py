"""Perplexity by the protocol of GPTQ, SparseGPT, Wanda and SliceGPT, so that figures can stand beside theirs.

The rows of the text are joined with two newlines and tokenised once, as one long string with the tokenizer's
special tokens on (so OPT gets one `</s>` and LLaMA one `<s>`, at the very start). The tokens are cut into
windows of `window` that do not overlap; what is left over is dropped. Each window is one causal pass without
a cache, its loss the float32 cross entropy averaged over the window - 1 predicted tokens. Perplexity is the
exponential of the mean of those means.

This is not the word perplexity of the harness task `wikitext`, nor a strided perplexity: never compare
across. Departs from the papers in one point: they used the slow tokenizers, which transformers 5 no longer
ships.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from axicon.errors import AxiconError
from axicon.evaluate.answered import Answered
from axicon.evaluate.packed import LanguageModel, hidden_states

PROTOCOL = "gptq"
HEAD_ROWS = 256
"""Rows whose logits are alive at once: 256 x 49,152 in float32 are 50 MB, a whole window would be 400 MB."""

Progress = Callable[[int, int, float], None]
"""Called with windows done, windows to do, perplexity so far."""


class Tokenizer(Protocol):
    def __call__(self, text: str, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    value: float
    nll: float
    """Mean negative log-likelihood per predicted token, in nats; `value` is its exponential."""
    windows: int
    window: int
    """Tokens per window."""
    tokens: int
    """Tokens of the whole text, those after the last window used included."""
    text_sha256: str
    """Of the joined text, in UTF-8."""
    protocol: str = PROTOCOL

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int = 2048,
    windows: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
    answered: Answered | None = None,
) -> Perplexity:
    """Perplexity of `model` on `text` (see `axicon.data.join_rows`).

    `windows` takes the first so many windows instead of all. `batch` windows go through the model at once; it
    changes speed and memory, not the result. What is in `answered` is not computed again. Raises AxiconError
    when the text has fewer windows than asked for, when the model is too short for the window, and when a
    loss is not finite.
    """
    _check_settings(model, window, windows, batch)
    tokens_T = tokenise(tokenizer, text)
    windows_WT = cut_windows(tokens_T, window, windows)
    answered = answered or Answered()
    losses: list[float] = []
    for first in range(0, len(windows_WT), batch):
        windows_BT = windows_WT[first : first + batch]
        key = answered.key("losses", windows_BT.tolist())
        done = answered.get(key)
        if done is None:
            done = list(window_losses(model, windows_BT))
        for loss in done:
            if not math.isfinite(loss):
                raise AxiconError(
                    f"the loss of window {len(losses)} is {loss}: weights or activations overflow; "
                    "try dtype=float32"
                )
            losses.append(loss)
        answered.put(key, done)
        if progress is not None:
            progress(len(losses), len(windows_WT), _exp(math.fsum(losses) / len(losses)))
    nll = math.fsum(losses) / len(losses)
    return Perplexity(
        value=_exp(nll),
        nll=nll,
        windows=len(losses),
        window=window,
        tokens=len(tokens_T),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def tokenise(tokenizer: Tokenizer, text: str) -> Tensor:
    """(T,) int64: the whole text at once, with the special tokens this tokenizer puts around any text."""
    ids = tokenizer(text, add_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def cut_windows(tokens_T: Tensor, window: int, windows: int | None = None) -> Tensor:
    """(W, window) int64: the first `windows` whole windows, or all of them."""
    whole = len(tokens_T) // window
    if whole == 0:
        raise AxiconError(
            f"the text has {len(tokens_T)} tokens, less than one window of {window}: give more text"
        )
    if windows is not None and windows > whole:
        raise AxiconError(
            f"the text has {whole} windows of {window} tokens, not {windows}: ask for windows={whole}"
        )
    used = whole if windows is None else windows
    return tokens_T[: used * window].view(used, window)


def window_losses(model: LanguageModel, windows_BT: Tensor) -> Iterator[float]:
    """Mean next-token cross entropy of each window, in nats."""
    length = windows_BT.shape[1]
    x_ND = hidden_states(model, windows_BT.tolist())
    for x_TD, tokens_T in zip(torch.split(x_ND, length), windows_BT, strict=True):
        yield math.fsum(_losses(model, x_TD[:-1], tokens_T[1:].to(x_TD.device))) / (length - 1)


def _losses(model: LanguageModel, x_TD: Tensor, targets_T: Tensor) -> Iterator[float]:
    """Summed cross entropy of each piece of rows: float32 per row, float64 over rows."""
    for x_RD, targets_R in zip(torch.split(x_TD, HEAD_ROWS), torch.split(targets_T, HEAD_ROWS), strict=True):
        yield F.cross_entropy(model.head(x_RD).float(), targets_R, reduction="none").double().sum().item()


def _check_settings(model: LanguageModel, window: int, windows: int | None, batch: int) -> None:
    if window < 2:
        raise AxiconError(f"window={window}: a window needs at least 2 tokens")
    if windows is not None and windows < 1:
        raise AxiconError(f"windows={windows}: at least one window is needed")
    if batch < 1:
        raise AxiconError(f"batch={batch}: at least one window goes through at a time")
    limit = getattr(getattr(model, "shape", None), "max_positions", None)
    if limit is not None and window > limit:
        raise AxiconError(f"window={window}: the model knows {limit} positions; give window={limit} or less")


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
