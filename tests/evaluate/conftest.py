"""A tiny tokenizer, made on the spot, that behaves like those of real models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROSE = (
    "The lamp went out. She waited for the door, counted to nine, and opened it again. "
    "Nothing moved; only the rain, which had followed them from the harbour, tapped on the glass. "
    "Question: does the boat belong to Tom? Answer: yes, it does. 12 + 30 = 42\n\n#### 42 "
)


@pytest.fixture(scope="session")
def prose() -> str:
    return PROSE


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens, <s> 0 and </s> 1; the second form puts <s> before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([PROSE], trainer)
    if request.param:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def model_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions with random weights, as a directory."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def few_lm_eval_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval knows one task of its own only: reading all of them takes seconds."""
    import lm_eval.tasks.manager as manager

    home = Path(manager.__file__).parent / "glue" / "sst2"
    shutil.copytree(home, tmp_path / "tasks" / "sst2")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "tasks" / "manager.py"))
