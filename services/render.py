"""Answers in the shapes of the OpenAI API: whole bodies and stream chunks.

A stream chunk is built for every step of every request, so nothing but the new text is serialised there: what
surrounds it is made once per request.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

from axicon.generate.request import Delta, Kept, Origin, TokenLogprob
from services.errors import encode

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

DONE = b"data: [DONE]\n\n"

Piece = Callable[[int], bytes]
"""Token id to the bytes it stands for."""


def label(piece: bytes) -> str:
    """A token as the API writes it: its text, or `bytes:\\x..` where it is only a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Characters that JSON leaves alone and that some clients take for the end of a line."""


def line(value: object) -> str:
    """JSON that is one line to every reader of event streams."""
    text = encode(value)
    return text if text.isascii() else text.translate(BREAKS)


def details(origins: Sequence[Origin], kept: Kept | None) -> dict[str, Any]:
    """What a request that asks for details gets beside its text."""
    return {
        "tokens": [{"text": one.text, "origin": "draft" if one.drafted else "target"} for one in origins],
        "kept": None if kept is None else asdict(kept),
    }


@dataclass(slots=True)
class Choice:
    """One choice as far as it has come."""

    index: int
    text: list[str] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    kept: Kept | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    accepted: int = 0
    rejected: int = 0

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.origins.extend(delta.origins)
        self.kept = delta.kept or self.kept
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs or ()
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.count(delta)

    def count(self, delta: Delta) -> None:
        self.prompt_tokens, self.completion_tokens = delta.prompt_tokens, delta.completion_tokens
        self.cached, self.accepted, self.rejected = delta.cached_tokens, delta.accepted, delta.rejected


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole answer; a prompt counts once however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    cached: int = 0
    """Of the prompts' tokens, those that were taken over from earlier requests."""
    accepted: int | None = None
    """Of the tokens that were guessed ahead; None where the request asked for no guesses."""
    rejected: int = 0

    def body(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.accepted is not None:
            counts["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            }
        return counts


class Form(ABC):
    """How one request is answered. Subclasses know one route's shapes."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(
        self,
        *,
        model: str,
        fingerprint: str,
        piece: Piece,
        logprobs: int | None = None,
        include_usage: bool = False,
    ) -> None:
        self.piece = piece
        self.logprobs = logprobs
        self.include_usage = include_usage
        self.id = f"{self.prefix}-{uuid4().hex}"
        self.head = {"id": self.id, "object": self.kind, "created": int(time.time()), "model": model}
        self.tail = {"system_fingerprint": fingerprint}
        chunk = encode({**self.head, "object": self.chunk_kind, **self.tail})[:-1]
        self._before = f'data: {chunk},"choices":'
        self._after = (',"usage":null}' if include_usage else "}") + "\n\n"

    def opening(self, index: int) -> str:
        """Events that come before a choice's first text."""
        return ""

    def event(self, index: int, delta: Delta) -> str:
        """The event of one delta."""
        return self._event(
            index, self._new_text(index, delta.text), self._chunk_logprobs(index, delta), delta
        )

    def closing(self, usage: Usage) -> str:
        """The event after the last choice, when the client asked for counts."""
        if not self.include_usage:
            return ""
        return f'{self._before}[],"usage":{encode(usage.body())}}}\n\n'

    def body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The whole answer of a request that does not stream."""
        return {
            **self.head,
            "choices": [
                self._choice(c) | ({"details": details(c.origins, c.kept)} if c.origins or c.kept else {})
                for c in choices
            ],
            "usage": usage.body(),
            **self.tail,
        }

    def _event(self, index: int, text: str, logprobs: str, delta: Delta) -> str:
        reason = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        more = f',"details":{line(details(delta.origins, delta.kept))}' if delta.origins or delta.kept else ""
        choice = f'[{{"index":{index},{text},"logprobs":{logprobs},"finish_reason":{reason}{more}}}]'
        return self._before + choice + self._after

    @abstractmethod
    def _new_text(self, index: int, text: str) -> str: ...

    @abstractmethod
    def _chunk_logprobs(self, index: int, delta: Delta) -> str: ...

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]: ...


class CompletionForm(Form):
    """`/v1/completions`."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, *, echoes: Sequence[str] = (), **common: Any) -> None:
        """`echoes`: the prompt's text per choice, when the request asked for it."""
        super().__init__(**common)
        self.echoes = echoes
        self._echoed: set[int] = set()

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""

    def _new_text(self, index: int, text: str) -> str:
        if self.echoes and index not in self._echoed:
            self._echoed.add(index)
            text = self.echoes[index] + text
        return f'"text":{line(text)}'

    def _chunk_logprobs(self, index: int, delta: Delta) -> str:
        if self.logprobs is None:
            return "null"
        return line(self._logprobs(index, delta.prompt_logprobs or (), delta.logprobs))

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if self.logprobs is not None:
            logprobs = self._logprobs(choice.index, choice.prompt_logprobs, choice.logprobs)
        return {
            "index": choice.index,
            "text": self._echo(choice.index) + "".join(choice.text),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(
        self, index: int, prompt: Sequence[TokenLogprob], generated: Sequence[TokenLogprob]
    ) -> dict[str, list[Any]]:
        """The four parallel lists of the completions API. Offsets count from the start of the returned
        text."""
        shift = len(self._echo(index))
        entries = [(entry, 0) for entry in prompt] + [(entry, shift) for entry in generated]
        return {
            "tokens": [label(self.piece(entry.token)) for entry, _ in entries],
            "token_logprobs": [_bounded(entry.logprob) for entry, _ in entries],
            "top_logprobs": [self._top(entry) for entry, _ in entries],
            "text_offset": [entry.text_offset + shift for entry, shift in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        """Alternatives and the token itself by their text; of two tokens with one text the likelier is
        kept."""
        if entry.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            text, value = label(self.piece(token)), max(logprob, LOWEST)
            top[text] = max(value, top.get(text, LOWEST))
        return top


class ChatForm(Form):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> str:
        return self._event(index, '"delta":{"role":"assistant","content":""}', "null", Delta(request_id=""))

    def _new_text(self, index: int, text: str) -> str:
        return f'"delta":{{"content":{line(text)}}}' if text else '"delta":{}'

    def _chunk_logprobs(self, index: int, delta: Delta) -> str:
        if self.logprobs is None or not delta.logprobs:
            return "null"
        return line(self._logprobs(delta.logprobs))

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": None if self.logprobs is None else self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, generated: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._token(entry.token, entry.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in entry.top],
            }
            for entry in generated
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        piece = self.piece(token)
        return {"token": label(piece), "logprob": _bounded(logprob), "bytes": list(piece)}


def _bounded(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
