"""Everything that is checked about a request, before anything is allocated for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Container

from axicon.generate.request import Limits, Request, RequestError, SamplingParams
from axicon.generate.retention import check_kv, retention

SEEDS = range(-(1 << 63), 1 << 64)


def check_request(
    request: Request, vocab: int, longest: int, limits: Limits, blocks: int = 0, adapters: Container[int] = ()
) -> None:
    """Raises RequestError naming the field. `longest` is what prompt and answer may have together, in
    tokens; `blocks` as in `Capacity`; `adapters` are those that are held.
    """
    params = request.params
    _check_params(params, limits)
    _check_ids(request.prompt, vocab, "prompt")
    _check_ids(params.stop_token_ids, vocab, "stop_token_ids")
    _check_ids(params.logit_bias, vocab, "logit_bias")
    if request.adapter and request.adapter not in adapters:
        raise RequestError(f"adapter {request.adapter} is not held here", "model")
    length, output = len(request.prompt), params.max_tokens
    if length == 0:
        raise RequestError("the prompt is empty", "prompt")
    if length + min(output, 1) > longest:
        raise RequestError(f"the prompt has {length} tokens, prompt and answer may have {longest}", "prompt")
    if length + output > longest:
        raise RequestError(
            f"the prompt has {length} tokens and max_tokens is {output}, together they may have {longest}",
            "max_tokens",
        )
    if request.kv is not None:
        check_kv(request.kv, limits, blocks)
        bounded = retention(request.kv, length, output, limits.kv_floor)
        if bounded is not None and params.prompt_logprobs is not None:
            policy = request.kv.policy
            raise RequestError(f"kv policy {policy!r} gives no log-probabilities of the prompt", "kv.policy")


def _check_params(params: SamplingParams, limits: Limits) -> None:
    whole = {
        "max_tokens": (params.max_tokens, 0, None),
        "min_tokens": (params.min_tokens, 0, params.max_tokens),
        "top_k": (params.top_k, 0, None),
        "logprobs": (params.logprobs or 0, 0, limits.max_logprobs),
        "prompt_logprobs": (params.prompt_logprobs or 0, 0, limits.max_logprobs),
    }
    for name, (number, least, most) in whole.items():
        if number < least or (most is not None and number > most):
            upper = "" if most is None else f" and at most {most}"
            raise RequestError(f"{name} is {number}, it must be at least {least}{upper}", name)
    real = {
        "temperature": (params.temperature, 0.0, math.inf),
        "min_p": (params.min_p, 0.0, 1.0),
        "presence_penalty": (params.presence_penalty, -2.0, 2.0),
        "frequency_penalty": (params.frequency_penalty, -2.0, 2.0),
    }
    for name, (value, low, high) in real.items():
        if not (math.isfinite(value) and low <= value <= high):
            raise RequestError(f"{name} is {value}, it must be a number from {low:g} to {high:g}", name)
    for name, value, high in (
        ("top_p", params.top_p, 1.0), ("repetition_penalty", params.repetition_penalty, math.inf),
    ):  # fmt: skip
        if not (math.isfinite(value) and 0.0 < value <= high):
            raise RequestError(
                f"{name} is {value}, it must be above 0" + (" and at most 1" * (high == 1.0)), name
            )
    if params.seed is not None and params.seed not in SEEDS:
        raise RequestError(f"seed {params.seed} does not fit into 64 bits", "seed")
    if len(params.stop) > limits.max_stops or len(params.stop_token_ids) > limits.max_stops:
        raise RequestError(f"more than {limits.max_stops} stop sequences", "stop")
    if any(not stop for stop in params.stop):
        raise RequestError("a stop string is empty", "stop")
    if len(params.logit_bias) > limits.max_logit_bias:
        raise RequestError(f"logit_bias has more than {limits.max_logit_bias} entries", "logit_bias")
    for token, bias in params.logit_bias.items():
        if not -100.0 <= bias <= 100.0:
            raise RequestError(
                f"logit_bias of token {token} is {bias}, it must lie between -100 and 100", "logit_bias"
            )


def _check_ids(ids: Collection[int], vocab: int, name: str) -> None:
    for token in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token < vocab:
            raise RequestError(f"token id {token} is not in the model's vocabulary of {vocab}", name)
