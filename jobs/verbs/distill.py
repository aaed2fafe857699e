"""`axicon distill`: a few made examples in place of many real ones."""

from __future__ import annotations

from typing import Any

import click

from jobs.command import Verb, axicon, read_recipe, show
from jobs.distill_recipe import DistillRecipe


def name_of_source(word: str) -> dict[str, Any]:
    """What a first word without `=` means here."""
    return {"data": {"source": word}}


@axicon.command(cls=Verb.of(DistillRecipe))
@click.argument("words", nargs=-1, metavar="[DATA] [KEY=VALUE]...")
@show
def distill(words: tuple[str, ...], show: bool) -> None:
    """Make a few examples per class that train a network as all of DATA do, by trajectory matching.

    DATA is digits (they come with scikit-learn), a file of records (Parquet, JSON lines) with a label and an
    image or a text, or a data set of the hub. Images stay images; a text becomes a vector, the mean of a
    model's last states, and what is made are such vectors with a linear or deeper head as the network.
    Sequences of embeddings are not made, and images are not whitened.

    It is MTT as it stands; switches.* add what AST adds to it, each by itself. Stop it or kill it, and the
    same command goes on where it was, to the same bytes.

    \b
    Examples:
      axicon distill recipes/distill_digits.yaml out=./digits
      axicon distill train.parquet network=convnet ipc=10 data.size=32 out=./images
      axicon distill train.jsonl modality=text text.model=demo network=linear out=./texts
    """
    recipe = read_recipe(DistillRecipe, words, name_of_source)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return

    from jobs import distill as job

    for line in job.summary(job.run(recipe)):
        click.echo(line)
