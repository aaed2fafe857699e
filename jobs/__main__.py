"""The `axicon` command. Thin: a verb reads its recipe and calls the `run` of its module."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from axicon import __version__
from axicon.errors import AxiconError, RunFailed
from axicon.recipe import EvaluateRecipe, LocalServeRecipe, Recipe, fields

R = TypeVar("R", bound=Recipe)

WRONG_INPUT = 2
FAILED = 1


class Verb(click.Command):
    """A command whose `--help` ends with the settings of its recipe."""

    recipe: type[Recipe]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Settings, given as key=value"):
            formatter.write_dl(settings(self.recipe), col_max=28)
        super().format_epilog(ctx, formatter)


class ServeVerb(Verb):
    recipe = LocalServeRecipe


class EvaluateVerb(Verb):
    recipe = EvaluateRecipe


def settings(recipe: type[Recipe]) -> list[tuple[str, str]]:
    """("key=default", what it is) of every setting but the model, which has a place of its own."""
    defaults = recipe().model_dump(mode="json")
    rows = []
    for key, about in fields(recipe):
        value: Any = defaults
        for part in key.split("."):
            value = value[part]
        if key != "model":
            rows.append((f"{key}={_typed(value)}", about))
    return rows


def _typed(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def read_recipe(kind: type[R], words: Sequence[str]) -> R:
    """A recipe from what was typed: perhaps a model or a recipe file, then key=value words."""
    words = list(words)
    values: dict[str, Any] = {}
    if words and "=" not in words[0]:
        first = words.pop(0)
        values = read_file(Path(first)) if first.endswith((".yaml", ".yml")) else {"model": first}
    return kind.parse(words, **values)


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a recipe file. Raises AxiconError."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise AxiconError(f"{path}: cannot be read ({error.strerror}); name another file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AxiconError(f"{path}: no valid YAML ({' '.join(str(error).split())}); mend the file") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise AxiconError(f"{path}: holds no `key: value` lines; see recipes/ for examples")
    return content


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", message="%(version)s")
def axicon() -> None:
    """Compress an open language model, repair it, prove what it still can do, and serve it.

    MODEL is `demo` (a small model that comes with axicon), a directory with safetensors, config.json and
    a tokenizer, a .gguf file, or a model id of the Hugging Face hub. Everything else is key=value; the
    --help of a command lists its keys.

    \b
    First steps:
      axicon serve demo                      an OpenAI-style endpoint on http://127.0.0.1:8000
      axicon serve demo port=8001 threads=1  another, with one compute thread
      axicon evaluate demo text=FILE         perplexity of a model on a text
      axicon doctor                          what this machine has, and what is unsafe
    """


show = click.option("--show", is_flag=True, help="Print the resolved recipe and do nothing.")
words = click.argument("words", nargs=-1, metavar="[MODEL] [KEY=VALUE]...")


@axicon.command(cls=ServeVerb)
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


@axicon.command(cls=EvaluateVerb)
@words
@show
def evaluate(words: tuple[str, ...], show: bool) -> None:
    """Measure MODEL: perplexity on a text, lm-eval tasks, or both.

    \b
    Examples:
      axicon evaluate demo text=wiki.test.raw windows=20
      axicon evaluate demo tasks=sst2,rte data=../data limit=200
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


def debug() -> bool:
    """Whether AXICON_DEBUG asks for tracebacks and for what Ray says."""
    return os.environ.get("AXICON_DEBUG", "") not in ("", "0")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. What a user can mend is one line on standard error, and the exit code is not 0."""
    try:
        axicon.main(args=arguments, prog_name="axicon", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        click.echo(f"axicon: {error.format_message()} (axicon --help)", err=True)
        sys.exit(WRONG_INPUT)
    except AxiconError as error:
        if debug():
            raise
        click.echo(f"axicon: {error}", err=True)
        sys.exit(FAILED if isinstance(error, RunFailed) else WRONG_INPUT)


if __name__ == "__main__":
    main()
