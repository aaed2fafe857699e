"""What is measured of a compressed model right after it was made: its card, as far as a recipe asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from axicon.data import join_rows, read_rows
from axicon.errors import AxiconError
from axicon.evaluate.card import KINDS
from axicon.evaluate.perplexity import cut_windows, tokenise
from axicon.model import checkpoint
from axicon.recipe import CompressRecipe
from jobs.card import Filling
from jobs.card_file import Card
from jobs.card_measure import SERVED, Asked
from jobs.progress import Reporter

TASKS_LATER = "zero-shot tasks need data and minutes"
NO_TEXT = "no text was given"
NOT_ASKED = "measure=false"


@dataclass
class Measure:
    """What a recipe asks to be measured, and the reasons for what is not."""

    recipe: CompressRecipe
    source: Path
    text: str | None

    @classmethod
    def of(cls, recipe: CompressRecipe, source: Path) -> Self:
        """Raises AxiconError for a text that is not there or too short, before the work."""
        if recipe.text is None:
            return cls(recipe, source, None)
        text = join_rows(read_rows(recipe.text, column=recipe.column))
        most = checkpoint.shape_of(source).max_positions
        if recipe.window > most:
            raise AxiconError(f"window={recipe.window}: the model knows {most} positions; give window={most}")
        cut_windows(tokenise(checkpoint.load_tokenizer(source), text), recipe.window, recipe.windows)
        return cls(recipe, source, text)

    def begin(self, folder: Path) -> None:
        """The card of a model that is just made: nothing but sizes, the rest null with its reason."""
        card = Card.of(folder)
        assert card is not None
        for name in card.rows:
            for kind in KINDS:
                card.why_not(name, kind, self._why(name))
        self._filling(card, Reporter()).sizes()
        card.write()

    def run(self, folder: Path, reporter: Reporter) -> Card:
        """Measure the finished model and write its card after each figure.

        What cannot be measured is said and has its reason in the card: the model is there all the same.
        """
        card = Card.of(folder)
        assert card is not None
        self._filling(card, reporter).run()
        return card

    def _filling(self, card: Card, reporter: Reporter) -> Filling:
        recipe = self.recipe
        asked = Asked(
            text=self.text, window=recipe.window, windows=recipe.windows, dtype=recipe.dtype,
            threads=recipe.threads, activations=recipe.measure,
        )  # fmt: skip
        return Filling(card, asked, recipe.measure, False, reporter, dense=self.source)

    def _why(self, name: str) -> str:
        if name == "perplexity":
            return NO_TEXT if self.text is None else "the run ended before it was measured"
        if name.startswith((*SERVED, "outliers/", "bytes")):
            return "the run ended before it was measured" if self.recipe.measure else NOT_ASKED
        return TASKS_LATER
