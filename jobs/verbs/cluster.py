"""`axicon up`, `axicon down`."""

from __future__ import annotations

from typing import Any, TypeVar

import click

from axicon.settings import Recipe
from jobs.command import Verb, axicon
from jobs.deploy import DeployRecipe
from jobs.render import KuberayRecipe, OnpremRecipe
from jobs.status import StatusRecipe
from jobs.up import DownRecipe, UpRecipe

R = TypeVar("R", bound=Recipe)


def read_words(kind: type[R], words: tuple[str, ...], first: str, **options: Any) -> R:
    """A recipe from perhaps a value for `first`, then key=value words, then options that were given."""
    values = {name: value for name, value in options.items() if value is not None}
    if words and "=" not in words[0]:
        values[first], *rest = words
        return kind.parse(rest, **values)
    return kind.parse(words, **values)


def warn(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"warning: {line}", err=True)


def words(metavar: str) -> Any:
    return click.argument("words", nargs=-1, metavar=f"[{metavar}] [KEY=VALUE]...")


@axicon.command(cls=Verb.of(UpRecipe))
@words("CLUSTER.YAML")
@click.option("--nodes", help="table (default) or local, as nodes=.")
@click.option("--name", help="A name of its own, as name=.")
def up(words: tuple[str, ...], nodes: str | None, name: str | None) -> None:
    """Start the cluster of CLUSTER.YAML on this machine, in the background.

    Every entry of its node table becomes simulated nodes with their resources and labels, `min_workers` of
    each and at least one. Everything is on loopback, with a token and a folder of its own, and ends with
    `axicon down`.

    \b
    Examples:
      axicon up
      axicon up cluster.yaml --name mine dashboard_port=8266
    """
    from jobs import up as job

    job.run(read_words(UpRecipe, words, "cluster", nodes=nodes, name=name), say=click.echo)


@axicon.command(cls=Verb.of(DownRecipe))
@words("NAME")
def down(words: tuple[str, ...]) -> None:
    """End the cluster NAME that `axicon up` started, with everything that runs on it.

    \b
    Examples:
      axicon down
      axicon down mine
    """
    from jobs import up as job

    job.down(read_words(DownRecipe, words, "name"), say=click.echo)


@axicon.command(cls=Verb.of(DeployRecipe))
@words("CLUSTER.YAML")
def deploy(words: tuple[str, ...]) -> None:
    """Put the Serve applications of CLUSTER.YAML on a cluster that runs, and wait until they answer.

    The code that is here goes along. The cluster is one that `axicon up` started, or any with address=URL.
    Deploying again replaces what changed while the rest goes on answering.

    \b
    Examples:
      axicon deploy
      axicon deploy cluster.yaml port=8001
      RAY_AUTH_TOKEN_PATH=token axicon deploy cluster.yaml address=http://127.0.0.1:8265
    """
    from jobs import deploy as job

    job.run(read_words(DeployRecipe, words, "cluster"), say=click.echo)


@axicon.command(cls=Verb.of(StatusRecipe))
@words("NAME")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(words: tuple[str, ...], as_json: bool) -> None:
    """Show the nodes, applications and jobs of the cluster NAME, or of any with address=URL.

    \b
    Examples:
      axicon status
      axicon status mine --json
    """
    from rich.console import Console

    from jobs import status as job

    found = job.look(read_words(StatusRecipe, words, "name"))
    if as_json:
        click.echo(job.as_json(found))
    else:
        job.show(found, Console())


@axicon.group()
def render() -> None:
    """Write CLUSTER.YAML for Kubernetes (kuberay) or for machines that are there already (onprem).

    \b
    Examples:
      axicon render kuberay image=registry.example/axicon:1 out=axicon.yaml
      axicon render onprem head=10.0.0.1 workers=10.0.0.2,gpu@10.0.0.3 out=onprem.yaml
    """


@render.command(cls=Verb.of(KuberayRecipe))
@words("CLUSTER.YAML")
def kuberay(words: tuple[str, ...]) -> None:
    """A RayService with the node table and the Serve configuration, and a RayJob for every job.

    \b
    Examples:
      axicon render kuberay | kubectl apply -f -
      axicon render kuberay cluster.yaml image=registry.example/axicon:1 out=axicon.yaml
    """
    from jobs import cluster_file
    from jobs import render as job

    recipe = read_words(KuberayRecipe, words, "cluster")
    file = cluster_file.read(recipe.cluster)
    warn(file.warnings())
    click.echo(job.run(job.kuberay(file, recipe), recipe.out))


@render.command(cls=Verb.of(OnpremRecipe))
@words("CLUSTER.YAML")
def onprem(words: tuple[str, ...]) -> None:
    """A cluster.yaml for `ray up` on machines with addresses, which takes no node table.

    \b
    Examples:
      axicon render onprem head=10.0.0.1 workers=10.0.0.2,10.0.0.3 out=onprem.yaml
      axicon render onprem cluster.yaml head=10.0.0.1 workers=cpu@10.0.0.2,gpu@10.0.0.3
    """
    from jobs import cluster_file
    from jobs import render as job

    recipe = read_words(OnpremRecipe, words, "cluster")
    file = cluster_file.read(recipe.cluster)
    warn(file.warnings())
    click.echo(job.run(job.onprem(file, recipe), recipe.out))
