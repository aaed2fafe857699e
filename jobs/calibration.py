"""The calibration sample of a compression: from a text, or written by the model itself with a fixed seed; and
where what is known of it lies for other runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from axicon import __version__
from axicon.compress import shared
from axicon.compress.calibration import Calibration, choose_windows
from axicon.compress.shared import Shared, SharedFolder
from axicon.compress.walk import Compress
from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate.perplexity import tokenise
from axicon.kernels import native
from axicon.model import checkpoint
from axicon.model.machine import return_freed_memory
from axicon.protocols import Compressor
from axicon.recipe import CompressRecipe, Dtype, ModelRecipe
from jobs.progress import Reporter

AT_ONCE = 32
"""Windows that the model writes together."""


def surroundings(dtype: torch.dtype) -> dict[str, Any]:
    """What decides bits beside a model and its inputs."""
    return {
        "format": shared.FORMAT_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "processor": shared.key({"flags": sorted(native.cpu_flags()), "machine": platform.machine()}),
        "versions": {"axicon": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def shared_folder(recipe: CompressRecipe) -> SharedFolder | None:
    """Raises AxiconError for one that cannot be written."""
    place = recipe.calibration.shared
    if place is None:
        return None
    return SharedFolder(place, int(recipe.calibration.shared_gib * shared.GIB))


def shared_set(folder: SharedFolder, source: Path, calibration: Calibration, dtype: torch.dtype) -> Shared:
    """Where runs on this sample and model meet. Raises AxiconError where there is no room."""
    facts = surroundings(dtype) | {
        "model_sha256": checkpoint.digest(source),
        "sample_sha256": calibration.sha256,
    }
    shape = checkpoint.shape_of(source)
    widest = max(block.width_in for block in shape.blocks)
    return Shared(folder, facts, calibration.tokens_WT.numel() * widest * dtype.itemsize, shape.layers)


@dataclass(frozen=True)
class Sample:
    """What a recipe says of its sample, with the text read."""

    recipe: CompressRecipe
    source: Path
    chosen: Tensor | None
    """Tokens (W, T) from the text; None: the model is to write them."""
    text_sha256: str | None
    folder: SharedFolder | None = None
    """Where other runs may have left the sample."""

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
        folder = shared_folder(recipe)
        if asked.text is None:
            checkpoint.load_tokenizer(source)
            return cls(recipe, source, None, None, folder)
        text = join_rows(read_rows(asked.text, column=asked.column))
        text_sha256 = hashlib.sha256(text.encode()).hexdigest()

        def choose() -> Tensor:
            tokens = tokenise(checkpoint.load_tokenizer(source), text)
            return choose_windows(
                tokens, asked.windows, asked.window, asked.seed, f"calibration.text={asked.text}"
            )

        if folder is None:
            return cls(recipe, source, choose(), text_sha256)
        known = cls(recipe, source, None, text_sha256, folder)
        return dataclasses.replace(known, chosen=known._once(choose))

    def _once(self, make: Callable[[], Tensor]) -> Tensor:
        """The tokens that another run has left, or made and left for others."""
        if self.folder is None:
            return make()
        facts = surroundings(getattr(torch, self.recipe.dtype)) | self.facts()
        facts["model_sha256"] = checkpoint.digest(self.source)
        del facts["inputs"]  # decides what blocks are shown, and not the tokens
        size = self.recipe.calibration.windows * self.recipe.calibration.window * 8
        name = f"{shared.SAMPLE}-{shared.key(facts)}"
        return self.folder.entry(name, lambda: [("tokens", make())], size, facts=facts)[0]

    def facts(self) -> dict[str, Any]:
        """What decides the tokens, and what the blocks are shown of them."""
        asked = self.recipe.calibration
        return {
            "text": "written by the model" if self.text_sha256 is None else "text",
            "text_sha256": self.text_sha256,
            "windows": asked.windows,
            "window": asked.window,
            "seed": asked.seed,
            "inputs": asked.inputs,
        }

    def tokens(self, reporter: Reporter) -> Tensor:
        """(W, T). Raises AxiconError when the model cannot be loaded to write."""
        return self.chosen if self.chosen is not None else self._once(lambda: self._written(reporter))

    def _written(self, reporter: Reporter) -> Tensor:
        asked, recipe = self.recipe.calibration, self.recipe
        plain = ModelRecipe(model=str(self.source), dtype=recipe.dtype)
        return written(
            self.source,
            asked.windows,
            asked.window,
            asked.seed,
            reporter,
            dtype=recipe.dtype,
            compressor=plain.build_compressor(),
        )


def written(
    source: Path,
    windows: int,
    window: int,
    seed: int,
    reporter: Reporter,
    *,
    dtype: Dtype = "bfloat16",
    compressor: Compressor | None = None,
    what: str = "calibration text",
) -> Tensor:
    """What a model writes at temperature 1: tokens (windows, window). `compressor` is applied to it first.

    Raises AxiconError when it cannot be loaded.
    """
    from axicon.generate.build import build_engine
    from axicon.generate.request import Request, SamplingParams

    engine = build_engine(
        str(source),
        dtype=dtype,
        threads=torch.get_num_threads(),
        max_rows=min(AT_ONCE, windows),
        max_queue=windows,
        max_model_len=window,
        transform=None if compressor is None else Compress(compressor),
    )
    # A random word begins each window: what the model says by itself is about few things. Ids that both
    # tokenizer and model know.
    words: Any = engine.tokenizer
    known = min(len(words), checkpoint.shape_of(source).vocab)
    first = torch.randint(known, (windows,), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[str, list[int]] = {}
    for number in range(windows):
        params = SamplingParams(
            max_tokens=window - 1, temperature=1.0, ignore_eos=True, seed=seed * 2**20 + number
        )
        engine.add(Request(id=str(number), prompt=[first[number]], params=params))
        found[str(number)] = [first[number]]
    with reporter.track(f"{what}, tokens") as advance:
        while engine.has_work:
            for delta in engine.step():
                if delta.error is not None:
                    raise AxiconError(f"the model could not write its {what}: {delta.error}")
                found[delta.request_id].extend(delta.tokens)
            advance(sum(map(len, found.values())), windows * window, "")
    del engine
    return_freed_memory()
    return torch.tensor([found[str(number)] for number in range(windows)])
