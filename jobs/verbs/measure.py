"""`axicon evaluate`, `axicon card` and `axicon compare`."""

from __future__ import annotations

import json

import click

from axicon.recipe import EvaluateRecipe
from jobs.card_recipe import CardRecipe
from jobs.command import Verb, axicon, read_recipe, show, words
from jobs.compare import CompareRecipe


@axicon.command(cls=Verb.of(EvaluateRecipe))
@words
@show
def evaluate(words: tuple[str, ...], show: bool) -> None:
    """Measure MODEL: perplexity on a text, lm-eval tasks, tokens per second, or several of them.

    A model directory that axicon made gets perplexity and speed into its report.json, a compressed one all
    of it into its card. Numbers are bfloat16, as a model is served; dtype=float32 for the highest precision.

    \b
    Examples:
      axicon evaluate demo text=wiki.test.raw windows=20
      axicon evaluate demo tasks=sst2,rte data=../data limit=200
      axicon evaluate ./my-model-int8 speed=true
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


@axicon.command(cls=Verb.of(CardRecipe))
@click.argument("words", nargs=-1, metavar="DIR [KEY=VALUE]...")
@show
def card(words: tuple[str, ...], show: bool) -> None:
    """Measure what the quality card of a compressed model in DIR lacks: card.json, README.md, report.json.

    Everything is measured of the dense model it was made from, too, and remembered for the next model made
    from that. A stopped run goes on where it was.

    \b
    Examples:
      axicon card ./demo-int8
      axicon card ./demo-int8 text=wiki.test.raw windows=20 data=../data
    """
    recipe = read_recipe(CardRecipe, words)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return
    from jobs import card as job
    from jobs.shown import console

    report = job.run(recipe)
    console().print(job.table(report))
    for line in job.notes(report):
        click.echo(line)
    click.echo(f"all of it is in {report.files[0]}/README.md")


@axicon.command(cls=Verb.of(CompareRecipe))
@click.argument("words", nargs=-1, metavar="A B... [KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def compare(words: tuple[str, ...], as_json: bool) -> None:
    """Set models beside each other: size, perplexity, tasks, speed, methods; changes against the first.

    Each is a model directory, `demo`, or a results_*.json file. Figures that were not measured in the same
    way are not compared, and a missing one comes with the command that measures it.

    \b
    Examples:
      axicon compare demo ./demo-int8
      axicon compare demo ./demo-int8 artifacts/evaluate/other/results_*.json plot=three.png
    """
    models = [word for word in words if "=" not in word]
    recipe = CompareRecipe.parse([word for word in words if "=" in word], model=models)
    from jobs import compare as job
    from jobs import compare_show as picture
    from jobs.shown import console

    if recipe.plot is not None:
        picture.check_plot(recipe.plot)
    comparison = job.run(recipe)
    note = None
    if recipe.plot is not None:
        note = picture.why_no_picture(comparison)
        if note is None:
            picture.draw(comparison, recipe.plot)
            note = f"the picture is in {recipe.plot}"
    if as_json:
        content = job.as_json(comparison) | {"picture": note}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    shown, lines = picture.table(comparison)
    console().print(shown)
    for line in [*lines, *([note] if note else [])]:
        click.echo(line)
