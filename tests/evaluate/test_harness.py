"""The lm-eval adapter gives what lm-eval's own `hf` model gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from axicon.errors import AxiconError
from axicon.evaluate.harness import AxiconLM
from axicon.generate.request import Delta, Overloaded, Request, RequestError
from tests.evaluate.tiny import tiny_llama

LENGTH = 64


class Reference:
    """A transformers model behind the calls the adapter makes."""

    device = torch.device("cpu")

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
        begins = (positions_N == 0).nonzero().flatten().tolist()
        texts = torch.tensor_split(tokens_N, begins[1:])
        assert positions_N.tolist() == [position for text in texts for position in range(len(text))]
        return torch.cat([self.model.model(text[None]).last_hidden_state[0] for text in texts])

    def head(self, x_ND: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(x_ND)
        return logits


@pytest.fixture(scope="module")
def hf() -> LlamaForCausalLM:
    return tiny_llama(LENGTH)


@pytest.fixture
def oracle(hf: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> HFLM:
    return HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=1)


@pytest.fixture
def ours(hf: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> AxiconLM:
    return AxiconLM(Reference(hf), tokenizer, max_length=LENGTH)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture
def pairs(prose: str) -> list[tuple[str, str]]:
    words = prose.split(" ")
    rng = random.Random(5)
    cut = []
    for _ in range(30):
        start = rng.randrange(len(words) - 12)
        middle, end = start + rng.randint(1, 8), start + 12
        cut.append(
            (" ".join(words[start:middle]), " " + " ".join(words[middle : rng.randint(middle + 1, end)]))
        )
    edges = [
        ("", "The lamp"),
        ("<s>The lamp", " went"),
        ("trailing blank ", "word"),
        ("Tom?", " yes"),
        ("Tom?", " no"),
        ("Tom?", " no"),
    ]
    too_long = [(prose, " and so on")]
    return cut + edges + too_long


def test_continuations_score_as_in_lm_eval(
    ours: AxiconLM, oracle: HFLM, pairs: list[tuple[str, str]]
) -> None:
    expected = oracle.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    got = ours.loglikelihood(instances("loglikelihood", pairs))
    assert len(got) == len(pairs)
    for (logprob, greedy), (logprob_there, greedy_there) in zip(got, expected, strict=True):
        assert logprob == pytest.approx(logprob_there, abs=1e-4)
        assert greedy is greedy_there


def test_the_greedy_continuation_is_recognised(ours: AxiconLM, hf: LlamaForCausalLM) -> None:
    ids = [5, 17, 301]
    best = int(hf(torch.tensor([ids])).logits[0, -1].argmax())
    assert [
        greedy for _, greedy in ours._loglikelihood_tokens([("", ids, [best]), ("", ids, [best - 1])])
    ] == [
        True,
        False,
    ]


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_order_and_batch_size_change_nothing(
    ours: AxiconLM, pairs: list[tuple[str, str]], batch_tokens: int
) -> None:
    expected = dict(zip(pairs, ours.loglikelihood(instances("loglikelihood", pairs)), strict=True))
    shuffled = random.Random(1).sample(pairs, len(pairs))
    ours.batch_tokens = batch_tokens
    got = ours.loglikelihood(instances("loglikelihood", shuffled))
    for pair, (logprob, greedy) in zip(shuffled, got, strict=True):
        assert (pytest.approx(logprob, abs=1e-4), greedy) == expected[pair]


def test_choices_of_one_context_share_a_pass(ours: AxiconLM, hf: LlamaForCausalLM) -> None:
    seen: list[int] = []

    class Spy(Reference):
        def __call__(self, tokens_N: Tensor, positions_N: Tensor, attend: Any) -> Tensor:
            seen.append(len(tokens_N))
            return super().__call__(tokens_N, positions_N, attend)

    ours.decoder = Spy(hf)
    ours._loglikelihood_tokens([("", [2, 3, 4], [token]) for token in (5, 6, 7)] + [("", [2, 3], [4, 9])])
    assert seen == [3]


@pytest.mark.parametrize("repeat", [1, 3])
def test_whole_texts_score_as_in_lm_eval(ours: AxiconLM, oracle: HFLM, prose: str, repeat: int) -> None:
    texts = [(prose * repeat,), ("The lamp",), (prose[:200],)]
    expected = oracle.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    got = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    assert got == pytest.approx(expected, abs=1e-3)


def test_a_continuation_longer_than_the_model_is_refused(ours: AxiconLM) -> None:
    with pytest.raises(AxiconError, match=f"continuation of {LENGTH + 1} tokens: the model takes {LENGTH}"):
        ours._loglikelihood_tokens([("", [1], [2] * (LENGTH + 1))])


class Script:
    """An engine that admits two requests at a time and says a fixed text, a piece per step."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: dict[str, list[str]]) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.running: dict[str, list[str]] = {}
        self.requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> None:
        if len(self.running) == 2:
            raise Overloaded("full")
        self.requests[request.id] = request
        prompt = self.tokenizer.decode(request.prompt, skip_special_tokens=True)
        self.running[request.id] = list(self.answers[prompt])

    def step(self) -> list[Delta]:
        deltas = []
        for name in list(self.running):
            text = self.running[name].pop(0)
            last = not self.running[name]
            deltas.append(Delta(request_id=name, text=text, finish_reason="stop" if last else None))
            if last:
                del self.running[name]
        return deltas


