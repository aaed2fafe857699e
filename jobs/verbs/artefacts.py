"""`axicon lineage` and `axicon cache`: what lies on disk."""

from __future__ import annotations

import json

import click

from jobs.command import axicon


@axicon.command()
@click.argument("model", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the tree as JSON.")
def lineage(model: str, as_json: bool) -> None:
    """Draw what the model in DIR was made from, and whether that is still there.

    Beneath each model are its parents, with the methods that made it, the digest its manifest has for them,
    and their size. `here` means found and unchanged. Nothing is fetched or converted.

    \b
    Examples:
      axicon lineage ./my-model-int8
      axicon lineage demo --json
    """
    from jobs import lineage as job

    root = job.run(model)
    if as_json:
        click.echo(json.dumps(job.as_json(root), indent=2, ensure_ascii=False))
    else:
        job.draw(root)
