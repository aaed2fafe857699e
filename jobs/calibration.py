"""The calibration sample of a compression: from a text, or written by the model itself with a fixed seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from axicon.compress.calibration import choose_windows
from axicon.compress.walk import Compress
from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate.perplexity import tokenise
from axicon.model import checkpoint
from axicon.model.machine import return_freed_memory
from axicon.recipe import CompressRecipe, ModelRecipe
from jobs.progress import Reporter

AT_ONCE = 32
"""Windows that the model writes together."""


@dataclass(frozen=True)
class Sample:
    """What a recipe says of its sample, with the text read."""

    recipe: CompressRecipe
    source: Path
    chosen: Tensor | None
    """Tokens (W, T) from the text; None: the model is to write them."""
    text_sha256: str | None

    @classmethod
    def of(cls, recipe: CompressRecipe, source: Path) -> Self:
        """Raises AxiconError for a text that is not there or too short, before the work."""
        asked = recipe.calibration
        most = checkpoint.shape_of(source).max_positions
        if asked.window > most:
            raise AxiconError(
                f"calibration.window={asked.window}: the model knows {most} positions; "
                f"give calibration.window={most} or less"
            )
        if asked.text is None:
            checkpoint.load_tokenizer(source)
            return cls(recipe, source, None, None)
        text = join_rows(read_rows(asked.text, column=asked.column))
        tokens = tokenise(checkpoint.load_tokenizer(source), text)
        chosen = choose_windows(
            tokens, asked.windows, asked.window, asked.seed, f"calibration.text={asked.text}"
        )
        return cls(recipe, source, chosen, hashlib.sha256(text.encode()).hexdigest())

    def facts(self) -> dict[str, Any]:
        """What decides the tokens, and what the blocks are shown of them."""
        asked = self.recipe.calibration
        return {
            "text": "written by the model" if self.chosen is None else "text",
            "text_sha256": self.text_sha256,
            "windows": asked.windows,
            "window": asked.window,
            "seed": asked.seed,
            "inputs": asked.inputs,
        }

    def tokens(self, reporter: Reporter) -> Tensor:
        """(W, T). Raises AxiconError when the model cannot be loaded to write."""
        return self.chosen if self.chosen is not None else self._written(reporter)

    def _written(self, reporter: Reporter) -> Tensor:
        from axicon.generate.build import build_engine
        from axicon.generate.request import Request, SamplingParams

        asked, recipe = self.recipe.calibration, self.recipe
        plain = ModelRecipe(model=str(self.source), dtype=recipe.dtype)
        compressor = plain.build_compressor()
        engine = build_engine(
            str(self.source),
            dtype=recipe.dtype,
            threads=torch.get_num_threads(),
            max_rows=min(AT_ONCE, asked.windows),
            max_queue=asked.windows,
            max_model_len=asked.window,
            transform=None if compressor is None else Compress(compressor),
        )
        # A random word begins each window: what the model says by itself is about few things.
        made = torch.Generator().manual_seed(asked.seed)
        first = torch.randint(self._words(engine.tokenizer), (asked.windows,), generator=made).tolist()
        found: dict[str, list[int]] = {}
        for number in range(asked.windows):
            params = SamplingParams(
                max_tokens=asked.window - 1,
                temperature=1.0,
                ignore_eos=True,
                seed=asked.seed * 2**20 + number,
            )
            engine.add(Request(id=str(number), prompt=[first[number]], params=params))
            found[str(number)] = [first[number]]
        with reporter.track("calibration text, tokens") as advance:
            total = asked.windows * asked.window
            while engine.has_work:
                for delta in engine.step():
                    if delta.error is not None:
                        raise AxiconError(f"the model could not write its calibration text: {delta.error}")
                    found[delta.request_id].extend(delta.tokens)
                advance(sum(map(len, found.values())), total, "")
        del engine
        return_freed_memory()
        return torch.tensor([found[str(number)] for number in range(asked.windows)])

    def _words(self, tokenizer: Any) -> int:
        """How many ids there are that both tokenizer and model know."""
        return min(len(tokenizer), checkpoint.shape_of(self.source).vocab)
