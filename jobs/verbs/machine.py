"""`axicon doctor` and `axicon version`."""

from __future__ import annotations

import sys

import click

from axicon import __version__
from jobs.command import FAILED, axicon


@axicon.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look at this machine: versions, memory, ports, keys, kernels, and what is unsafe.

    Every finding that needs something comes with the way out. Exits with 1 if something is broken.
    """
    from jobs import doctor as job

    findings = job.examine()
    click.echo(job.as_json(findings) if as_json else job.as_text(findings))
    if any(finding.level == "broken" for finding in findings):
        sys.exit(FAILED)


@axicon.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
