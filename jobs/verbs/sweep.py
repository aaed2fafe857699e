"""`axicon sweep`."""

from __future__ import annotations

import click

from jobs.command import Verb, axicon, read_recipe, show
from jobs.sweep_recipe import SweepRecipe

words = click.argument("words", nargs=-1, metavar="RECIPE.yaml [KEY=VALUE]...")


@axicon.command(cls=Verb.of(SweepRecipe))
@words
@show
def sweep(words: tuple[str, ...], show: bool) -> None:
    """Try a recipe with different settings, several at the same time, and find the best ones.

    A trial runs a verb with its own recipe; what varies is named by `space`, what is good by `objectives`.
    Whatever ends a sweep, the same command goes on, and no trial that has ended runs again. A page of what
    is found is written after each result.

    \b
    Examples:
      axicon sweep recipes/sweep_compress.yaml model=demo trials=8 out=./sweep
      axicon sweep base=gptq model=demo space.compressor.bits=[3,4] space.compressor.group=[32,64,128] \\
          search=grid limits.bytes.max=1e8 out=./sweep
      axicon sweep verb=finetune base=adamw space.rule.lr.log_uniform=[1e-5,1e-2] scheduler=asha \\
          objectives.accuracy_after=max full.steps=1000 out=./sweep
      axicon sweep verb=finetune base=zo_sgd space.rule.lr.log_uniform=[1e-4,1e-2] scheduler=pbt \\
          pbt.interval=50 trials=6 base.output=adapter out=./sweep
    """
    recipe = read_recipe(SweepRecipe, words)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return

    from jobs import sweep as job

    for line in job.summary(job.run(recipe)):
        click.echo(line)
