"""A model directory of a well-known shape with random weights: `python benchmarks/random_model.py SHAPE
DIR`.

Speed and memory do not depend on what weights say. The tokenizer is the embedded model's, and so is the size
of the vocabulary, 49,152 instead of OPT's 50,272: other programs refuse a model whose two differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from axicon.errors import AxiconError
from axicon.model.artefact import atomic_directory
from axicon.model.checkpoint import load_tokenizer, resolve

OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 49152, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "opt-125m": OPT | {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072,
                       "num_hidden_layers": 12, "num_attention_heads": 12},
    "opt-1.3b": OPT | {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192,
                       "num_hidden_layers": 24, "num_attention_heads": 32},
}  # fmt: skip


def write(shape: str, target: Path) -> None:
    """Raises AxiconError for an unknown shape or a directory that exists."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape not in SHAPES:
        raise AxiconError(f"{shape}: known shapes are {', '.join(SHAPES)}")
    if target.exists():
        raise AxiconError(f"{target} exists: name a directory that does not")
    torch.manual_seed(0)
    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {
        name: (torch.randn(value.shape) * 0.02).to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    with atomic_directory(target) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
        load_tokenizer(resolve("demo")).save_pretrained(folder)


if __name__ == "__main__":
    try:
        write(sys.argv[1], Path(sys.argv[2]))
    except IndexError:
        sys.exit(f"usage: python benchmarks/random_model.py {'|'.join(SHAPES)} DIR")
    except AxiconError as error:
        sys.exit(f"random_model: {error}")
