"""A stand-in for the engine thread: the same methods, a byte tokenizer, and text that is known beforehand."""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from axicon.generate.request import Delta, EngineStats, FinishReason, Limits, Request, TokenLogprob
from axicon.generate.retention import check_kv
from axicon.generate.speculate import read
from axicon.recipe import ServeRecipe
from services.text import byte_alphabet

REPLY = "The naïve fox 🦊 said: 你好, “world”! "
"""What the stand-in says, over and over."""
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'forbidden' %}{{ raise_exception('no') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, whose id is the byte, and three special tokens."""
    fast = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|end|>", "<|user|>", "<|assistant|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    )


class Running:
    """One choice at work."""

    def __init__(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        self.request = request
        self.on_delta = on_delta
        self.script = REPLY.encode()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.done = 0
        self.text = ""


class FakeThread:
    """`EngineThread` without a model. `hold()` stops its steps as a stuck engine would."""

    def __init__(
        self,
        recipe: ServeRecipe,
        *,
        max_model_len: int = 256,
        template: str | None = TEMPLATE,
        step_s: float = 0.001,
    ) -> None:
        tokenizer = byte_tokenizer(template)
        self.recipe = recipe
        self.engine = SimpleNamespace(
            tokenizer=tokenizer,
            model_name="fake",
            max_model_len=max_model_len,
            check=self._check,
            limits=Limits(kv_floor=recipe.kv_floor),
            runner=SimpleNamespace(
                capacity=SimpleNamespace(vocab=len(tokenizer)),
                describe=lambda: {"format": ["none"], "kernels": "a fake"},
            ),
        )
        self.fingerprint = "fake-1"
        self.error: BaseException | None = None
        self.step_s = step_s
        self.running: dict[str, Running] = {}
        self.waiting: dict[str, Running] = {}
        self.cancelled: list[str] = []
        self.finished: dict[FinishReason, int] = {}
        self.steps = self.prompt_tokens = self.generated = 0
        self.last: list[Request] = []
        """Every request that came in."""
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._going.set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, timeout: float | None = None) -> None:
        self._thread.start()

    def share(self, sharing: bool) -> None:
        self.sharing = sharing

    def close(self) -> None:
        self._closed.set()
        self._going.set()
        self._thread.join(5)

    def submit_all(self, requests: Sequence[Request], on_delta: Callable[[Delta], None]) -> None:
        for request in requests:
            self._check(request)
        with self._lock:
            for request in requests:
                self.last.append(request)
                self.waiting[request.id] = Running(request, on_delta)

    def _check(self, request: Request) -> None:
        if request.params.speculation is not None:
            read(request.params.speculation, self.recipe.draft_nodes, models=False)
        if request.kv is not None:
            check_kv(request.kv, Limits(kv_floor=self.recipe.kv_floor), blocks=1)

    def cancel(self, name: str) -> None:
        with self._lock:
            self.cancelled.append(name)

    def healthy(self, max_stall_s: float) -> bool:
        return self.error is None and self._going.is_set()

    def hold(self) -> None:
        self._going.clear()

    def go_on(self) -> None:
        self._going.set()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            slots_reserved=len(self.running),
            slots=self.recipe.max_rows,
            steps_total=self.steps,
            prompt_tokens_total=self.prompt_tokens,
            generated_tokens_total=self.generated,
            finished_total=dict(self.finished),
            step_seconds=self.step_s,
        )

    def _run(self) -> None:
        while not self._closed.wait(self.step_s):
            self._going.wait()
            with self._lock:
                for name in self.cancelled:
                    if self.running.pop(name, None) or self.waiting.pop(name, None):
                        self._count("cancelled")
                self.cancelled.clear()
                while self.waiting and len(self.running) < self.recipe.max_rows:
                    name = next(iter(self.waiting))
                    self.running[name] = self.waiting.pop(name)
                deltas = [(row, self._step(row)) for row in list(self.running.values())]
            self.steps += bool(deltas)
            for row, delta in deltas:
                row.on_delta(delta)

    def _step(self, row: Running) -> Delta:
        params, first = row.request.params, row.done == 0
        if first:
            self.prompt_tokens += len(row.request.prompt)
        tokens: tuple[int, ...] = ()
        if params.max_tokens:
            tokens = (row.script[row.done % len(row.script)],)
            row.done += 1
            self.generated += 1
        offset = len(row.text)
        text = row.decoder.decode(bytes(tokens))
        row.text += text
        reason: FinishReason | None = "length" if row.done >= params.max_tokens else None
        stop = next((stop for stop in params.stop if stop in row.text), None)
        if stop is not None:
            text, reason = text[: max(0, row.text.index(stop) - offset)], "stop"
        if reason is not None:
            del self.running[row.request.id]
            self._count(reason)
        prompt = None
        if first and params.prompt_logprobs is not None:
            prompt = tuple(
                self._logprob(token, at, params.prompt_logprobs, at == 0)
                for at, token in enumerate(row.request.prompt)
            )
        logprobs = params.logprobs
        return Delta(
            request_id=row.request.id,
            choice=row.request.choice,
            text=text,
            tokens=tokens,
            logprobs=() if logprobs is None else tuple(self._logprob(t, offset, logprobs) for t in tokens),
            prompt_logprobs=prompt,
            finish_reason=reason,
            prompt_tokens=len(row.request.prompt),
            completion_tokens=row.done,
        )

    def _logprob(self, token: int, offset: int, alternatives: int, first: bool = False) -> TokenLogprob:
        if first:
            return TokenLogprob(token, None, (), offset)
        top = tuple(((token + n) % 256, -0.25 - n) for n in range(alternatives))
        return TokenLogprob(token, -0.25, top, offset)

    def _count(self, reason: FinishReason) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1
