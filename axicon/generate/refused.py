"""Which settings of a request exclude each other, found by asking what checks requests.

Nothing is listed here: a pair that starts or ceases to work shows by itself, in `GET /v1/capabilities` and in
docs/combinations.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from axicon.generate.drafting import DRAFTERS
from axicon.generate.eviction import KV_POLICIES
from axicon.generate.request import KVSettings, Limits, Request, RequestError, SamplingParams, Speculation
from axicon.generate.retention import FULL

POLICIES = (FULL, *KV_POLICIES)
METHODS = tuple(DRAFTERS)

Check = Callable[[Request], None]
"""`Engine.check`, or something as strict."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that a request may ask for."""

    kind: str
    """Settings of one kind exclude each other anyway."""
    fields: Mapping[str, Any]
    """As the body of a request over HTTP says it."""
    kv: KVSettings | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`."""

    def on(self, request: Request) -> Request:
        return replace(request, kv=self.kv or request.kv, params=replace(request.params, **self.params))


@dataclass(frozen=True, slots=True)
class Refused:
    """Settings that are refused: one by itself, or two that work apart."""

    settings: tuple[Setting, ...]
    param: str | None
    sentence: str

    @property
    def fields(self) -> dict[str, Any]:
        """Of a body that is refused."""
        return {name: value for setting in self.settings for name, value in setting.fields.items()}


def settings() -> Iterator[Setting]:
    """Every policy, every way to guess, and what else asks something of the cache."""
    for name in POLICIES:
        yield Setting("kv", {"kv": {"policy": name}}, kv=KVSettings(policy=name))
    for name in METHODS:
        guess = Speculation(method=name)
        yield Setting("speculation", {"speculation": {"method": name}}, params={"speculation": guess})
    yield Setting("scored", {"echo": True, "logprobs": 0}, params={"prompt_logprobs": 0, "logprobs": 0})


def refused(check: Check, longest: int, limits: Limits) -> list[Refused]:
    """`longest` is what prompt and answer may have together, in tokens."""
    # Long enough that a policy with its own settings has something to give up.
    prompt = [0] * max(1, min(longest - 16, 2 * limits.kv_floor + 64))
    plain = Request(id="asked", prompt=prompt, params=SamplingParams(max_tokens=16))

    def ask(*asked: Setting) -> Refused | None:
        request = plain
        for setting in asked:
            request = setting.on(request)
        try:
            check(request)
        except RequestError as error:
            return Refused(asked, error.param, str(error))
        return None

    known = list(settings())
    alone = [found for setting in known if (found := ask(setting)) is not None]
    out = {id(found.settings[0]) for found in alone}
    works = [setting for setting in known if id(setting) not in out]
    pairs = [ask(a, b) for a, b in combinations(works, 2) if a.kind != b.kind]
    return alone + [pair for pair in pairs if pair is not None]
