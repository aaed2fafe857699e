"""`axicon serve`."""

from __future__ import annotations

import click

from axicon.recipe import LocalServeRecipe
from jobs.command import Verb, axicon, debug, read_recipe, show, words


@axicon.command(cls=Verb.of(LocalServeRecipe))
@words
@show
def serve(words: tuple[str, ...], show: bool) -> None:
    """Serve MODEL with an OpenAI-style API on this machine until Ctrl-C.

    Starts a private Ray on loopback, loads the model, and prints a request to try when /health answers 200.
    Without API keys it listens on loopback only.

    \b
    Examples:
      axicon serve demo port=8001
      axicon serve ./my-model dtype=float32 max_model_len=4096
      KEYS=$(openssl rand -hex 24) axicon serve demo host=0.0.0.0 api_keys_env=KEYS
    """
    recipe = read_recipe(LocalServeRecipe, words)
    if show:
        click.echo(recipe.as_yaml(), nl=False)
        return
    from jobs import serve as job

    job.run(recipe, say=click.echo, debug=debug())
