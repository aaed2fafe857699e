"""What one request may ask for, and what the engine is then asked to do.

Counts are checked first, then prompts are tokenized (long ones beside the event loop), then lengths are
checked; only a request that passed all of it reaches the engine.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from axicon.generate.request import KVSettings, Request, SamplingParams, Speculation
from axicon.recipe import RequestLimits, ServeRecipe
from services.adapters import Named
from services.errors import ApiError, bad_request
from services.render import ChatForm, CompletionForm, Form
from services.schema import ChatBody, CompletionBody, Sampling
from services.text import Text

if TYPE_CHECKING:
    from axicon.generate.refused import Refused

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Served:
    """The model this server answers with."""

    name: str
    text: Text
    vocab: int
    """Token ids the model knows: 0 .. vocab-1."""
    max_len: int
    """Prompt and output together, in tokens."""
    created: int
    """Seconds since 1970 when it was loaded."""
    fingerprint: str
    format: str
    """How the weights are stored."""
    kernels: str
    """Who computes: torch, or the compiled kernels by name."""
    refused: tuple[Refused, ...]
    """Settings of requests that do not work here, or not together."""
    adapters: Mapping[str, Named] = field(default_factory=dict)
    """By the name that requests choose them by."""

    def answers_as(self, name: str | None) -> tuple[str, str, int]:
        """Name, fingerprint and adapter of answers to requests for this model, until the event loop does
        something else. Raises ApiError 404 unless it is served."""
        if name is None or name == self.name:
            return self.name, self.fingerprint, 0
        if name not in self.adapters:
            message = f"The model '{name[:200]}' is not served here. Served: '{self.name}'."
            raise ApiError(404, message, param="model", code="model_not_found")
        adapter = self.adapters[name]
        return name, adapter.fingerprint(self.fingerprint), adapter.number


@dataclass(frozen=True, slots=True)
class Plan:
    """One HTTP request as the engine sees it."""

    requests: tuple[Request, ...]
    """One per choice, in the order of their `index`."""
    form: Form
    prompts: int
    """Prompts, each of which is continued by equally many choices."""


async def plan_completion(body: CompletionBody, model: Served, recipe: ServeRecipe) -> Plan:
    """Raises ApiError 400 or 404."""
    limits, n = recipe.limits, body.n or 1
    model.answers_as(body.model)
    _check_sampling(body, model, limits)
    if len(body.prompt) > limits.prompts:
        raise bad_request(f"'prompt': at most {limits.prompts} prompts in one request.", "prompt")
    _check_choices(len(body.prompt) * n, recipe)
    _at_most("logprobs", body.logprobs, limits.logprobs)
    if body.best_of is not None and body.best_of != n:
        raise bad_request(
            "'best_of': only the value of n is supported; ask for n choices and pick one.", "best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("'max_tokens': 0 makes sense only with echo.", "max_tokens")
    prompts = [await tokenize(prompt, model, limits) for prompt in body.prompt]
    sampling = [
        _most_tokens(body, model, limits, len(ids), body.max_tokens, DEFAULT_COMPLETION_TOKENS)
        for ids in prompts
    ]
    prompt_logprobs = body.logprobs if body.echo else None
    name, fingerprint, adapter = model.answers_as(body.model)  # asked anew: adapters move meanwhile
    form = CompletionForm(
        model=name,
        fingerprint=fingerprint,
        piece=model.text.piece,
        logprobs=body.logprobs,
        include_usage=body.include_usage,
        echoes=[_echo(prompt, model) for prompt in body.prompt for _ in range(n)] if body.echo else (),
    )
    params = [_params(body, recipe, most, body.logprobs, prompt_logprobs) for most in sampling]
    return Plan(_requests(form, prompts, params, body, recipe, adapter), form, len(prompts))


async def plan_chat(body: ChatBody, model: Served, recipe: ServeRecipe) -> Plan:
    """Raises ApiError 400 or 404."""
    limits, n = recipe.limits, body.n or 1
    model.answers_as(body.model)
    _check_sampling(body, model, limits)
    _check_choices(n, recipe)
    _at_most("top_logprobs", body.top_logprobs, limits.logprobs)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("'top_logprobs': needs logprobs to be true.", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("'max_tokens': max_completion_tokens says otherwise; give one.", "max_tokens")
    ids = await _tokenize_chat(body, model, limits)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    most = _most_tokens(body, model, limits, len(ids), asked, model.max_len)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    name, fingerprint, adapter = model.answers_as(body.model)  # asked anew: adapters move meanwhile
    form = ChatForm(
        model=name,
        fingerprint=fingerprint,
        piece=model.text.piece,
        logprobs=logprobs,
        include_usage=body.include_usage,
    )
    params = [_params(body, recipe, most, logprobs)]
    return Plan(_requests(form, [ids], params, body, recipe, adapter), form, 1)


async def tokenize(
    prompt: str | Sequence[int],
    model: Served,
    limits: RequestLimits,
    *,
    special: bool = True,
    param: str = "prompt",
) -> Sequence[int]:
    """Token ids of one prompt, checked against the vocabulary and the context. Raises ApiError 400."""
    most = min(limits.prompt_tokens or model.max_len, model.max_len)
    if isinstance(prompt, str):
        # No token stands for more bytes than the longest one: this text cannot fit, however it is split.
        if len(prompt) > most * model.text.longest:
            raise _too_long(f"more than {most}", most, param)
        ids: Sequence[int] = await model.text.encode_beside(prompt, special=special)
    else:
        ids = prompt
    if not ids:
        raise bad_request(f"'{param}': is empty.", param)
    if len(ids) > most:
        raise _too_long(str(len(ids)), most, param)
    check_ids(ids, model, param)
    return ids


def check_ids(ids: Sequence[int], model: Served, param: str) -> None:
    """Raises ApiError 400 for an id the model does not know."""
    for token in ids:
        if not 0 <= token < model.vocab:
            raise bad_request(
                f"'{param}': token id {token} is not in the vocabulary of {model.vocab}.", param
            )


async def _tokenize_chat(body: ChatBody, model: Served, limits: RequestLimits) -> Sequence[int]:
    messages = []
    for message in body.messages:
        role = "system" if message.role == "developer" else message.role
        entry = {"role": role, "content": message.content}
        messages.append(entry if message.name is None else {**entry, "name": message.name})
    text = await model.text.render_beside(messages)
    return await tokenize(text, model, limits, special=False, param="messages")


def _too_long(tokens: str, most: int, param: str) -> ApiError:
    message = f"'{param}': {tokens} tokens, and at most {most} fit."
    return bad_request(message, param, "context_length_exceeded")


def _echo(prompt: str | Sequence[int], model: Served) -> str:
    """The text of a prompt as an answer repeats it: like the rest of the answer, without special tokens."""
    return prompt if isinstance(prompt, str) else model.text.decode(prompt, special=False)


def _at_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise bad_request(f"'{name}': at most {most} here.", name)


def _check_choices(choices: int, recipe: ServeRecipe) -> None:
    most = recipe.max_rows + recipe.max_queue
    if choices > most:
        raise bad_request(f"'n': {choices} choices in one request, and this server holds {most}.", "n")


def _check_sampling(body: Sampling, model: Served, limits: RequestLimits) -> None:
    _at_most("n", body.n, limits.n)
    if len(body.stop) > limits.stops:
        raise bad_request(f"'stop': at most {limits.stops} stop strings.", "stop")
    if any(len(stop) > limits.stop_chars for stop in body.stop):
        raise bad_request(f"'stop': a stop string has at most {limits.stop_chars} characters.", "stop")
    if len(body.stop_token_ids) > limits.stops:
        raise bad_request(f"'stop_token_ids': at most {limits.stops}.", "stop_token_ids")
    check_ids(body.stop_token_ids, model, "stop_token_ids")
    bias = body.logit_bias or {}
    if len(bias) > limits.logit_bias:
        raise bad_request(f"'logit_bias': at most {limits.logit_bias} entries.", "logit_bias")
    check_ids([int(key) for key in bias], model, "logit_bias")
    if body.stream_options is not None and not body.stream:
        raise bad_request("'stream_options': only with stream.", "stream_options")


def _most_tokens(
    body: Sampling, model: Served, limits: RequestLimits, prompt: int, asked: int | None, default: int
) -> int:
    """The most tokens to generate after `prompt` tokens: what was asked, or as much of the default as
    fits."""
    room = model.max_len - prompt
    most = min(limits.output_tokens or model.max_len, model.max_len)
    if asked is not None and asked > most:
        raise bad_request(f"'max_tokens': at most {most} here.", "max_tokens")
    if (1 if asked is None else asked) > room:
        wish = f" and max_tokens {asked}" if asked is not None else ""
        message = f"'max_tokens': {prompt} prompt tokens{wish} exceed the context of {model.max_len}."
        raise bad_request(message, "max_tokens", "context_length_exceeded")
    tokens = min(default, most, room) if asked is None else asked
    if (body.min_tokens or 0) > tokens:
        raise bad_request(f"'min_tokens': at most max_tokens, which is {tokens}.", "min_tokens")
    return tokens


def _params(
    body: Sampling,
    recipe: ServeRecipe,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        speculation=_speculation(body, recipe),
    )


def _speculation(body: Sampling, recipe: ServeRecipe) -> Speculation | None:
    """What the request says, or what the deployment says. Every request gets a seed later; who sent one wants
    the text that goes with it.
    """
    asked = recipe.speculation if body.speculation is None else body.speculation
    if asked.method == "none":
        # The engine checks the others.
        _at_most("speculation.width", asked.width, recipe.draft_nodes)
        _at_most("speculation.depth", asked.depth, recipe.draft_nodes)
        return None
    verify = asked.verify or ("rrs" if body.seed is None else "coupled")
    return Speculation(method=asked.method, width=asked.width, depth=asked.depth, verify=verify)


def _kv(body: Sampling, recipe: ServeRecipe) -> KVSettings | None:
    """What the request says about its cache, or what the deployment says. A prompt whose log-probabilities
    are wanted keeps everything unless the request says otherwise.
    """
    if body.kv is not None:
        return KVSettings(**body.kv.model_dump(exclude_none=True))
    scored = isinstance(body, CompletionBody) and body.echo and body.logprobs is not None
    return None if scored else KVSettings(**recipe.kv.model_dump())


def _requests(
    form: Form,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    body: Sampling,
    recipe: ServeRecipe,
    adapter: int,
) -> tuple[Request, ...]:
    """One per choice. The choices of a prompt share one seed, drawn here when the client gave none."""
    deadline = time.monotonic() + recipe.request_timeout_s
    kv, details = _kv(body, recipe), bool(body.details)
    requests: list[Request] = []
    for prompt, own in zip(prompts, params, strict=True):
        seeded = own if own.seed is not None else replace(own, seed=secrets.randbits(63))
        for choice in range(body.n or 1):
            name = f"{form.id}-{len(requests)}"
            requests.append(
                Request(
                    id=name, prompt=prompt, params=seeded, choice=choice, deadline=deadline, kv=kv,
                    details=details, adapter=adapter,
                )
            )  # fmt: skip
    return tuple(requests)
