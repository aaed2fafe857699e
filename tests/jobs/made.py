"""Model directories that are small enough to be only files: enough for digests, sizes and manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from axicon.model.artefact import write_manifest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def model_files(folder: Path, value: float = 0.0) -> Path:
    """config.json and weights of one tensor; `value` makes the digest another one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"lm_head.weight": torch.full((32, 8), value)}, folder / "model.safetensors")
    return folder


def made_from(
    folder: Path,
    parents: Sequence[Mapping[str, str]] = (),
    chain: Sequence[Mapping[str, Any]] = (),
    value: float = 0.0,
) -> Path:
    """The same with a manifest."""
    model_files(folder, value)
    write_manifest(folder, kind="model", name=folder.name, parents=list(parents), chain=list(chain))
    return folder
