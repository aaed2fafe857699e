"""What the tests of `axicon compress` have in common: a tiny model on disk, and a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axicon.recipe import CompressRecipe
from jobs import compress
from jobs.progress import Reporter
from jobs.report import Report
from tests.services.fake_engine import byte_tokenizer

INT8 = {"method": "llm_int8", "relative": 5.0}
LAYERS = 3


def dense_model(folder: Path, width: int = 96) -> Path:
    """Its widths are those the C++ kernels take; with a tied head and a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=width, intermediate_size=width + 64, num_hidden_layers=LAYERS,
        num_attention_heads=width // 16, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=256, initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe(dense: Path, out: Path, **settings: Any) -> CompressRecipe:
    values = {"model": str(dense), "out": out, "threads": 1, "measure": False, "compressor": INT8, **settings}
    return CompressRecipe(**values)


def run(dense: Path, out: Path, said: io.StringIO | None = None, **settings: Any) -> Report:
    return compress.run(recipe(dense, out, **settings), Reporter(said or io.StringIO()))


def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("The lamp went out. She waited for the door. " * 20)
    return path
