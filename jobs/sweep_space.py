"""The space of a sweep: which settings of a recipe vary, what they may be, and under which conditions.

A setting is named by its dotted key in the recipe of the verb: `rule.lr`. A method within a chain is named by
itself: `chain.gptq.bits`. Where the method varies too, a setting counts only with methods that have it, so no
condition needs to be written for that.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from axicon.errors import AxiconError
from axicon.settings import Method, Recipe, named_methods, unknown_key
from jobs.sweep_recipe import ParameterRecipe
from jobs.sweep_verbs import Verb

Settings = dict[str, Any]
"""Values by the key of the parameter."""
RULES = "rules"
"""Setting of a method: `chain.gptq.rules.blocks.0.*.bits` is what it does to some products."""
MANY = 1000
"""A grid without a number of trials may have so many."""


@dataclass(frozen=True)
class Parameter:
    key: str
    kind: str
    values: tuple[Any, ...] = ()
    """Of a choice."""
    low: float = 0.0
    high: float = 0.0
    when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """It counts only where each of these parameters has one of the values."""

    def counts(self, settings: Settings) -> bool:
        return all(key in settings and settings[key] in values for key, values in self.when.items())

    def drawn(self, draw: random.Random) -> Any:
        if self.kind == "choice":
            return draw.choice(self.values)
        if self.kind == "integer":
            return draw.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return short(draw.uniform(self.low, self.high))
        return short(math.exp(draw.uniform(math.log(self.low), math.log(self.high))))

    def listed(self) -> Sequence[Any]:
        """All values. Raises AxiconError for a range of real numbers."""
        if self.kind == "choice":
            return self.values
        if self.kind == "integer":
            return range(int(self.low), int(self.high) + 1)
        raise AxiconError(f"space.{self.key}: a grid takes lists of values, not {self.kind}; list some")

    def as_json(self) -> dict[str, Any]:
        ends = (
            {"values": list(self.values)} if self.kind == "choice" else {"low": self.low, "high": self.high}
        )
        when = {key: list(values) for key, values in self.when.items()} or None
        return {"key": self.key, "kind": self.kind, **ends, "when": when}


def short(value: float) -> float:
    """Six digits: a person has to read and type it."""
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Space:
    """The parameters, those before others whose conditions name them."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, asked: Mapping[str, ParameterRecipe], verb: Verb, base: Mapping[str, Any]) -> Space:
        """Raises AxiconError for a key that the verb's recipe does not have, naming the nearest one."""
        if not asked:
            raise AxiconError("space: names nothing to vary; give one as space.SETTING=[VALUE,VALUE]")
        found = {key: _parameter(key, one, asked, verb, base) for key, one in asked.items()}
        ordered: dict[str, Parameter] = {}
        while rest := [one for key, one in found.items() if key not in ordered]:
            ready = [one for one in rest if all(key in ordered for key in one.when)]
            if not ready:
                raise AxiconError(f"space.{rest[0].key}: its condition depends on itself; mend when")
            ordered |= {one.key: one for one in ready}
        return cls(tuple(ordered.values()))

    def drawn(self, draw: random.Random) -> Settings:
        settings: Settings = {}
        for one in self.parameters:
            if one.counts(settings):
                settings[one.key] = one.drawn(draw)
        return settings

    def grid(self) -> Iterator[Settings]:
        """All combinations, the last parameter fastest. Raises AxiconError for a range."""
        for one in self.parameters:
            one.listed()
        yield from self._grid({}, 0)

    def _grid(self, settings: Settings, at: int) -> Iterator[Settings]:
        if at == len(self.parameters):
            yield settings
            return
        one = self.parameters[at]
        if not one.counts(settings):
            yield from self._grid(settings, at + 1)
            return
        for value in one.listed():
            yield from self._grid(settings | {one.key: value}, at + 1)

    @property
    def is_listed(self) -> bool:
        """Whether there are so many settings and no more."""
        return all(one.kind in ("choice", "integer") for one in self.parameters)

    def grid_size(self) -> int:
        """At most one more than MANY."""
        return sum(1 for _ in itertools.islice(self.grid(), MANY + 1))


