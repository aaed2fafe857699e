"""What is to be submitted, made out and checked on this machine before anything is sent.

A verb checks its own words: `--show` prints the resolved recipe and does nothing. What it names on this
machine's disk must be there and is made absolute when the cluster runs here too, and is warned about when
it does not.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import click
import yaml

from axicon.data.text import is_file
from axicon.errors import AxiconError
from axicon.model.hub import what_is
from axicon.recipe import Recipe

NOT_JOBS = {
    "serve": "it holds a cluster of its own; `axicon deploy` serves on a cluster",
    "submit": "give the verb that is to run",
    **dict.fromkeys(("up", "down", "deploy", "status", "render", "cache"), "it is for this machine"),
}
MAY_BE_PATHS = ("model", "text")
"""Settings that take a path beside other things, by the last part of their key."""
OUTPUTS = ("out", "plot")
"""Settings that name what the job makes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    verb: str
    words: tuple[str, ...]
    """After the verb, as the job gets them."""
    recipe: Mapping[str, Any]
    """Resolved, as plain data; empty for a verb without."""
    inputs: tuple[Path, ...] = ()
    """Files and folders of this machine that the job reads."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def entrypoint(self) -> str:
        # `exec`: the signal that stops the job reaches Python, and its exit code is the job's.
        return f"exec python -m jobs {shlex.join([self.verb, *self.words])}"

    def name(self, code: str) -> str:
        """The submission id: the same verb, recipe, inputs and code have the same one."""
        asked = self.recipe or {"words": self.words}
        told = json.dumps([self.verb, asked, code, [stamp(path) for path in self.inputs]], sort_keys=True)
        method, model = (asked.get("compressor") or {}).get("method"), asked.get("model")
        parts = [self.verb, *(Path(str(part)).name for part in (method, model) if part)]
        readable = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts))[:60].strip("-")
        return f"{readable}-{sha256(told.encode()).hexdigest()[:8]}"


def make(group: click.Group, verb: str, words: Sequence[str], *, here: bool, sent: Path) -> Plan:
    """Check the words, and settle what they mean on the cluster. Raises AxiconError.

    here: the cluster runs on this machine. sent: the working directory that goes along.
    """
    command = group.commands.get(verb)
    if command is None:
        raise AxiconError(f"no such verb {verb!r}; `axicon --help` lists them")
    if verb in NOT_JOBS:
        raise AxiconError(f"{verb} cannot be submitted: {NOT_JOBS[verb]}")
    words = [_absolute(word) if here and _looks_like_path(word) else word for word in words]
    recipe = _resolved(command, verb, words)
    kind: type[Recipe] | None = getattr(command, "recipe", None)
    if kind is None or not recipe:
        if here:
            _check_places(words)
        paths = [word for word in words if "=" not in word and Path(word).exists()] if here else []
        places = tuple(_absolute(word) if word in paths else word for word in words)
        return Plan(verb=verb, words=places, recipe={}, inputs=tuple(Path(_absolute(path)) for path in paths))
    named = dict(_paths(kind, recipe))
    if not here:
        return Plan(verb=verb, words=tuple(words), recipe=recipe, warnings=_warnings(named, recipe, sent))
    _check_inputs(kind, recipe)
    changed = {key: ",".join(str(path.absolute()) for path in paths) for key, paths in named.items()}
    if "out" in recipe and recipe["out"] is None:
        # A job's own folder goes with the job.
        changed["out"] = str(Path("artifacts", verb).absolute())
    kept = [word for word in words if word.partition("=")[0] not in changed]
    final = [*kept, *(f"{key}={value}" for key, value in changed.items())]
    inputs = tuple(path.absolute() for key, paths in named.items() if key not in OUTPUTS for path in paths)
    return Plan(verb=verb, words=tuple(final), recipe=_resolved(command, verb, final), inputs=inputs)


def _resolved(command: click.Command, verb: str, words: Sequence[str]) -> dict[str, Any]:
    """The recipe that a verb makes of its words, or nothing for a verb without. Raises what it raises."""
    if not any(parameter.name == "show" for parameter in command.params):
        command.make_context(verb, list(words)).close()
        return {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        command.main([*words, "--show"], prog_name=verb, standalone_mode=False)
    content = yaml.safe_load(shown.getvalue())
    return content if isinstance(content, dict) else {}


def _paths(kind: type[Recipe], recipe: Mapping[str, Any]) -> list[tuple[str, list[Path]]]:
    """(setting, its paths) of all settings that name one."""
    found = []
    for key, annotation, value in _settings(kind, recipe):
        values = [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []
        if not value:
            continue
        if _takes_path(annotation):
            found.append((key, [Path(one).expanduser() for one in values]))
        elif _last(key) in MAY_BE_PATHS and value != "demo" and Path(value).expanduser().exists():
            found.append((key, [Path(value).expanduser()]))
    return found


def _settings(
    kind: type[Recipe], recipe: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, value) of every setting."""
    for name, about in kind.model_fields.items():
        inner, value = about.annotation, recipe.get(name)
        if isinstance(inner, type) and issubclass(inner, Recipe) and isinstance(value, Mapping):
            yield from _settings(inner, value, f"{prefix}{name}.")
        else:
            yield prefix + name, inner, value


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _check_inputs(kind: type[Recipe], recipe: Mapping[str, Any]) -> None:
    """Raises AxiconError for an input that is not there or is none of its kind. What only the hub can tell
    is left to the job."""
    for key, annotation, value in _settings(kind, recipe):
        if not value or key in OUTPUTS:
            continue
        if _takes_path(annotation):
            for place in [value] if isinstance(value, str) else value:
                if not Path(place).expanduser().exists():
                    raise AxiconError(f"{key}={place}: no such file or directory")
        elif _last(key) == "text":
            is_file(value)
        elif _last(key) == "model":
            what_is(value)


def _check_places(words: Iterable[str]) -> None:
    """Raises AxiconError for a word that can only be a path, where nothing is."""
    for word in words:
        only_path = "=" not in word and word.startswith(("/", "./", "../", "~"))
        if only_path and not Path(word).expanduser().exists():
            raise AxiconError(f"{word}: no such file or directory")


def _takes_path(annotation: Any) -> bool:
    return annotation is Path or any(_takes_path(part) for part in get_args(annotation))


def _looks_like_path(word: str) -> bool:
    plain = "=" not in word and ("/" in word or word.endswith((".yaml", ".yml", ".gguf")))
    return plain and Path(word).expanduser().exists()


def _absolute(word: str) -> str:
    return str(Path(word).expanduser().absolute())


def _warnings(named: Mapping[str, Sequence[Path]], recipe: Mapping[str, Any], sent: Path) -> tuple[str, ...]:
    """What may be missing on another machine, one line each."""
    said = []
    for key, paths in named.items():
        for path in paths:
            travels = not path.is_absolute() and (sent / path).exists()
            if key == "out" and not path.is_absolute():
                said.append(f"out={path} lies in the job's own folder and goes with it; give an absolute one")
            elif key != "out" and not travels:
                said.append(
                    f"{key}={path} is a path of this machine; it must exist on the cluster's nodes too"
                )
    if "out" in recipe and recipe["out"] is None:
        said.append("out= is not given: results lie in the job's own folder on its node and go with it")
    return tuple(said)


def stamp(path: Path) -> list[list[Any]]:
    """What tells that an input has changed: names, sizes and times of a file, or of all in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found.append([str(file), status.st_size, status.st_mtime_ns])
    return found
