"""Our decoder as a model of lm-eval: score a continuation, score a text, generate until.

Conventions are those of lm-eval's own `hf` model, so both give the same figures: context and continuation are
encoded together and cut at the context's length, a blank at the boundary belongs to the continuation, an
empty context becomes the prefix token (BOS, else EOS), the model is fed all tokens but the last, and what
does not fit is cut from the left. Importing this module needs lm-eval (the extra `eval`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.evaluate.answered import Answered
from axicon.evaluate.packed import LanguageModel, hidden_states
from axicon.evaluate.perplexity import HEAD_ROWS
from axicon.generate.request import Delta, Overloaded, Request, RequestError, SamplingParams

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise AxiconError(f"lm-eval cannot be imported ({error}): pip install 'axicon[eval]'") from error

Scored = tuple[float, bool]
"""Summed log-probability of a continuation, and whether greedy decoding would have produced it."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, requests done, requests to do."""

Text = tuple[int, ...]

BATCH_TOKENS = 2048
"""Tokens of one pass. Texts are packed end to end, so none of them are padding."""
DEFAULT_NEW_TOKENS = 256
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class GenerationEngine(Protocol):
    """What is asked of an Engine here."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Delta]: ...


class AxiconLM(TemplateLM):
    """`decoder` scores; an engine over the same weights, made when first needed, continues.

    `max_length` is the longest input in tokens, usually the model's `max_positions`. `seed` is that of
    sampled generation; request number i of a call uses seed + i. Without `make_engine` generating tasks are
    refused. What is in `answered` is not computed again.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: Any,
        *,
        max_length: int,
        make_engine: Callable[[], GenerationEngine] | None = None,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 1234,
        progress: Progress | None = None,
        answered: Answered | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._make_engine = make_engine
        self.engine: GenerationEngine | None = None
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.answered = answered or Answered()
        self._progress = progress or (lambda what, done, total: None)

    # What lm-eval asks a model about itself

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; by default with the tokenizer's special tokens, unless it brings its own BOS."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    # The three questions

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, each token predicted once, each text by itself."""
        windows: list[tuple[str, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [("", *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations without their context, cut before the first stop string."""
        if self.engine is None:
            if self._make_engine is None:
                raise AxiconError("this task generates text, and no engine was given to generate with")
            self.engine = self._make_engine()
        settings = [normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS) for request in requests]
        asked = [
            self._request(number, request.args[0], wanted)
            for number, (request, wanted) in enumerate(zip(requests, settings, strict=True))
        ]
        texts = self._continuations(asked)
        answers = []
        for request, one, wanted in zip(requests, asked, settings, strict=True):
            text = postprocess_generated_text(texts[one.id], stop=self._stops(wanted), think_end_token=None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            answers.append(text)
        return answers

    # Scoring

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        """Score (key, context ids, continuation ids); contexts have at least one token, continuations too.

        Continuations that share context and all but their last token share one pass.
        """
        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, (_key, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise AxiconError(
                    f"a continuation of {len(continuation)} tokens: the model takes {self.max_length}"
                )
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            sharing.setdefault(tokens, []).append(number)
        scores: list[Scored | None] = [None] * len(requests)
        done = 0
        for batch in _batches(sorted(sharing, key=len, reverse=True), self.batch_tokens):
            numbers = [sharing[tokens] for tokens in batch]
            targets = [[requests[number][2] for number in group] for group in numbers]
            flat = (number for group in numbers for number in group)
            for number, score in zip(flat, self._scores(batch, targets), strict=True):
                scores[number] = score
                key = requests[number][0]
                if isinstance(key, tuple):
                    self.cache_hook.add_partial("loglikelihood", key, score)
                done += 1
            self._progress("scoring", done, len(requests))
        return [score for score in scores if score is not None]

    def _scores(self, inputs: Sequence[Text], targets: Sequence[Sequence[list[int]]]) -> list[Scored]:
        """As `_score`, unless this very pass was made before."""
        key = self.answered.key("scores", [inputs, targets])
        known = self.answered.get(key)
        if known is None:
            known = list(self._score(inputs, targets))
            self.answered.put(key, known)
        return [(float(logprob), bool(greedy)) for logprob, greedy in known]

    def _score(self, inputs: Sequence[Text], targets: Sequence[Sequence[list[int]]]) -> Iterator[Scored]:
        """Scores of all `targets` of all inputs, in order. The last n rows predict a target of n."""
        x_ND = hidden_states(self.decoder, inputs)
        ends = itertools.accumulate(len(tokens) for tokens in inputs)
        wanted = [(end, target) for end, group in zip(ends, targets, strict=True) for target in group]
        rows_R = torch.cat([torch.arange(end - len(target), end) for end, target in wanted]).to(x_ND.device)
        targets_R = torch.tensor([token for _, target in wanted for token in target], device=x_ND.device)
        logprobs_R, greedy_R = self._token_scores(x_ND[rows_R], targets_R)
        sizes = [len(target) for _, target in wanted]
        for logprobs, greedy in zip(
            torch.split(logprobs_R, sizes), torch.split(greedy_R, sizes), strict=True
        ):
            yield logprobs.double().sum().item(), bool(greedy.all())

    def _token_scores(self, x_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        """Per row: log-probability of the target, and whether it is the most probable token."""
        logprobs, greedy = [], []
        for x, targets in zip(torch.split(x_RD, HEAD_ROWS), torch.split(targets_R, HEAD_ROWS), strict=True):
            logprobs_RV = self.decoder.head(x).float().log_softmax(-1)
            logprobs.append(logprobs_RV.gather(1, targets[:, None])[:, 0])
            greedy.append(logprobs_RV.argmax(-1) == targets)
        return torch.cat(logprobs), torch.cat(greedy)

    # Generating

    def _stops(self, wanted: Mapping[str, Any]) -> list[str]:
        return [stop for stop in [*wanted["until"], self.tokenizer.eos_token] if stop]

    def _request(self, number: int, context: str, wanted: Mapping[str, Any]) -> Request:
        known = {"until", "max_gen_toks", "do_sample", *SAMPLING}
        unknown = [f"{name}={value}" for name, value in wanted.items() if name not in known]
        if unknown:
            raise AxiconError(f"the task generates with {', '.join(unknown)}, which this engine does not do")
        new_tokens = int(wanted["max_gen_toks"])
        room = self.max_length - new_tokens
        if room < 1:
            raise AxiconError(
                f"the task generates {new_tokens} tokens, the model takes {self.max_length} in all"
            )
        sampling = {name: wanted[name] for name in SAMPLING if name in wanted}
        if not wanted["do_sample"]:
            sampling["temperature"] = 0.0
        params = SamplingParams(
            max_tokens=new_tokens, stop=self._stops(wanted), seed=self.seed + number, **sampling
        )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        return Request(id=f"eval-{number}", prompt=prompt[-room:], params=params)

    def _continuations(self, requests: Sequence[Request]) -> dict[str, str]:
        """Texts by request id. All or nothing is taken up from an earlier run: whether rows that go through
        the engine in other company keep their bits depends on the numbers computed in."""
        assert self.engine is not None
        asked = [[request.id, list(request.prompt), asdict(request.params)] for request in requests]
        key = self.answered.key("texts", asked)
        known = self.answered.get(key)
        if known is None:
            longest_first = sorted(requests, key=lambda request: -len(request.prompt))
            known = self._continue(self.engine, longest_first)
            self.answered.put(key, known)
        return {str(name): str(text) for name, text in known.items()}

    def _continue(self, engine: GenerationEngine, requests: Sequence[Request]) -> dict[str, str]:
        texts = {request.id: "" for request in requests}
        waiting = deque(requests)
        done = 0
        while waiting or engine.has_work:
            while waiting and _admitted(engine, waiting[0]):
                waiting.popleft()
            for delta in engine.step():
                texts[delta.request_id] += delta.text
                if delta.error is not None:
                    raise AxiconError(f"generation failed: {delta.error}")
                if delta.finish_reason is not None:
                    done += 1
                    self._progress("generating", done, len(requests))
        return texts


def _admitted(engine: GenerationEngine, request: Request) -> bool:
    try:
        engine.add(request)
    except Overloaded:
        return False
    except RequestError as error:
        raise AxiconError(f"the task's request cannot be served: {error}") from None
    return True


def _batches(texts: Sequence[Text], tokens: int) -> Iterator[list[Text]]:
    """Runs of texts with at most so many tokens together; a longer text goes alone."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