def applied(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The base with these settings in place. What names a method is set before what a method has."""
    values = copy.deepcopy(dict(base))
    if "chain" in settings:  # in place of the base's method
        values.pop("compressor", None)
    for key in sorted(settings, key=lambda key: "." in key and not key.endswith(".method")):
        *path, last = key.split(".")
        place: Any = values
        pattern: list[str] = []
        if RULES in path:  # a pattern of product names has dots of its own
            at = path.index(RULES)
            path, pattern = path[:at], path[at + 1 :]
        for part in path:
            place = _within(place, part)
        if pattern:
            rules = place.setdefault(RULES, {})
            place = rules[".".join(pattern)] = dict(rules.get(".".join(pattern), {}))
        if last == "method" and place.get("method") != settings[key]:
            place.clear()  # what the base sets is of another method
        place[last] = copy.deepcopy(settings[key])
    return values


def _within(place: Any, part: str) -> Any:
    """A part of a recipe as plain data, in its long form from here on."""
    if isinstance(place, list):
        return _item(place, part)
    value = place.get(part)
    if part == "chain":
        value = [_long(one) for one in named_methods(value or [])]
    elif value is None or isinstance(value, str):
        value = {} if value is None else {"method": value}
    place[part] = value
    return value


def _long(method: Any) -> dict[str, Any]:
    return dict(method) if isinstance(method, Mapping) else {"method": method}


def _item(chain: list[dict[str, Any]], part: str) -> dict[str, Any]:
    if part.isdigit() and int(part) < len(chain):
        return chain[int(part)]
    for one in chain:
        if one.get("method") == part:
            return one
    raise AxiconError(f"space: chain has no {part}; it has {', '.join(str(one['method']) for one in chain)}")


def methods_in(chain: Any) -> list[str]:
    """Names of the methods of a chain as a recipe may have it."""
    return [str(_long(one).get("method")) for one in named_methods(chain or [])]


def _parameter(
    key: str,
    asked: ParameterRecipe,
    space: Mapping[str, ParameterRecipe],
    verb: Verb,
    base: Mapping[str, Any],
) -> Parameter:
    when = {name: _several(value) for name, value in (asked.when or {}).items()}
    for name in when:
        if name not in space:
            raise AxiconError(f"space.{key}: when names no parameter: {unknown_key(name, list(space))}")
    when |= _implied(key, space, verb, base)
    if asked.choice is not None:
        return Parameter(key, "choice", values=asked.choice, when=when)
    low, high = getattr(asked, asked.kind)
    return Parameter(key, asked.kind, low=low, high=high, when=when)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _implied(
    key: str, space: Mapping[str, ParameterRecipe], verb: Verb, base: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """The condition that lies in the key itself. Raises AxiconError for a key of nothing."""
    kind: Any = verb.recipe
    parts = key.split(".")
    for at, part in enumerate(parts):
        if part not in kind.model_fields:
            known = [".".join([*parts[:at], name]) for name in kind.model_fields]
            raise AxiconError(f"space: {unknown_key(key, known)}")
        annotation = kind.model_fields[part].annotation
        if _names_method(annotation):
            return _of_method(key, parts[: at + 1], parts[at + 1 :], space, verb, base)
        rest = parts[at + 1 :]
        if isinstance(annotation, type) and issubclass(annotation, Recipe):
            kind = annotation
            if not rest:
                example = f"{key}.{next(iter(kind.model_fields))}"
                raise AxiconError(f"space.{key}: it has settings of its own, such as {example}")
        elif rest:
            raise AxiconError(f"space: unknown key {key!r}: {'.'.join(parts[: at + 1])} has no {rest[0]}")
    return {}


def _names_method(annotation: Any) -> bool:
    return annotation is Method or any(_names_method(part) for part in get_args(annotation))


def _of_method(
    key: str,
    place: Sequence[str],
    rest: Sequence[str],
    space: Mapping[str, ParameterRecipe],
    verb: Verb,
    base: Mapping[str, Any],
) -> dict[str, tuple[Any, ...]]:
    """The condition of a setting of a method: that the method, where it varies too, is one that has it."""
    table, where = verb.tables[place[-1]], ".".join(place)
    is_chain = place[-1] == "chain"
    if not rest or (rest == ["method"] and not is_chain):
        return {}
    decides, values = _choices(where, space, base)
    if is_chain:
        name, *rest = rest
        have = [one for one in values if name in methods_in(one) or name.isdigit()]
        names = {name} if not name.isdigit() else {m for one in values for m in methods_in(one)}
        if not have:
            there = sorted({f"{where}.{m}" for one in values for m in methods_in(one)})
            raise AxiconError(f"space: {unknown_key('.'.join([where, name]), there)}")
    else:
        names = {_named(one) for one in values}
        have = list(values)
    if rest[0] == RULES and len(rest) > 2:
        rest = [rest[-1]]
    if len(rest) != 1:
        raise AxiconError(f"space: unknown key {key!r}: a setting of a method is {where}.NAME")
    known = {name: {f.name for f in dataclasses.fields(table[name])} for name in names if name in table}
    knowing = {name for name, settings in known.items() if rest[0] in settings or rest[0] == "method"}
    if not knowing:
        ahead = key.rpartition(".")[0]
        every = sorted({f"{ahead}.{setting}" for settings in known.values() for setting in settings})
        raise AxiconError(f"space: {unknown_key(key, every)}")
    kept = [one for one in have if is_chain or _named(one) in knowing]
    if decides is None or len(kept) == len(values):
        return {}
    return {decides: tuple(kept)}


def _choices(
    where: str, space: Mapping[str, ParameterRecipe], base: Mapping[str, Any]
) -> tuple[str | None, tuple[Any, ...]]:
    """The parameter that says which method it is, and its values; None and the base's own without one."""
    for decides in (f"{where}.method", where):
        if decides in space and space[decides].choice is not None:
            return decides, tuple(space[decides].choice or ())
    value: Any = base
    for part in where.split("."):
        value = (value or {}).get(part) if isinstance(value, Mapping) else None
    return None, (value,)


def _named(value: Any) -> str:
    return str(value.get("method")) if isinstance(value, Mapping) else str(value)


def key_of(settings: Settings) -> str:
    """The same for equal settings."""
    return json.dumps(settings, sort_keys=True, default=str)
