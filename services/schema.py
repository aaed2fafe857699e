"""Request bodies, and nothing but what this deployment can honour.

Parsing is strict: an unknown field, a value of another JSON type, NaN, a lone surrogate or text after the
object is refused with one sentence that names the field. Bounds that need the model or the recipe (context
length, vocabulary, how many choices) are checked in `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from services.errors import ApiError, bad_request

MOST_ERRORS = 50
"""With more problems than this in one body, their number is reported instead of the first one: listing them
all costs more than the request is worth."""


def refuse(value: object) -> None:
    """Accept only null, which clients send for what they do not use."""
    if value is not None:
        raise PydanticCustomError("unsupported", "not supported by this deployment; leave it out")


Refused = Annotated[None, PlainValidator(refuse), WithJsonSchema({"type": "null"})]
"""A field of the OpenAI API that is known, and not served."""


def read_prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, token ids, or a list of lists of token ids: always as a batch."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, list) and all(type(t) is int for t in item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


def read_ids(value: object) -> tuple[int, ...]:
    """Token ids."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError("must be a list of token ids")
    return tuple(value)


def read_stop_ids(value: object) -> tuple[int, ...]:
    """Token ids, or null for none."""
    return () if value is None else read_ids(value)


def read_stops(value: object) -> tuple[str, ...]:
    """One stop string or several."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if "" in stops:
        raise ValueError("a stop string must not be empty")
    return tuple(stops)


def read_content(value: object) -> str:
    """A text, or text parts as some clients send them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError(
                "unsupported",
                "only parts of type 'text' are supported: this model reads no images, audio or files",
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('a text part is {"type": "text", "text": "..."}')
        texts.append(part["text"])
    return "".join(texts)


def read_format(value: object) -> None:
    """`response_format` may only say what happens anyway."""
    if value is not None and value != {"type": "text"}:
        raise PydanticCustomError(
            "unsupported",
            'only {{"type": "text"}} is supported: this deployment does not constrain its output',
        )


def read_modalities(value: object) -> None:
    if value is not None and value != ["text"]:
        raise PydanticCustomError("unsupported", 'only ["text"] is supported')


def read_tool_choice(value: object) -> None:
    if value is not None and value != "none":
        raise PydanticCustomError("unsupported", "not supported by this deployment; leave it out")


TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        TOKEN_IDS,
        {"type": "array", "items": TOKEN_IDS, "minItems": 1},
    ]
}
STOP_IDS: dict[str, Any] = {
    "anyOf": [{"type": "array", "items": {"type": "integer", "minimum": 0}}, {"type": "null"}]
}
STOP: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        {"type": "null"},
    ]
}
TEXT_PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
CONTENT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART, "minItems": 1}]
}
TEXT_FORMAT: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}},
    "required": ["type"],
    "additionalProperties": False,
}

TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    """What every request body has in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None


class SpeculationBody(Body):
    """How tokens are guessed ahead; what it may say is `axicon.generate.request.Speculation`."""

    method: Literal["none", "chain", "k_seq", "lookup", "multi_round", "rsd_c", "rsd_s"]
    width: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    verify: Literal["rrs", "coupled"] | None = None


class KVBody(Body):
    """How much of its cache a request keeps; what it may say is `axicon.generate.request.KVSettings`."""

    policy: Literal["full", "h2o", "key_norm", "snapkv", "tova", "window"]
    budget: float | None = Field(None, gt=0)
    recent: float | None = Field(None, ge=0)
    sinks: int | None = Field(None, ge=0)
    evict_every: int | None = Field(None, ge=1)
    score: Literal["sum", "mean", "decay"] | None = Field(
        None, description="How h2o adds up attention; null: sum. Other policies have no choice of it."
    )


class Sampling(Body):
    """The fields both generation routes share. Null always means the default."""

    model: str | None = None
    details: bool | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = None
    kv: KVBody | None = None
    logit_bias: dict[TokenKey, Bias] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    seed: Seed | None = None
    speculation: SpeculationBody | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(read_stops), WithJsonSchema(STOP)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(read_stop_ids), WithJsonSchema(STOP_IDS)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Sampling):
    """`POST /v1/completions`."""

    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(read_prompts), WithJsonSchema(PROMPT)]
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=0)
    suffix: Refused = None


class Message(Body):
    """One message of a chat. The fields that must be null are the ones a client sends back with an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(read_content), WithJsonSchema(CONTENT)]
    name: str | None = None
    annotations: Refused = None
    audio: Refused = None
    function_call: Refused = None
    refusal: Refused = None
    tool_calls: Refused = None


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=2048)]
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0)
    modalities: Annotated[
        None,
        PlainValidator(read_modalities),
        WithJsonSchema({"anyOf": [{"const": ["text"]}, {"type": "null"}]}),
    ] = None
    response_format: Annotated[
        None, PlainValidator(read_format), WithJsonSchema({"anyOf": [TEXT_FORMAT, {"type": "null"}]})
    ] = None
    tool_choice: Annotated[
        None, PlainValidator(read_tool_choice), WithJsonSchema({"enum": ["none", None]})
    ] = None
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    metadata: Refused = None
    moderation: Refused = None
    parallel_tool_calls: Refused = None
    prediction: Refused = None
    prompt_cache_key: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Refused = None
    reasoning_effort: Refused = None
    safety_identifier: Refused = None
    service_tier: Refused = None
    store: Refused = None
    tools: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None


class TokenizeBody(Body):
    """`POST /tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: Annotated[tuple[int, ...], PlainValidator(read_ids), WithJsonSchema(TOKEN_IDS)]
    model: str | None = None


class LoadAdapterBody(Body):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str
    follow: bool | None = None


class UnloadAdapterBody(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str


BODIES: Sequence[type[Body]] = (
    CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, LoadAdapterBody, UnloadAdapterBody,
)  # fmt: skip

B = TypeVar("B", bound=Body)


def parse(kind: type[B], raw: bytes) -> B:
    """The body of a request. Raises `ApiError` 400 that names the first field at fault."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """One sentence and a code about the first problem."""
    if error.error_count() > MOST_ERRORS:
        return bad_request(f"The body has {error.error_count()} invalid fields.", code="invalid_body")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, text, param = first["type"], first["msg"].removeprefix("Value error, "), _path(first["loc"])
    if kind == "json_invalid":
        return bad_request(f"The body is not valid JSON in UTF-8: {text}.", code="invalid_json")
    if not first["loc"]:
        return bad_request("The body must be a JSON object.", code="invalid_body")
    if kind == "extra_forbidden":
        return bad_request(f"'{param}': unknown field.", param, "unknown_field")
    if kind == "missing":
        return bad_request(f"'{param}': required.", param, "missing_field")
    return bad_request(
        f"'{param}': {text}.", param, "unsupported" if kind == "unsupported" else "invalid_value"
    )


def _path(location: tuple[int | str, ...]) -> str:
    """`('messages', 0, 'content')` as a person writes it: `messages[0].content`. Long names are cut."""
    path = ""
    for part in location:
        if part != "[key]":
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200]
