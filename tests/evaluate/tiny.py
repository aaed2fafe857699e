"""A model small enough to be made on the spot, with a tokenizer that behaves like those of real models."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROSE = (
    "The lamp went out. She waited for the door, counted to nine, and opened it again. "
    "Nothing moved; only the rain, which had followed them from the harbour, tapped on the glass. "
    "Question: does the boat belong to Tom? Answer: yes, it does. 12 + 30 = 42\n\n#### 42 "
)


def make_tokenizer(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens, <s> 0 and </s> 1; with `add_bos`, <s> comes before every text."""
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
    if add_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(positions: int = 64) -> LlamaForCausalLM:
    """Random weights, large enough that one token is clearly the most probable."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # which the C++ kernels know
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, positions: int = 64) -> Path:
    """`tiny_llama` with a tokenizer, as a directory."""
    tiny_llama(positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
