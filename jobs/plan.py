"""What is to be submitted, made out and checked on this machine before anything is sent.

A verb checks its own words: `--show` prints the resolved recipe and does nothing. What it names on this
machine's disk must be there and is made absolute when the cluster runs here too, and is warned about when
it does not.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import click
import yaml

from axicon.data.text import is_file
from axicon.errors import AxiconError
from axicon.model.artefact import CARD, MANIFEST, README, REPORT
from axicon.model.hub import what_is
from axicon.settings import Recipe

NOT_JOBS = {
    "serve": "it holds a cluster of its own; `axicon deploy` serves on a cluster",
    "submit": "give the verb that is to run",
    **dict.fromkeys(("up", "down", "deploy", "status", "render", "cache"), "it is for this machine"),
}
FILES = ("text", "train", "evaluate", "source")
MAY_BE_PATHS = ("model", *FILES)
"""Settings that take a path beside other things, by the last part of their key."""
EMBEDDED = ("demo", "digits")
"""Names that such settings know, whatever lies here."""
MEASURED = (REPORT, CARD, README)
"""Files of a model directory that say what it is worth, and not what it is."""
READ_FIGURES = ("card", "compare")
"""Verbs that read them."""
OUTPUTS = ("out", "plot", "calibration.shared")
"""Settings that name what the job makes or adds to."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    verb: str
    words: tuple[str, ...]
    """After the verb, as the job gets them."""
    recipe: Mapping[str, Any]
    """Resolved, as plain data; empty for a verb without."""
    inputs: tuple[Path, ...] = ()
    """Files and folders of this machine that the job reads."""
    inside: tuple[Mapping[str, Any], ...] = ()
    """What is given of other verbs' recipes within this one."""
    place: Path | None = None
    """Folder of this machine where the job looks for relative paths; None: its own."""
    warnings: tuple[str, ...] = ()

    @property
    def entrypoint(self) -> str:
        # `exec`: the signal that stops the job reaches Python, and its exit code is the job's.
        return f"exec python -m jobs {shlex.join([self.verb, *self.words])}"

    def name(self, code: str) -> str:
        """The submission id: the same verb, recipe, inputs and code have the same one."""
        asked = self.recipe or {"words": self.words}
        told_of = [self.verb, asked, *self.inside, code, self.stamps()]
        if "out" in asked and asked["out"] is None and self.place is not None:
            told_of.append(str(self.place))  # results go into a folder there
        told = json.dumps(told_of, sort_keys=True, default=str)
        method, model = (asked.get("compressor") or {}).get("method"), asked.get("model")
        parts = [self.verb, *(Path(str(part)).name for part in (method, model) if part)]
        readable = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts))[:60].strip("-")
        return f"{readable}-{sha256(told.encode()).hexdigest()[:8]}"

    def stamps(self) -> list[list[Any]]:
        """What tells that an input has changed: names, sizes and times of all its files.

        What was measured of a model is part of it only for a verb that reads that: an evaluation writes it,
        and is the same job afterwards.
        """
        spared = () if self.verb in READ_FIGURES else MEASURED
        found: list[list[Any]] = []
        for path in self.inputs:
            model = path.is_dir() and (path / MANIFEST).is_file()
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if model and file.parent == path and file.name in spared:
                    continue
                with contextlib.suppress(OSError):
                    status = file.stat()
                    found.append([str(file), status.st_size, status.st_mtime_ns])
        return found


def make(group: click.Group, verb: str, words: Sequence[str], *, here: bool, sent: Path) -> Plan:
    """Check the words, and settle what they mean on the cluster. Raises AxiconError.

    here: the cluster runs on this machine. sent: the working directory that goes along.
    """
    command = group.commands.get(verb)
    if command is None:
        near = difflib.get_close_matches(verb, group.commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`axicon --help` lists them"
        raise AxiconError(f"no such verb {verb!r}: {hint}")
    if verb in NOT_JOBS:
        raise AxiconError(f"{verb} cannot be submitted: {NOT_JOBS[verb]}")
    _refuse_own_options(group, verb, words)
    words = [_absolute(word) if here and _looks_like_path(word) else word for word in words]
    recipe = _resolved(command, verb, words)
    kind: type[Recipe] | None = getattr(command, "recipe", None)
    if kind is None or not recipe:
        if here:
            _check_places(words)
        paths = [word for word in words if "=" not in word and Path(word).exists()] if here else []
        places = tuple(_placed(word, paths) if here else word for word in words)
        inputs = tuple(Path(_absolute(path)) for path in paths)
        return Plan(verb=verb, words=places, recipe={}, inputs=inputs, place=Path.cwd() if here else None)
    named, parts = dict(_paths(kind, recipe)), list(_inside(kind, recipe))
    inner = [found for part in parts for found in _paths(*part)]
    if not here:
        warnings = _warnings([*named.items(), *inner], recipe, sent)
        return Plan(verb=verb, words=tuple(words), recipe=recipe, warnings=warnings)
    for part in ((kind, recipe), *parts):
        _check_inputs(*part)
    changed = {key: ",".join(str(path.absolute()) for path in paths) for key, paths in named.items()}
    kept = [word for word in words if word.partition("=")[0] not in changed]
    final = [*kept, *(f"{key}={value}" for key, value in changed.items())]
    inputs = tuple(
        path.absolute() for key, paths in (*named.items(), *inner) if key not in OUTPUTS for path in paths
    )
    return Plan(
        verb=verb,
        words=tuple(final),
        recipe=_resolved(command, verb, final),
        inputs=inputs,
        inside=tuple(values for _, values in parts),
        place=Path.cwd(),
    )


def _inside(
    kind: type[Recipe], recipe: Mapping[str, Any]
) -> Iterator[tuple[type[Recipe], Mapping[str, Any]]]:
    """Recipes within a recipe, and within those: a sweep that is a step of a run has a base."""
    if kind.inside is Recipe.inside:
        return
    for part in kind.parse(**recipe).inside():
        yield part
        yield from _inside(*part)


def _refuse_own_options(group: click.Group, verb: str, words: Sequence[str]) -> None:
    """Raises AxiconError for an option of submit behind the verb, which is the verb's place."""
    theirs, ours = (
        {text for option in one.params if isinstance(option, click.Option) for text in option.opts}
        for one in (group.commands[verb], group.commands["submit"])
    )
    for word in words:
        if (option := word.partition("=")[0]) in ours - theirs:
            raise AxiconError(f"{option} is an option of submit: give it before {verb}")


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
        elif _last(key) in MAY_BE_PATHS and value not in EMBEDDED:
            found += [(key, [path])] if (path := Path(value).expanduser()).exists() else []
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
        if not value or key in OUTPUTS or value in EMBEDDED or "{" in str(value):  # {NAME}: a step's result
            continue
        if _takes_path(annotation):
            for place in [value] if isinstance(value, str) else value:
                if not Path(place).expanduser().exists():
                    raise AxiconError(f"{key}={place}: no such file or directory")
        elif _last(key) in FILES and isinstance(value, str):
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


def _placed(word: str, paths: Sequence[str]) -> str:
    """A word of a verb without a recipe, with the path that it names made absolute."""
    key, sign, value = word.partition("=")
    if sign and key in OUTPUTS:
        return f"{key}={_absolute(value)}"
    return _absolute(word) if word in paths else word


def _absolute(word: str) -> str:
    return str(Path(word).expanduser().absolute())


def _warnings(
    named: Iterable[tuple[str, Sequence[Path]]], recipe: Mapping[str, Any], sent: Path
) -> tuple[str, ...]:
    """What may be missing on another machine, one line each."""
    said = []
    for key, paths in named:
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
