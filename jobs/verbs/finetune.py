"""`axicon finetune` and `axicon replay`: a model trained, and any step of that made again."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.command import Verb, axicon, read_recipe, show, words
from jobs.finetune_recipe import FinetuneRecipe, ReplayRecipe


@axicon.command(cls=Verb.of(FinetuneRecipe))
@words
@show
def finetune(words: tuple[str, ...], show: bool) -> None:
    """Train a model for a task, by zeroth-order rules in no more memory than running it takes.

    A zeroth-order run is its log: the digest of the base, and a few numbers a step. Stop it or kill it, and
    the same command goes on where it was; `axicon replay` makes the model of any step from the log. More
    workers, or fewer, change no bit of it.

    \b
    Examples:
      axicon finetune recipes/zo_sgd.yaml model=demo steps=60 out=./run
      axicon finetune demo data.task=rte rule.method=zo_sgd rule.lr=1e-3 rule.eps=1e-2 out=./run
      axicon finetune demo data.train=train.jsonl data.template='{{ text }} It was' \\
          data.verbalizer='{0: " bad", 1: " good"}' out=./run
      axicon finetune ./run/recipe.yaml start_from=./run rule.lr=1e-4 steps=120 out=./run2
    """
    recipe = read_recipe(FinetuneRecipe, words)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return

    from jobs import finetune as job

    for line in job.summary(job.run(recipe)):
        click.echo(line)


@axicon.command(cls=Verb.of(ReplayRecipe))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("words", nargs=-1, metavar="[step=N] [out=DIR2] [model=BASE]")
def replay(folder: Path, words: tuple[str, ...]) -> None:
    """Make the model behind any step of the run in DIR again, from its base and its log, bit for bit.

    Without out= it prints the digest alone. No data are needed, and no forward pass is computed.

    \b
    Examples:
      axicon replay ./run
      axicon replay ./run step=200 out=./at-200
      axicon replay ./run model=./where-the-base-is-now out=./again
    """
    from jobs import replay as job

    found = job.run(folder, ReplayRecipe.parse(words))
    click.echo(f"step {found.step}, digest {found.digest}")
    if found.out is not None:
        click.echo(f"{found.kind} in {found.out}")
