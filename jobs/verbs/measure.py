"""`axicon evaluate`."""

from __future__ import annotations

import click

from axicon.recipe import EvaluateRecipe
from jobs.command import Verb, axicon, read_recipe, show, words


@axicon.command(cls=Verb.of(EvaluateRecipe))
@words
@show
def evaluate(words: tuple[str, ...], show: bool) -> None:
    """Measure MODEL: perplexity on a text, lm-eval tasks, or both.

    \b
    Examples:
      axicon evaluate demo text=wiki.test.raw windows=20
      axicon evaluate demo tasks=sst2,rte data=../data limit=200
    """
    recipe = read_recipe(EvaluateRecipe, words)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return
    from rich.console import Console

    from jobs import evaluate as job

    report = job.run(recipe)
    Console().print(job.table(report))
    click.echo(f"results are in {report.files[0]}")
