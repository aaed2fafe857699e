"""The Python door: a model in this process, no server.

    model = axicon.load("demo")
    print(model.generate("Once upon a time", max_tokens=32).text)
    for piece in model.chat([{"role": "user", "content": "Hello"}], stream=True):
        print(piece.text, end="")

Several prompts in one call are computed together. A model belongs to the thread that loaded it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, overload

from axicon.errors import AxiconError
from axicon.generate.build import Device, Dtype, build_engine
from axicon.generate.engine import Engine
from axicon.generate.request import (
    Delta,
    FinishReason,
    Limits,
    Overloaded,
    Request,
    RequestError,
    SamplingParams,
    Speculation,
    TokenLogprob,
)
from axicon.generate.retention import kv_settings

Prompt = str | Sequence[int]
"""Text, or token ids."""
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished answer."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    """Of the tokens that were guessed ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step added to one answer. The last piece of an answer has a finish reason."""

    index: int
    """Which prompt of the call it belongs to."""
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class LocalModel:
    """A loaded model with its engine. Keyword arguments of `generate` and `chat` are `SamplingParams`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()
        self._queues: dict[str, deque[Delta]] = {}

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def fingerprint(self) -> str:
        """Equal fingerprint, prompt, parameters and seed give equal text on a CPU, alone or in any batch."""
        return self.engine.runner.fingerprint

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], *, stream: Literal[False] = False, **params: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, stream: Literal[True], **params: Any
    ) -> Iterator[Piece]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, stream: bool = False, **params: Any
    ) -> Completion | list[Completion] | Iterator[Piece]:
        """Continue a prompt, or several together.

        A list of prompts gives a list of completions, `stream=True` an iterator of pieces; dropping the
        iterator cancels what is not finished. `kv={"policy": "h2o", "budget": 0.2}` bounds the cache.
        Raises RequestError for parameters that cannot be served.
        """
        kept = kv_settings(params.pop("kv", None))
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        prompts: Sequence[Any] = [prompt] if single else prompt
        requests = [
            Request(id=f"local-{next(self._ids)}", prompt=self._encode(one), params=_params(params), kv=kept)
            for one in prompts
        ]
        for request in requests:
            self.engine.check(request)
        if stream:
            return self._pieces(requests)
        completions = self._complete(requests)
        return completions[0] if single else completions

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **params: Any
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **params: Any
    ) -> Iterator[Piece]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **params: Any
    ) -> Completion | Iterator[Piece]:
        """Answer `{"role": ..., "content": ...}` messages in the model's chat template."""
        if not self.tokenizer.chat_template:
            raise AxiconError(f"{self.engine.model_name} has no chat template: use generate()")
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if stream:
            return self.generate(list(ids), stream=True, **params)
        return self.generate(list(ids), **params)

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        found: dict[str, list[Delta]] = {request.id: [] for request in requests}
        for delta in self._run(requests):
            found[delta.request_id].append(delta)
        return [_join(deltas) for deltas in found.values()]

    def _pieces(self, requests: Sequence[Request]) -> Iterator[Piece]:
        index = {request.id: i for i, request in enumerate(requests)}
        for delta in self._run(requests):
            if delta.error is not None:
                raise AxiconError(delta.error)
            if delta.text or delta.tokens or delta.finish_reason:
                yield Piece(
                    index=index[delta.request_id],
                    text=delta.text,
                    tokens=delta.tokens,
                    logprobs=delta.logprobs,
                    finish_reason=delta.finish_reason,
                )

    def _run(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """Deltas of these requests. Steps the engine, also for other iterators that are half read."""
        waiting = deque(requests)
        unfinished = {request.id for request in requests}
        queue: deque[Delta] = deque()
        try:
            while unfinished:
                while waiting and self._add(waiting[0], queue):
                    waiting.popleft()
                while queue:
                    delta = queue.popleft()
                    if delta.finish_reason is not None:
                        unfinished.discard(delta.request_id)
                        self._queues.pop(delta.request_id)
                    yield delta
                if unfinished:
                    self._step()
        finally:
            for name in unfinished:
                if self._queues.pop(name, None) is not None:
                    self.engine.cancel(name)
            while not self._queues and self.engine.has_work:
                self.engine.step()

    def _add(self, request: Request, queue: deque[Delta]) -> bool:
        try:
            self.engine.add(request)
        except Overloaded:
            return False
        self._queues[request.id] = queue
        return True

    def _step(self) -> None:
        for delta in self.engine.step():
            if delta.request_id in self._queues:
                self._queues[delta.request_id].append(delta)


def _params(params: Mapping[str, Any]) -> SamplingParams:
    known = {field.name for field in fields(SamplingParams)}
    for name in params:
        if name not in known:
            raise RequestError(f"unknown parameter {name!r}, known are {', '.join(sorted(known))}", name)
    settings = dict(params)
    if isinstance(settings.get("stop"), str):
        settings["stop"] = (settings["stop"],)
    settings["speculation"] = _speculation(settings.get("speculation"))
    return SamplingParams(**settings)


def _speculation(asked: Any) -> Speculation | None:
    """A method's name, or its settings as in a request over HTTP."""
    if asked is None or isinstance(asked, Speculation):
        return asked
    settings = {"method": asked} if isinstance(asked, str) else dict(asked)
    known = {field.name for field in fields(Speculation)}
    for name in settings:
        if name not in known:
            raise RequestError(
                f"unknown setting {name!r} of speculation, known are {', '.join(sorted(known))}",
                "speculation",
            )
    if "method" not in settings:
        raise RequestError("speculation needs a method", "speculation")
    if settings["method"] == "none":
        return None
    if settings.get("verify") not in (None, "rrs", "coupled"):
        raise RequestError(
            f"speculation verify is {settings['verify']!r}, known are coupled, rrs", "speculation"
        )
    return Speculation(**settings)


def _join(deltas: Sequence[Delta]) -> Completion:
    last = deltas[-1]
    if last.error is not None:
        raise AxiconError(last.error)
    assert last.finish_reason is not None
    return Completion(
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish_reason=last.finish_reason,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        stop_reason=last.stop_reason,
        prompt_tokens=last.prompt_tokens,
        accepted=last.accepted,
        rejected=last.rejected,
    )


def load(
    model: str = "demo",
    *,
    dtype: Dtype = "bfloat16",
    threads: int | None = None,
    kv_gib: float | None = None,
    max_rows: int = 64,
    prefill_chunk: int = 256,
    max_model_len: int | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    draft: str | None = None,
    device: Device = "cpu",
) -> LocalModel:
    """Load a model into this process: `demo`, a directory, a .gguf file, or a hub id.

    Arguments are those of `axicon.generate.build.build_engine`. Raises AxiconError with one line to read.
    """
    engine = build_engine(
        model, dtype=dtype, threads=threads, kv_gib=kv_gib, max_rows=max_rows, prefill_chunk=prefill_chunk,
        revision=revision, offline=offline, limits=Limits(max_model_len=max_model_len), draft=draft,
        device=device,
    )  # fmt: skip
    return LocalModel(engine)
