"""A real model small enough to be made on the spot: random weights, and the byte tokenizer of the
stand-in."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.services.fake_engine import byte_tokenizer


def tiny_model(folder: Path, positions: int = 512) -> Path:
    """A directory that `axicon serve` takes. Every byte is about equally likely, so its text is noise in
    UTF-8."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