def test_answers_come_back_in_order_and_cut_at_stops(
    ours: AxiconLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers = {
        "The lamp": ["a", "b"],
        "Tom": ["one", " two Que", "stion: x"],
        "rain": ["only"],
        "42": ["z"] * 9,
    }
    engine = ours.engine = Script(tokenizer, answers)
    kwargs = {"until": ["Question:"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    order = ["rain", "42", "Tom", "The lamp"]
    got = ours.generate_until(instances("generate_until", [(name, dict(kwargs)) for name in order]))
    assert got == ["only", "z" * 9, "one two ", "ab"]
    params = engine.requests["eval-0"].params
    assert (params.temperature, params.max_tokens, params.stop) == (0.0, 20, ["Question:", "</s>"])
    assert params.seed == 1234
    assert engine.requests["eval-3"].params.seed == 1237


def test_sampling_settings_reach_the_engine(ours: AxiconLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = ours.engine = Script(tokenizer, {"Tom": ["x"]})
    ours.generate_until(
        instances(
            "generate_until",
            [
                (
                    "Tom",
                    {"until": "\n", "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 9},
                )
            ],
        )
    )
    params = engine.requests["eval-0"].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 9)


def test_long_contexts_are_cut_from_the_left(
    ours: AxiconLM, tokenizer: PreTrainedTokenizerFast, prose: str
) -> None:
    kept = ours.tok_encode(prose)[-(LENGTH - 8) :]
    engine = ours.engine = Script(tokenizer, {tokenizer.decode(kept, skip_special_tokens=True): ["x"]})
    ours.generate_until(instances("generate_until", [(prose, {"until": [], "max_gen_toks": 8})]))
    assert list(engine.requests["eval-0"].prompt) == kept


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"until": [], "max_gen_toks": 8, "num_beams": 4}, "generates with num_beams=4"),
        (
            {"until": [], "max_gen_toks": LENGTH},
            f"generates {LENGTH} tokens, the model takes {LENGTH} in all",
        ),
    ],
)
def test_generation_that_cannot_be_done_is_refused(ours: AxiconLM, kwargs: dict[str, Any], says: str) -> None:
    ours.engine = Script(ours.tokenizer, {})
    with pytest.raises(AxiconError, match=says):
        ours.generate_until(instances("generate_until", [("Tom", kwargs)]))


def test_generation_without_an_engine_is_refused(ours: AxiconLM) -> None:
    with pytest.raises(AxiconError, match="no engine"):
        ours.generate_until(instances("generate_until", [("Tom", {"until": []})]))


def test_a_request_the_engine_refuses_is_one_line(ours: AxiconLM) -> None:
    class Refusing(Script):
        def add(self, request: Request) -> None:
            raise RequestError("too many stops", "stop")

    ours.engine = Refusing(ours.tokenizer, {})
    with pytest.raises(AxiconError, match="cannot be served: too many stops"):
        ours.generate_until(instances("generate_until", [("Tom", {"until": [], "max_gen_toks": 8})]))
