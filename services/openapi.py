"""The OpenAPI description of this server: routes, request schemas with this deployment's limits, answers,
errors.

Written here rather than collected from the routes, because the routes read and check their bodies themselves.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic.json_schema import models_json_schema

from axicon.recipe import ServeRecipe
from services.plan import Served
from services.schema import BODIES

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}


def an(kind: Schema) -> Schema:
    """`kind`, or null."""
    return {"anyOf": [kind, {"type": "null"}]}


def a_list(kind: Schema) -> Schema:
    return {"type": "array", "items": kind}


def an_object(**properties: Schema) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


USAGE = an_object(
    prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER,
    prompt_tokens_details=an_object(cached_tokens=INTEGER),
)  # fmt: skip
USAGE["properties"]["completion_tokens_details"] = {
    **an_object(accepted_prediction_tokens=INTEGER, rejected_prediction_tokens=INTEGER),
    "description": "There when the request asked for speculation.",
}
REASON = one_of("stop", "length")
COMPLETION_LOGPROBS = an_object(
    tokens=a_list(TEXT),
    token_logprobs=a_list(an(NUMBER)),
    top_logprobs=a_list(an(ANY_OBJECT)),
    text_offset=a_list(INTEGER),
)
TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": a_list(INTEGER)}
CHAT_LOGPROBS = an_object(
    content=a_list(an_object(**TOKEN, top_logprobs=a_list(an_object(**TOKEN)))), refusal={"type": "null"}
)
DETAILS = an_object(
    tokens=a_list(an_object(text=TEXT, origin=one_of("draft", "target"))),
    kept=an(an_object(positions=INTEGER, per_column=INTEGER, layers=a_list(TEXT))),
)
DETAILS["description"] = (
    "There when the request asked for details: of each token its text and whether it was guessed ahead; of a "
    "bounded cache, per layer a digit for each column of positions, 0 where nothing is kept, 9 where all is."
)
EVENT: Schema = {
    "type": "object",
    "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["data"],
    "description": "One event: a chunk as JSON, or the word [DONE] at the end.",
}
CAPABILITIES = an_object(
    model=TEXT,
    max_model_len=INTEGER,
    weights=an_object(format=TEXT, kernels=TEXT),
    kv=an_object(
        default=ANY_OBJECT,
        floor=INTEGER,
        fields=ANY_OBJECT,
        policies=a_list(
            an_object(name=TEXT, reads=TEXT, once=BOOLEAN, recent_share=NUMBER, scores=a_list(TEXT))
        ),
    ),
    speculation=an_object(
        default=ANY_OBJECT,
        draft_model=BOOLEAN,
        most_nodes=INTEGER,
        fields=ANY_OBJECT,
        methods=a_list(an_object(name=TEXT, needs_draft_model=BOOLEAN, width=INTEGER, depth=INTEGER)),
    ),
    prefix_cache=an_object(share=NUMBER),
    adapters=an(an_object(most=INTEGER, rank=INTEGER, loaded=a_list(TEXT))),
    sampling=ANY_OBJECT,
    limits=ANY_OBJECT,
    refused=a_list(an_object(fields=ANY_OBJECT, param=an(TEXT), message=TEXT)),
)
MODEL = an_object(id=TEXT, object=one_of("model"), created=INTEGER, owned_by=TEXT, max_model_len=INTEGER)
MODEL["properties"] |= {
    "parent": TEXT, "root": TEXT, "rank": INTEGER, "sha256": TEXT,
    "base_verified": {**BOOLEAN, "description": "The adapter says which weights it was trained on."},
    "follows": {
        **an(an_object(step=INTEGER, behind=INTEGER, trouble=an(TEXT))),
        "description": "Of the run that the adapter follows: the step that is served, later ones its log "
        "had at the last look, and why the adapter stays as it is, if it does.",
    },
}  # fmt: skip
"""`parent` and what follows are of adapters alone."""


def _answer(kind: str, choice: Schema) -> Schema:
    choice["properties"]["details"] = DETAILS
    return an_object(
        id=TEXT,
        object=one_of(kind),
        created=INTEGER,
        model=TEXT,
        choices=a_list(choice),
        usage=USAGE,
        system_fingerprint=TEXT,
    )


ANSWERS: dict[str, Schema] = {
    "Completion": _answer(
        "text_completion",
        an_object(index=INTEGER, text=TEXT, logprobs=an(COMPLETION_LOGPROBS), finish_reason=REASON),
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        an_object(
            index=INTEGER,
            message=an_object(role=one_of("assistant"), content=TEXT, refusal={"type": "null"}),
            logprobs=an(CHAT_LOGPROBS),
            finish_reason=REASON,
        ),
    ),
    "Model": MODEL,
    "Capabilities": CAPABILITIES,
    "Deleted": an_object(id=TEXT, object=one_of("model"), deleted=BOOLEAN),
    "Models": an_object(object=one_of("list"), data=a_list(ref("Model"))),
    "Tokens": an_object(tokens=a_list(INTEGER), count=INTEGER, max_model_len=INTEGER),
    "Prompt": an_object(prompt=TEXT),
    "TokenizerInfo": an_object(
        tokenizer_class=TEXT,
        bos_token=an(TEXT),
        eos_token=an(TEXT),
        pad_token=an(TEXT),
        unk_token=an(TEXT),
        vocab_size=INTEGER,
        chat_template=an(TEXT),
    ),
    "Health": an_object(status=one_of("ok"), format=TEXT, kernels=TEXT),
    "Error": an_object(error=an_object(message=TEXT, type=TEXT, param=an(TEXT), code=an(TEXT))),
}

ERRORS = {
    "400": "The request cannot be served as asked; `param` names the field.",
    "401": "The API key is missing or wrong.",
    "403": "Without API keys, only loopback host names are answered.",
    "404": "No such model or path.",
    "408": "The request took longer than the server allows.",
    "413": "The body is too large.",
    "429": "Overloaded; `Retry-After` says when to try again.",
    "500": "A defect of the server.",
    "503": "The model is loading, or the decode loop makes no progress.",
}


def describe(recipe: ServeRecipe, served: Served) -> Schema:
    """The document, with the limits of this deployment."""
    _, bodies = models_json_schema(
        [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
    )
    schemas = {**deepcopy(bodies["$defs"]), **ANSWERS}
    _limit(schemas, recipe, served)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "axicon",
            "version": "1",
            "description": f"OpenAI-style endpoint of {served.name}.",
        },
        "paths": _paths(served),
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if recipe.api_keys_env or recipe.api_key_hashes else [],
    }


def _paths(served: Served) -> Schema:
    events = {"text/event-stream": {"schema": EVENT}}
    served_names = [served.name, *sorted(served.adapters)]
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": served_names}}
    load = _post("Let an adapter join; takes an admin key", "LoadAdapterBody", "Model")
    unload = _post("Let an adapter leave; takes an admin key", "UnloadAdapterBody", "Deleted")
    return {
        "/v1/completions": {"post": _post("Continue a text", "CompletionBody", "Completion", events)},
        "/v1/chat/completions": {"post": _post("Answer in a chat", "ChatBody", "ChatCompletion", events)},
        "/tokenize": {"post": _post("Text to token ids", "TokenizeBody", "Tokens")},
        "/detokenize": {"post": _post("Token ids to text", "DetokenizeBody", "Prompt")},
        "/tokenizer_info": {"get": _get("What the tokenizer is", "TokenizerInfo")},
        "/v1/models": {"get": _get("What is served", "Models")},
        "/v1/models/{name}": {"get": {**_get("One model", "Model"), "parameters": [name]}},
        "/v1/load_lora_adapter": {"post": {**load, "security": [{"key": []}]}},
        "/v1/unload_lora_adapter": {"post": {**unload, "security": [{"key": []}]}},
        "/v1/capabilities": {"get": _get("What this deployment can do", "Capabilities")},
        "/health": {"get": _get("Whether the decode loop makes progress", "Health", is_open=True)},
        "/metrics": {"get": _get("Figures for Prometheus", None)},
    }


def _get(summary: str, answer: str | None, is_open: bool = False) -> Schema:
    kind = (
        {"text/plain": {"schema": TEXT}} if answer is None else {"application/json": {"schema": ref(answer)}}
    )
    route = {"summary": summary, "responses": _responses(kind)}
    return {**route, "security": []} if is_open else route


def _post(summary: str, body: str, answer: str, others: Schema | None = None) -> Schema:
    content = {"application/json": {"schema": ref(answer)}, **(others or {})}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": ref(body)}}},
        "responses": _responses(content),
    }


def _responses(content: Schema) -> Schema:
    error = {"application/json": {"schema": ref("Error")}}
    errors = {status: {"description": text, "content": error} for status, text in ERRORS.items()}
    return {"200": {"description": "The answer.", "content": content}, **errors}


def _limit(schemas: Schema, recipe: ServeRecipe, served: Served) -> None:
    """Write what this deployment allows into the request schemas."""
    limits = recipe.limits
    output = min(limits.output_tokens or served.max_len, served.max_len)
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab - 1}
    for name in ("CompletionBody", "ChatBody"):
        fields = schemas[name]["properties"]
        fields["model"] = an({"const": served.name})
        _first(fields["n"])["maximum"] = limits.n
        _first(fields["min_tokens"])["maximum"] = output
        _first(fields["max_tokens"])["maximum"] = output
        _first(fields["logit_bias"])["maxProperties"] = limits.logit_bias
        _first(fields["stop_token_ids"]).update(items=token, maxItems=limits.stops)
        fields["stop"]["anyOf"][0]["maxLength"] = limits.stop_chars
        fields["stop"]["anyOf"][1]["items"]["maxLength"] = limits.stop_chars
        fields["stop"]["anyOf"][1]["maxItems"] = limits.stops
    kept = schemas["KVBody"]["properties"]
    share = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    slots = {"type": "integer", "minimum": max(2, recipe.kv_floor)}
    kept["budget"] = {"anyOf": [share, slots, {"type": "null"}]}
    kept["recent"] = {"anyOf": [share, {"type": "integer", "minimum": 0}, {"type": "null"}]}
    _first(kept["sinks"])["maximum"], _first(kept["evict_every"])["maximum"] = 64, 256
    guess = schemas["SpeculationBody"]["properties"]
    if recipe.draft is None:
        guess["method"] = {"enum": ["none", "lookup"]}
    for name in ("width", "depth"):
        _first(guess[name])["maximum"] = recipe.draft_nodes
    _first(schemas["ChatBody"]["properties"]["max_completion_tokens"])["maximum"] = output
    _first(schemas["ChatBody"]["properties"]["top_logprobs"])["maximum"] = limits.logprobs
    _first(schemas["CompletionBody"]["properties"]["logprobs"])["maximum"] = limits.logprobs
    prompt = schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]
    ids = {"type": "array", "items": token, "minItems": 1, "maxItems": served.max_len}
    prompt[1]["maxItems"] = limits.prompts
    prompt[2] = ids
    prompt[3].update(items=ids, maxItems=limits.prompts)
    schemas["TokenizeBody"]["properties"]["model"] = an({"const": served.name})
    schemas["DetokenizeBody"]["properties"]["model"] = an({"const": served.name})
    schemas["DetokenizeBody"]["properties"]["tokens"] = {"type": "array", "items": token}


def _first(field: Schema) -> Schema:
    """The non-null half of an optional field."""
    half: Schema = field["anyOf"][0]
    return half
