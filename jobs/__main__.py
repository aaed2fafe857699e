"""The `axicon` command, which is also `python -m jobs`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from axicon.errors import AxiconError, RunFailed
from jobs.command import FAILED, WRONG_INPUT, axicon, debug
from jobs.stop import Stopped, stop_on_signal
from jobs.submitted import keep_lines_whole, stand_where_submitted, succeeded
from jobs.verbs import (  # noqa: F401 - each adds its verbs
    artefacts,
    cluster,
    distill,
    finetune,
    machine,
    measure,
    models,
    run,
    server,
    submit,
    sweep,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. What a user can mend is one line on standard error, and the exit code is not 0."""
    keep_lines_whole()
    words, begun = list(sys.argv[1:] if arguments is None else arguments), time.monotonic()
    try:
        with stop_on_signal():
            stand_where_submitted()
            axicon.main(args=words, prog_name="axicon", standalone_mode=False)
        succeeded(" ".join(words[:1]), time.monotonic() - begun)
    except Stopped as stopped:
        click.echo(f"axicon: {stopped.did}; {stopped.kept}", err=True)
        sys.exit(stopped.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(WRONG_INPUT)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "axicon"
        click.echo(f"axicon: {error.format_message()} ({where} --help)", err=True)
        sys.exit(WRONG_INPUT)
    except AxiconError as error:
        if debug():
            raise
        click.echo(f"axicon: {error}", err=True)
        sys.exit(FAILED if isinstance(error, RunFailed) else WRONG_INPUT)


if __name__ == "__main__":
    main()
