"""`axicon submit`."""

from __future__ import annotations

from pathlib import Path

import click

from axicon.settings import split_words
from jobs.command import axicon


@axicon.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("words", nargs=-1, metavar="VERB [WORDS]...", type=click.UNPROCESSED)
@click.option("--cluster", metavar="NAME", help="A cluster of this machine; the only one if none is named.")
@click.option("--address", metavar="URL", help="Of another cluster's dashboard; its token as Ray finds it.")
@click.option(
    "--working-dir", type=click.Path(path_type=Path), help="Goes along; default: axicon's own code."
)
@click.option("--id", "name", metavar="ID", help="Submission id; default: by verb, recipe, inputs and code.")
@click.option("--cpus", type=click.FloatRange(0), default=1, show_default=True, help="Reserved for the job.")
@click.option("--gpus", type=click.FloatRange(0), default=0, show_default=True, help="Reserved for the job.")
@click.option(
    "--env-keys", metavar="NAMES", default="", help="Variables to pass on; the job's record shows them."
)
@click.option("--detach", is_flag=True, help="Do not follow the log.")
@click.option("--again", is_flag=True, help="Run once more what has succeeded.")
@click.option("--follow", metavar="ID", help="Show the log of a job to its end.")
@click.option("--stop", metavar="ID", help="Stop a job; it keeps what it can go on from.")
@click.option("--list", "listing", is_flag=True, help="List the jobs of the cluster.")
def submit(
    words: tuple[str, ...],
    cluster: str | None,
    address: str | None,
    working_dir: Path | None,
    name: str | None,
    cpus: float,
    gpus: float,
    env_keys: str,
    detach: bool,
    again: bool,
    follow: str | None,
    stop: str | None,
    listing: bool,
) -> None:
    """Run VERB as a job of a cluster and follow its log; exits with 0 if it succeeded.

    The same verb, recipe, inputs and code are the same job: it is followed while it runs, not run again
    when it has succeeded, and continued under a new id when it failed or was stopped. Ctrl-C only stops
    looking. Options of submit come before VERB.

    \b
    Examples:
      axicon submit evaluate demo text=wiki.test.raw windows=20
      axicon submit --detach --cpus 2 evaluate demo tasks=sst2 data=/data threads=2
      axicon submit --list
    """
    chosen = [bool(words), follow is not None, stop is not None, listing]
    if sum(chosen) != 1:
        raise click.UsageError("give a verb to run, or one of --follow, --stop and --list")
    if words and words[0].startswith("-"):  # not refused before, as the verb may have options
        raise click.NoSuchOption(words[0], ctx=click.get_current_context())
    from jobs import submit as job

    how = job.Submission(
        cluster=cluster,
        address=address,
        working_dir=working_dir,
        id=name,
        cpus=cpus,
        gpus=gpus,
        env_keys=tuple(split_words(env_keys)),
        detach=detach,
        again=again,
    )
    if follow is not None:
        job.follow_again(how, follow, click.echo)
    elif stop is not None:
        job.stop(how, stop, click.echo)
    elif listing:
        rows = job.listing(how)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join(cells).rstrip())
        if not rows:
            click.echo("no job was submitted to this cluster")
    else:
        job.run(how, axicon, words[0], words[1:], click.echo)
