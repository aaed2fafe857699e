"""The output side of one stream: when it ends, what its text is, what is reported about its tokens."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from axicon.generate.detokenize import Detokenizer, StopText, Tokenizer
from axicon.generate.request import Delta, FinishReason, Request, TokenLogprob
from axicon.generate.sampling.processors import LogitProcessor
from axicon.generate.sampling.sample import Row
from axicon.protocols import Draw


class Answer:
    """Turns drawn tokens into deltas. The delta that carries a finish reason is the last."""

    def __init__(self, request: Request, tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        params = request.params
        self.request = request
        self.cached = 0
        """Tokens of the prompt that an earlier request computed."""
        self._tokenizer = tokenizer
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._eos = frozenset(() if params.ignore_eos else eos_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._processor = LogitProcessor(params, request.prompt, vocab, sorted(self._eos | self._stop_ids))
        self._text = Detokenizer(tokenizer)
        self._stop = StopText(params.stop)
        self._tokens = 0
        self._prompt_logprobs: list[TokenLogprob] = []
        self._prompt_owed = params.prompt_logprobs is not None

    def sampling(self, position: int) -> Row:
        """How the token at this absolute position is chosen."""
        return Row(self.request.params, self._processor, Draw(self._seed, self.request.choice, position))

    def add_prompt_logprobs(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Log-probabilities of the prompt's next tokens, in order, from its second one."""
        self._prompt_logprobs.extend(logprobs)

    def accept(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """The delta of a drawn token."""
        offset = self._text.length
        self._processor.record(token)
        self._tokens += 1
        text, stop, reason = self._read(token)
        logprobs = () if logprob is None else (dataclasses.replace(logprob, text_offset=offset),)
        return self._delta(text, (token,), logprobs, reason, stop)

    def _read(self, token: int) -> tuple[str, str | int | None, FinishReason | None]:
        """(text to send, what stopped it, why it ends)."""
        if token in self._eos or token in self._stop_ids:
            text, met = self._rest()
            return text, met or (None if token in self._eos else token), "stop"
        text, met = self._text.add(token), None
        if self._tokens >= self.request.params.min_tokens:
            text, met = self._stop.add(text)
        if met is not None:
            return text, met, "stop"
        if self._tokens < self.request.params.max_tokens:
            return text, None, None
        rest, met = self._rest()
        return text + rest, met, "length" if met is None else "stop"

    def close(self, reason: FinishReason, error: str | None = None) -> Delta:
        """The last delta of a stream that ends without another token."""
        text, stop = self._rest()
        return self._delta(text, (), (), reason if stop is None or error else "stop", stop, error)

    def _rest(self) -> tuple[str, str | None]:
        """All text that was held back, and the stop string in it."""
        text, stop = self._stop.add(self._text.finish())
        return (text, stop) if stop is not None else (text + self._stop.finish(), None)

    def _delta(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        stop: str | int | None,
        error: str | None = None,
    ) -> Delta:
        return Delta(
            request_id=self.request.id,
            choice=self.request.choice,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=reason,
            stop_reason=stop,
            error=error,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self._tokens,
            cached_tokens=self.cached,
        )

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Once, when complete: one entry per prompt token, with the offsets of their texts."""
        if not self._prompt_owed or len(self._prompt_logprobs) != len(self.request.prompt) - 1:
            return None
        self._prompt_owed = False
        entries = [TokenLogprob(self.request.prompt[0], None), *self._prompt_logprobs]
        self._prompt_logprobs = []
        text = Detokenizer(self._tokenizer)
        result = []
        for entry in entries:
            result.append(dataclasses.replace(entry, text_offset=text.length))
            text.add(entry.token)
        return tuple(result)
