"""`axicon lineage`, `axicon export`, `axicon allocate` and `axicon cache`: what lies on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import click

from axicon.errors import AxiconError
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


@axicon.command()
@click.argument("form", metavar="FORMAT", type=click.Choice(["compressed-tensors", "gguf"]))
@click.argument("model", metavar="DIR")
@click.argument("words", metavar="out=DIR2 [zeros=packed]", nargs=-1)
def export(form: Literal["compressed-tensors", "gguf"], model: str, words: tuple[str, ...]) -> None:
    """Write the model in DIR to DIR2 in a FORMAT that other programs read.

    Codes and scales stay what they are as far as the format can hold them; notes say where it cannot.

    compressed-tensors: transformers reads it with the package of that name. Where products have zeros (gptq,
    awq), their codes take a byte each: transformers does not read packed zeros. zeros=packed packs them for
    programs that do.

    gguf: one file for llama.cpp and the programs around it, of the LLaMA and Qwen families. Products become
    Q4_0, Q4_1 or Q8_0, what is dense stays dense.

    \b
    Examples:
      axicon export compressed-tensors ./my-model-int4 out=./my-model-ct
      axicon export gguf ./my-model-int4 out=./my-model-gguf
    """
    from jobs import export as job

    recipe = job.ExportRecipe.parse(words)
    for note in job.run(form, model, recipe):
        click.echo(f"note: {note}")
    click.echo(f"it lies in {recipe.out}")


@axicon.command()
@click.argument("words", metavar="DIR DIR... bytes=N out=RECIPE", nargs=-1)
def allocate(words: tuple[str, ...]) -> None:
    """Choose settings block by block under a budget of bytes, from models that have one setting everywhere.

    The DIRs are models that `axicon compress` made of one model by one method, with calibration.inputs=dense
    and different settings: what each block loses by each of them is in their manifests. The recipe written to
    RECIPE has the mixture with the least sum of squared errors of blocks; `axicon compress RECIPE` makes it.

    \b
    Examples:
      axicon allocate ./bits3 ./bits4 ./bits8 bytes=110_000_000 out=mixed.yaml
      axicon compress mixed.yaml out=./mixed
    """
    from jobs import allocate as job

    folders = [Path(word) for word in words if "=" not in word]
    recipe = job.AllocateRecipe.parse([word for word in words if "=" in word])
    for line in job.run(folders, recipe):
        click.echo(line)
    click.echo(f"it lies in {recipe.out}\nmake it: axicon compress {recipe.out} out=DIR")


@axicon.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def cache(ctx: click.Context, as_json: bool) -> None:
    """List what lies in axicon's cache folder: converted models, compiled kernels, leftovers.

    The folder is $AXICON_CACHE, else ~/.cache/axicon. Downloads of the hub are in the hub's own cache.
    """
    if ctx.invoked_subcommand is not None:
        return
    from axicon.model.cachedir import cache_dir
    from jobs import cache as job
    from jobs.shown import size

    found = job.items()
    if as_json:
        click.echo(json.dumps(job.as_json(found), indent=2, ensure_ascii=False))
        return
    total = size(sum(item.bytes for item in found))
    if not found:
        click.echo(f"{cache_dir()} is empty")
        return
    job.show(found, f"{cache_dir()}, {total}")
    if useless := sum(item.bytes for item in job.chosen(found)):
        click.echo(f"`axicon cache clean` would free {size(useless)}")


@cache.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="All that can be made again.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Only what lay unused so long."
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(
    names: tuple[str, ...], everything: bool, older_than: float | None, dry_run: bool, yes: bool
) -> None:
    """Remove NAMEs from the cache; without any, what is of no use any more.

    That is what killed processes left, kernels of another version, compiler or processor, and conversions
    of another version. What a living process uses always stays. A conversion whose GGUF file is gone, and
    files that are not axicon's, go only when they are named.

    \b
    Examples:
      axicon cache clean --dry-run
      axicon cache clean SmolLM2-135M-Instruct --yes
      axicon cache clean --older-than 30
    """
    from jobs import cache as job
    from jobs.shown import size

    if names and everything:
        raise click.UsageError("give names or --all, not both")
    found = job.items()
    picked = job.chosen(found, names, everything=everything, older_than=older_than)
    for item in found:
        if item.state == "in use" and (everything or job.named(item, names)):
            click.echo(f"{item.name} stays: {item.about}")
    if not picked:
        click.echo("nothing to remove")
        return
    total = size(sum(item.bytes for item in picked))
    job.show(picked, f"{len(picked)} to remove, {total}")
    if dry_run:
        return
    if not yes:
        if not _somebody_is_there():
            raise AxiconError("nobody is there to be asked: add --yes to remove them, or --dry-run to look")
        click.confirm("Remove them?", abort=True)
    click.echo(f"{job.clean(picked, say=click.echo)} bytes freed")


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()
