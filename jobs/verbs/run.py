"""`axicon run`."""

from __future__ import annotations

import click

from axicon.errors import AxiconError
from jobs.command import Verb, axicon, read_recipe, show
from jobs.run_recipe import RunRecipe

words = click.argument("words", nargs=-1, metavar="RECIPE.yaml [KEY=VALUE]...")


@axicon.command(cls=Verb.of(RunRecipe))
@words
@show
def run(words: tuple[str, ...], show: bool) -> None:
    """Run several verbs one after another, each on what those before it made.

    Every step has a folder of its own under out=, and its artefacts name their parents. Whatever ends a run,
    the same command goes on: steps that are done are not done again.

    \b
    Examples:
      axicon run recipes/tour.yaml out=./tour
      axicon run recipes/tour.yaml model=./my-model text=test.txt train=train.txt out=./tour
      axicon submit run recipes/tour.yaml out=/shared/tour
    """
    recipe = read_recipe(RunRecipe, words, first_word=_no_recipe)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return

    from jobs import run as job
    from jobs.shown import console

    report = job.run(recipe)
    console().print(job.table(report))
    for line in job.summary(report):
        click.echo(line)


def _no_recipe(word: str) -> dict[str, object]:
    raise AxiconError(f"{word!r} is no recipe file; name one, such as recipes/tour.yaml")
