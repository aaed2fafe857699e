"""Typed recipes: what a run is asked to do, with every setting named and bounded.

A recipe is a frozen pydantic model, one class per verb. It comes from `key=value` words of the command line,
from `args` of a Serve configuration, from a file, or from Python; all are checked in the same place. Values
typed on a command line are text, and the field they are for says what they become, so `served_name=1` is a
name and `port=1` is a number. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from axicon.errors import AxiconError

if TYPE_CHECKING:
    from axicon.protocols import Compressor

T = TypeVar("T")
Dtype = Literal["bfloat16", "float32"]


def split_words(value: Any) -> Any:
    """`a,b` typed for a list means two items."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(split_words)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(split_words)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digests = Annotated[tuple[Digest, ...], BeforeValidator(split_words)]


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
        merged = _merge(values, parse_overrides(overrides))
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise AxiconError(explain(cls, error)) from None

    def as_yaml(self) -> str:
        """The resolved recipe, as it is shown by `--show` and saved beside a result."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class RequestLimits(Recipe):
    """The most one request may ask for, checked before anything is allocated."""

    body_bytes: int = Field(4 * 2**20, ge=1024, description="size of a request body; more is a 413")
    prompts: int = Field(256, ge=1, description="prompts in one request")
    prompt_tokens: int | None = Field(None, ge=1, description="tokens of one prompt; none: all that fit")
    output_tokens: int | None = Field(None, ge=1, description="tokens per choice; none: all that fit")
    n: int = Field(16, ge=1, description="choices of one prompt")
    stops: int = Field(16, ge=0, description="stop strings, and stop token ids")
    stop_chars: int = Field(256, ge=1, description="characters of one stop string")
    logprobs: int = Field(20, ge=0, description="alternatives reported per token")
    logit_bias: int = Field(1024, ge=0, description="entries of logit_bias")


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

AUTO = Method(method="auto")
SERVED_BY_DEFAULT = Method.model_validate({"method": "llm_int8", "relative": 5.0})
"""What `auto` means for bfloat16 where the C++ kernels run. The paper's threshold of 6 alone loses 2 % of
perplexity on the embedded model, outliers from 5 root mean squares on 0.5 %, at the same speed
(docs/results.md)."""


class ModelRecipe(Recipe):
    """Which model, and what it becomes before it is used."""

    model: str = Field("demo", min_length=1, description="demo, a model directory, a .gguf file, or a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub id; none: its main branch")
    offline: bool | None = Field(None, description="never ask the hub; none: as HF_HUB_OFFLINE says")
    dtype: Dtype = Field("bfloat16", description="numbers the model computes in")
    compressor: OptionalMethod = Field(
        AUTO, description="applied after loading: auto is int8 if kernels run it, none is nothing"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="compute threads; none: one per core")

    def build_compressor(self, packed: Sequence[str] = ()) -> Compressor | None:
        """What to do to the model after loading.

        `packed` are the formats it is stored in, if it was compressed before: then there is nothing to do.
        Raises AxiconError for a method named nevertheless, and for one that needs data.
        """
        from axicon.compress import COMPRESSORS
        from axicon.kernels import native

        method = self.compressor
        if packed and method is not None and method != AUTO:
            raise AxiconError(
                f"compressor={method.method}: {self.model} is compressed already ({', '.join(packed)}); "
                "leave compressor out, or name the dense model it was made from"
            )
        if packed:
            return None
        if method == AUTO:
            # In torch, int8 is slower than bfloat16 (0.6 of it, measured): only the kernels make it pay.
            fast = self.dtype == "bfloat16" and native.why_unavailable() is None
            method = SERVED_BY_DEFAULT if fast else None
        if method is None:
            return None
        compressor = method.build(COMPRESSORS, "compressor")
        if compressor.needs_inputs:
            raise AxiconError(
                f"compressor={method.method} looks at data, which is done once: "
                f"axicon compress {method.method} model={self.model} out=DIR, then name DIR"
            )
        return compressor


class KVRecipe(Recipe):
    """What a request's cache keeps that does not say otherwise."""

    policy: Literal["full", "h2o", "key_norm", "snapkv", "tova", "window"] = Field(
        "full", description="of requests that name none; full keeps everything"
    )
    budget: float = Field(0.2, gt=0, description="slots kept per head: up to 1 a share of the prompt")
    recent: float | None = Field(None, ge=0, description="newest among them; none: as the policy does")
    sinks: int = Field(4, ge=0, le=64, description="first ones among them")
    evict_every: int = Field(16, ge=1, le=256, description="tokens from one eviction to the next")


