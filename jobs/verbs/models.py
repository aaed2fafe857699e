"""`axicon compress` and `axicon verify`: model directories made, and looked at."""

from __future__ import annotations

import difflib
import sys
from typing import Any

import click

from axicon.errors import AxiconError
from axicon.recipe import CompressRecipe
from jobs.command import FAILED, Verb, axicon, read_file, read_recipe, shipped, show

words = click.argument("words", nargs=-1, metavar="METHOD|RECIPE.yaml [KEY=VALUE]...")


@axicon.command(cls=Verb.of(CompressRecipe))
@words
@show
def compress(words: tuple[str, ...], show: bool) -> None:
    """Make a smaller copy of a model on disk, which `axicon serve` and `axicon evaluate` take as any other.

    METHOD stands for the recipe of that name that comes with axicon; --show prints what it sets. One block
    of the model is in memory at a time. Whatever happens on the way, the directory is there whole or not at
    all; one that the same recipe made before is left as it is. Its README.md is a card of what it is worth
    beside the dense model; `axicon card DIR` adds what takes longer.

    \b
    Examples:
      axicon compress llm_int8 model=demo out=./demo-int8
      axicon compress gptq model=./my-model calibration.text=train.txt out=./my-model-int4
      axicon compress llm_int8 model=./my-model compressor.relative=4 text=wiki.test.raw windows=20
      axicon compress recipes/llm_int8.yaml measure=false
    """
    if not words:
        raise AxiconError(f"name a method first: axicon compress {_methods()[0]} model=demo out=DIR")
    recipe = read_recipe(CompressRecipe, words, first_word=_method)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return

    from jobs import card
    from jobs import compress as job
    from jobs.shown import console

    report = job.run(recipe)
    console().print(card.table(report))
    for line in (*card.notes(report), job.next_step(report)):
        click.echo(line)


def _method(word: str) -> dict[str, Any]:
    """The recipe that a method's name stands for: the one that comes with axicon, else its defaults."""
    known = _methods()
    if word not in known:
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"known are {', '.join(known)}"
        raise AxiconError(f"{word!r} is no compression method: {hint}; a model is named with model={word}")
    path = shipped(f"{word}.yaml")
    return {"compressor": {"method": word}} if path is None else read_file(path)


def _methods() -> list[str]:
    from axicon.compress import COMPRESSORS

    return sorted(COMPRESSORS)


@axicon.command()
@click.argument("model", metavar="DIR")
def verify(model: str) -> None:
    """Check the model in DIR: sizes and digests of its files, storage format, names and shapes of tensors.

    Every byte is read. Exits with 1 if something is damaged, and says what to do. A directory without a
    manifest is checked as far as its headers tell.

    \b
    Examples:
      axicon verify ./demo-int8
      axicon verify demo
    """

    from jobs import verify as job
    from jobs.shown import console

    verdict = job.run(model)
    if not verdict.problems:
        click.echo(verdict.summary)
        return
    console().print(job.table(verdict))
    sys.exit(FAILED)
