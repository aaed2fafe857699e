"""How settings are read: from `key=value` words, files and Python, all checked in one place.

Values typed on a command line are text, and the field they are for says what they become, so `served_name=1`
is a name and `port=1` is a number. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from axicon.errors import AxiconError

T = TypeVar("T")


def split_words(value: Any) -> Any:
    """`a,b` typed for a list means two items."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(split_words)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(split_words)]


class Recipe(BaseModel):
    """What all recipes share: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )

    @classmethod
    def parse(cls, overrides: Sequence[str] = (), /, **values: Any) -> Self:
        """A recipe from values and, over them, `key=value` words.

        Raises AxiconError, one line that names the first wrong key and what it takes.
        """
        merged = laid(values, parse_overrides(overrides))
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise AxiconError(explain(cls, error)) from None

    def inside(self) -> Iterator[tuple[type[Recipe], Mapping[str, Any]]]:
        """Recipes of other verbs that are part of this one: their kind, and what is given of them.

        Raises AxiconError for one that cannot be read.
        """
        yield from ()

    def as_yaml(self) -> str:
        """The resolved recipe, as it is shown by `--show` and saved beside a result."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Method(Recipe):
    """A method by its name in its family's table, with its settings beside it.

    `compressor=llm_int8` is the method with its defaults; `compressor.method=llm_int8 compressor.threshold=6`
    sets some.
    """

    model_config = ConfigDict(extra="allow")
    method: str = Field(min_length=1, description="name of the method")

    def build(self, table: Mapping[str, type[T]], key: str) -> T:
        """The method as an object. Raises AxiconError for an unknown name or setting, or a wrong value."""
        cls = table.get(self.method)
        if cls is None:
            raise AxiconError(f"{key}={self.method}: known are {', '.join(sorted(table))}")
        settings = self.model_extra or {}
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in settings:
            if name not in known:
                raise AxiconError(f"{key}: {unknown_key(name, known)}")
        try:
            return TypeAdapter(cls).validate_python(settings)
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            where = ".".join([key, *(str(part) for part in details["loc"])])
            raise AxiconError(f"{_typed(where, details)}: {_reason(details)}") from None


def named_method(value: Any) -> Any:
    """A name typed for a method means the method with its defaults."""
    return {"method": value} if isinstance(value, str) else value


OptionalMethod = Annotated[Method | None, BeforeValidator(named_method)]

def named_methods(value: Any) -> Any:
    """Methods in order, each a name or a mapping; `wanda,gptq` typed for a list means two."""
    value = split_words(value)
    return [named_method(one) for one in value] if isinstance(value, list | tuple) else value


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b.c=x"]` to `{"a": "1", "b": {"c": "x"}}`.

    A value stays text for the field to read, except that `none` or `null` is None, and brackets or braces are
    YAML, other than those a Jinja template begins with. Raises AxiconError for a word without `=`, an empty
    key, a key given twice, and broken YAML.
    """
    result: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        parts = key.split(".")
        if not sign or not all(part.isidentifier() for part in parts):
            raise AxiconError(f"cannot read {word!r}: settings are given as key=value, for example port=8001")
        place = result
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise AxiconError(f"{key}: {part} already has a value of its own; give one or the other")
        if parts[-1] in place:
            raise AxiconError(f"{key} is given twice; keep one")
        place[parts[-1]] = _value(key, text)
    return result


def _value(key: str, text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if text[:1] not in ("[", "{") or text.startswith(("{{", "{%")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise AxiconError(f"{key}={text}: the brackets do not close or the list is no valid YAML") from None


def explain(cls: type[Recipe], error: ValidationError) -> str:
    """The first problem of a validation as one line: which key, what is wrong, what it takes.

    An unknown key comes before all else: it may be what is missing, spelt otherwise.
    """
    errors = error.errors(include_url=False)
    details = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in details["loc"])
    known = dict(fields(cls))
    if details["type"] == "extra_forbidden":
        *place, _ = details["loc"]
        if any(isinstance(part, int) for part in place):
            item = ".".join(map(str, place))
            return unknown_key(key, [f"{item}.{name}" for name, _ in fields(_item(cls, place))])
        return unknown_key(key, [*known, *sorted({name.partition(".")[0] for name in known if "." in name})])
    if details["type"] == "missing":
        return f"{key} is missing"
    if details["type"] in ("model_type", "dict_type"):
        example = next(name for name in known if name.startswith(f"{key}."))
        return f"{_typed(key, details)}: {key} has settings of its own, such as {example}=..."
    about = f" ({known[key]})" if known.get(key) else ""
    return f"{_typed(key, details)}: {_reason(details)}{about}"


def _item(cls: type[Recipe], place: Sequence[str | int]) -> type[Recipe]:
    """The recipe that is an item of a list, where names of fields and numbers of items lead to it."""
    for part in place:
        if isinstance(part, str) and part in cls.model_fields:
            kinds = get_args(cls.model_fields[part].annotation) or (cls.model_fields[part].annotation,)
            cls = next((one for one in kinds if isinstance(one, type) and issubclass(one, Recipe)), cls)
    return cls


def _typed(key: str, details: ErrorDetails) -> str:
    """The setting as it was typed. Never what was given for a key: it may be the secret itself."""
    if key.startswith("api_key"):
        return key
    value = "none" if details["input"] is None else str(details["input"])
    return f"{key}={value if len(value) <= 80 else value[:77] + '...'}"


def _reason(details: ErrorDetails) -> str:
    text = details["msg"].removeprefix("Value error, ")
    text = text.replace("Input should", "must").replace("String should", "must")
    return text[:1].lower() + text[1:]


def unknown_key(key: str, known: Sequence[str]) -> str:
    """One line about a key that does not exist."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {key!r}: {hint}"


def fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, description) of every setting."""
    for name, field in cls.model_fields.items():
        if field.annotation is Method:  # what it is for says more than that it is a name
            yield f"{prefix}{name}.method", field.description or ""
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Recipe):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


def laid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, nested mappings key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = laid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
