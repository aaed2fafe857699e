"""What the verbs of the `axicon` command share: the group they are in, their `--help`, their recipes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from axicon import __version__
from axicon.errors import AxiconError
from axicon.settings import Recipe, fields
from jobs.submitted import begin

R = TypeVar("R", bound=Recipe)

WRONG_INPUT = 2
FAILED = 1


class Verb(click.Command):
    """A command whose `--help` ends with the settings of its recipe."""

    recipe: type[Recipe]

    @classmethod
    def of(cls, recipe: type[Recipe]) -> type[Verb]:
        """The class of commands with this recipe."""
        return type(f"{recipe.__name__}Verb", (cls,), {"recipe": recipe})

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Settings, given as key=value"):
            formatter.write_dl(settings(self.recipe), col_max=28)
        super().format_epilog(ctx, formatter)


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
    if isinstance(value, Mapping) and list(value) == ["method"]:  # as it is typed
        return str(value["method"])
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def name_of_model(word: str) -> dict[str, Any]:
    """What a first word without `=` means to most verbs."""
    return {"model": word}


def read_recipe(
    kind: type[R], words: Sequence[str], first_word: Callable[[str], dict[str, Any]] = name_of_model
) -> R:
    """A recipe from what was typed: perhaps a recipe file or what `first_word` reads, then key=value words.

    Raises AxiconError.
    """
    words = list(words)
    values: dict[str, Any] = {}
    if words and "=" not in words[0]:
        first = words.pop(0)
        is_file = first.endswith((".yaml", ".yml"))
        values = read_file(shipped(first) or Path(first)) if is_file else first_word(first)
    recipe = kind.parse(words, **values)
    context = click.get_current_context(silent=True)
    return recipe if context is None else begin(context.info_name or "", recipe)


def shipped(name: str) -> Path | None:
    """A recipe that comes with axicon, by the name of its file, where no such file lies here.

    In a checkout they are beside the packages, in a wheel inside this one.
    """
    path, here = Path(name), Path(__file__).parent
    if path.exists() or name not in (path.name, f"recipes/{path.name}"):
        return None
    places = (folder / "recipes" / path.name for folder in (here, here.parent))
    return next((place for place in places if place.is_file()), None)


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


class Verbs(click.Group):
    """A group that lists its verbs with whole sentences: cut short, they do not say what a verb does."""

    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (name, command.get_short_help_str(limit=1000)) for name, command in sorted(self.commands.items())
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
      axicon compress llm_int8 model=demo    a smaller copy of it on disk
      axicon doctor                          what this machine has, and what is unsafe
    """


show = click.option("--show", is_flag=True, help="Print the resolved recipe and do nothing.")
words = click.argument("words", nargs=-1, metavar="[MODEL] [KEY=VALUE]...")


def debug() -> bool:
    """Whether AXICON_DEBUG asks for tracebacks and for what Ray says."""
    return os.environ.get("AXICON_DEBUG", "") not in ("", "0")
