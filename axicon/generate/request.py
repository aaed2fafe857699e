"""What goes into the engine and what comes out: plain data, safe to hand between threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from axicon.generate.steptimes import StepTimes

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How one request's next tokens are guessed, and how guesses are checked."""

    method: str
    """A name in `DRAFTERS` of `axicon.generate.drafting`."""
    width: int | None = None
    depth: int | None = None
    """None: what the method has by itself."""
    verify: Literal["rrs", "coupled"] | None = None
    """rrs: the text has the law of a run without guesses. coupled: it is the text of such a run, token for
    token. None: coupled where the request has a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is continued. Checked where it enters (`Engine.add` raises `RequestError`), never
    later.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """64-bit. The engine draws one at admission when it is None."""
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Alternatives reported per generated token; 0 reports the chosen token alone; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's own tokens (the first has none)."""
    speculation: Speculation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """How much of its cache a request keeps, and by which policy. Checked where it enters."""

    policy: str
    """`full`, or a name of `KV_POLICIES`."""
    budget: float = 0.2
    """Slots kept per head, everything included: up to 1 a share of the prompt, above 1 a count."""
    recent: float | None = None
    """Newest slots among them, in the budget's unit; None is what the policy takes."""
    sinks: int = 4
    """First positions among them."""
    evict_every: int = 16
    """The cache is cut when the tokens committed are a multiple of this."""
    score: str | None = None
    """One of the policy's `variants`; None is the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One choice to generate. A request with `n` choices is `n` of these with `choice` 0..n-1 and the same
    seed.
    """

    id: str
    prompt: Sequence[int]
    """Token ids, at least one."""
    params: SamplingParams = SamplingParams()
    choice: int = 0
    deadline: float | None = None
    """`time.monotonic()` seconds after which it is ended with reason "deadline"."""
    adapter: int = 0
    kv: KVSettings | None = None
    """None keeps everything."""
    namespace: str = ""
    """Requests of equal namespaces may take over what the others computed of the same prompt."""
    details: bool = False
    """Say of each token whether it was guessed, and what a bounded cache holds."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log, from the raw logits) of one token and of the best alternatives there."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob), best first."""
    text_offset: int = 0
    """Where the token's text begins, in characters from the start of the text it belongs to."""


class Origin(NamedTuple):
    """One generated token."""

    text: str
    """What it added to the text: nothing where it is a part of a character, or held back."""
    drafted: bool
    """It was guessed ahead and right, rather than drawn behind the last token."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which positions a cache still holds, layer by layer."""

    positions: int
    """Tokens that were committed."""
    per_column: int
    """Positions in a column."""
    layers: tuple[str, ...]
    """Of each layer a digit per column, from 0, where no head holds any of it, to 9, where all hold all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to one request. The texts of all its deltas, joined, are its final text."""

    request_id: str
    choice: int = 0
    text: str = ""
    """Never half a character, never a part of a stop string."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Set once, with the first delta, when asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of a request."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it."""
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    """Counts so far; the latter two of tokens that were guessed ahead."""
    cached_tokens: int = 0
    """Of the prompt, those that were not computed but taken over from an earlier request."""
    origins: tuple[Origin, ...] = ()
    """Of `tokens`, where the request asks for details."""
    kept: Kept | None = None
    """What its cache holds, set when a bounded one was cut, and at the end."""

    def followed_by(self, later: Delta) -> Delta:
        """This and the next delta of the same choice as one."""
        return replace(
            later, text=self.text + later.text, tokens=self.tokens + later.tokens,
            logprobs=self.logprobs + later.logprobs, origins=self.origins + later.origins,
            kept=self.kept if later.kept is None else later.kept,
            prompt_logprobs=later.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs,
        )  # fmt: skip


class RequestError(ValueError):
    """A request that cannot be served as asked. `param` names the field, for an API error body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(Exception):
    """The queue is full; `retry_after` seconds is when trying again makes sense."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine accepts. Lengths are tokens; what the model itself cannot do is refused without being
    listed.
    """

    max_queue: int = 256
    """Requests that may be there beyond the rows that run at once; one more is answered with `Overloaded`."""
    max_model_len: int | None = None
    """Prompt and output together; None means what the model knows and the cache holds."""
    max_logprobs: int = 20
    max_stops: int = 16
    max_logit_bias: int = 1024
    kv_floor: int = 32
    """The smallest cache budget, in slots."""
    prefix_cache: float = 0.0
    """The most of the cache that may hold beginnings of earlier prompts, a share. 0: none are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """What guessing by one method has come to. Lists are by depth, from 1."""

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    left_out: int = 0
    """Guesses that were not checked, because it would have taken longer than it saved."""
    failed: int = 0
    """Requests that went on without guesses, because guessing raised."""
    gain: float = 1.0
    """Tokens per second as estimated, over those without guesses, at the last step that had the choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """Counts of tokens; `slots` is a gauge."""

    slots: int = 0
    """Held by blocks now."""
    asked_total: int = 0
    """Of prompts that were looked up."""
    reused_total: int = 0
    """Of those, what was taken over instead of computed."""
    requests_total: int = 0
    """Requests that took something over."""
    dropped_total: int = 0
    """Given back because the room was needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts and gauges at one moment. Everything named `_total` only ever grows."""

    running: int = 0
    waiting: int = 0
    slots_reserved: int = 0
    """Cache slots per KV head that admitted requests have set aside, of `slots`."""
    slots: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0
    """Prompt tokens computed."""
    generated_tokens_total: int = 0
    finished_total: Mapping[FinishReason, int] = field(default_factory=dict)
    step_seconds: float = 0.0
    """Wall time of the last step that computed something."""
    step_tokens: int = 0
    """Nodes computed in that step."""
    decode_steps: StepTimes = field(default_factory=StepTimes)
    """Steps without a prompt, by how long they took."""
    kv_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of keys and values that requests hold now, by policy."""
    kv_slots: Mapping[str, int] = field(default_factory=dict)
    """Slots they have set aside, by policy."""
    kv_evicted_total: Mapping[str, int] = field(default_factory=dict)
    """Slots given up, by policy, in the mean over layers and heads."""
    kept_bytes: int = 0
    """Of the beginnings of earlier prompts."""
    prefixes: PrefixStats = field(default_factory=PrefixStats)
    drafts: Mapping[str, DraftStats] = field(default_factory=dict)
    """By the name of the method."""