class ServeRecipe(ModelRecipe):
    """What one endpoint serves; the argument of `services.app:build`."""

    served_name: str | None = Field(None, min_length=1, description="name clients use; none: the model's own")
    kv_gib: float | None = Field(None, gt=0, description="memory for keys and values; none: by what is free")
    kv: KVRecipe = Field(KVRecipe(), description="cache policy of requests that name none")
    kv_floor: int = Field(32, ge=1, description="smallest cache budget of a request, in slots")
    max_rows: int = Field(64, ge=1, le=1024, description="choices generated at the same time")
    prefill_chunk: int = Field(256, ge=16, le=8192, description="prompt tokens computed per step")
    max_queue: int = Field(256, ge=0, description="choices that may wait; more is a 429")
    max_model_len: int | None = Field(None, ge=2, description="prompt plus output; none: all the model knows")
    draft: str | None = Field(
        None, description="model that guesses ahead: skip:20 is this one with 20 blocks; or a model"
    )
    draft_nodes: int = Field(64, ge=1, le=1024, description="guessed tokens of one request checked at once")
    limits: RequestLimits = Field(RequestLimits(), description="the most one request may ask for")
    request_timeout_s: float = Field(600, gt=0, description="a request that takes longer is ended")
    stall_s: float = Field(30, gt=0, description="/health fails when work waits this long without a step")
    api_keys_env: str | None = Field(None, min_length=1, description="variable with API keys, comma between")
    api_key_hashes: Digests = Field((), description="SHA-256 digests of API keys, in hex")
    allowed_hosts: Words = Field((), description="without keys: host names to answer to beside loopback ones")

    def api_key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 digests of the keys accepted. Raises AxiconError if asked-for keys are missing."""
        digests = [bytes.fromhex(text) for text in self.api_key_hashes]
        if self.api_keys_env is not None:
            keys = split_words(os.environ.get(self.api_keys_env, ""))
            if not keys:
                raise AxiconError(
                    f"api_keys_env={self.api_keys_env}: this environment variable holds no key; "
                    f"set it, for example to $(openssl rand -hex 24), or leave api_keys_env out"
                )
            digests += [hashlib.sha256(key.encode()).digest() for key in keys]
        return tuple(digests)


class LocalServeRecipe(ServeRecipe):
    """`axicon serve`: an endpoint, and where on this machine it answers."""

    host: str = Field("127.0.0.1", min_length=1, description="where to listen; beyond loopback with keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    cluster: Path | None = Field(None, description="cluster.yaml that describes the local node")
    dashboard_port: int | None = Field(
        None, ge=1, le=65535, description="run Ray's dashboard, which `ray job submit` needs, on this port"
    )
    ready_s: float = Field(600, gt=0, description="give up when the model does not answer within this time")

    def app_args(self) -> dict[str, Any]:
        """The part that `services.app:build` takes, as plain data."""
        return self.model_dump(mode="json", include=set(ServeRecipe.model_fields))


class CalibrationRecipe(Recipe):
    """The sample that a method looks at which needs data. It changes the result, `activations` does not."""

    text: str | None = Field(None, description="text file or hub data set; none: the model writes one itself")
    column: str = Field("text", description="the field that holds the text of a record")
    windows: int = Field(32, ge=1, description="windows of the sample")
    window: int = Field(512, ge=2, description="tokens per window of the sample")
    seed: int = Field(0, ge=0, description="of which windows of the text, or of what the model writes")
    inputs: Literal["sequential", "dense"] = Field(
        "sequential", description="what a block is shown: output of compressed blocks, or of the dense model"
    )
    activations: Literal["auto", "memory", "disk"] = Field(
        "auto", description="where hidden states lie between blocks; auto: memory if they take half of it"
    )


class CompressRecipe(ModelRecipe):
    """How a model is made smaller, where the result lies, and what is measured of it."""

    compressor: Annotated[Method, BeforeValidator(named_method)] = Field(
        SERVED_BY_DEFAULT, description="the method; its settings beside it, as compressor.NAME"
    )
    calibration: CalibrationRecipe = Field(CalibrationRecipe(), description="sample, for methods with data")
    out: Path | None = Field(None, description="directory to make; none: artifacts/models/MODEL-METHOD")
    measure: bool = Field(
        True, description="false: no speed, memory, greedy texts, activations; `axicon card` can later"
    )
    text: str | None = Field(None, description="perplexity before and after on this text or hub data set")
    column: str = Field("text", description="the field that holds the text of a record")
    window: int = Field(2048, ge=2, description="tokens per perplexity window")
    windows: int | None = Field(None, ge=1, description="only the first so many windows; none: all")


class EvaluateRecipe(ModelRecipe):
    """What to measure of a model: perplexity on a text, tasks of lm-eval, speed, or several of them."""

    compressor: OptionalMethod = Field(None, description="applied after loading, such as llm_int8")
    text: str | None = Field(None, description="perplexity on this text file or hub data set")
    column: str = Field("text", description="the field that holds the text of a record")
    window: int = Field(2048, ge=2, description="tokens per perplexity window")
    windows: int | None = Field(None, ge=1, description="only the first so many windows; none: all")
    tasks: Words = Field((), description="lm-eval task names, comma between")
    data: Path | None = Field(None, description="folder with the data files of the tasks shipped with axicon")
    include: Paths = Field((), description="folders with further lm-eval task files")
    num_fewshot: int | None = Field(None, ge=0, description="examples shown; none: as the task says")
    speed: bool = Field(False, description="true: also tokens/s at 1 and 8 streams, in bfloat16")
    limit: int | None = Field(None, ge=1, description="only the first so many questions of a task; none: all")
    batch: int = Field(1, ge=1, description="perplexity windows per pass; changes speed and memory only")
    seed: int = Field(1234, ge=0, description="of few-shot choice")
    out: Path | None = Field(None, description="folder for results; none: artifacts/evaluate")


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b.c=x"]` to `{"a": "1", "b": {"c": "x"}}`.

    A value stays text for the field to read, except that `none` or `null` is None, and brackets or braces are
    YAML. Raises AxiconError for a word without `=`, an empty key, a key given twice, and broken YAML.
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
    if text[:1] not in ("[", "{"):
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
    about = f" ({known[key]})" if key in known else ""
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
        if isinstance(field.annotation, type) and issubclass(field.annotation, Recipe):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, nested mappings key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
