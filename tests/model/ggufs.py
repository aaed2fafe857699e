"""GGUF files of tiny models, as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor

from axicon.model import interchange

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
F32 = gguf.GGMLQuantizationType.F32


def byte_tokens() -> list[str]:
    """A vocabulary over bytes: specials, the 256 bytes in GPT-2's spelling, a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["he", "ll", "hell", "hello", "12"]
    return ["<|end|>", "<|start|>", "<|user|>", *sorted(ByteLevel.alphabet()), *words]


MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]


def reference(architecture: str, **changes: Any) -> transformers.PreTrainedModel:
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture]
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": len(byte_tokens()), "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True} | changes)
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())  # what the converted model can hold
    return model


def interleave(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of query and key rows, written the other way round than the code that undoes it."""
    return torch.stack([
        row for head in rows.chunk(heads) for pair in zip(*head.chunk(2), strict=True) for row in pair])


def write(
    path: Path, model: transformers.PreTrainedModel, kind: gguf.GGMLQuantizationType = F32,
    fields: dict[str, Any] | None = None, pre: str = "smollm", tokenizer: bool = True,
) -> Path:
    """The file that llama.cpp's converter would make of a model."""
    c = model.config
    arch = c.model_type
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(LAYERS)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(HIDDEN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_key_length(c.head_dim if arch != "qwen2" else WIDTH // HEADS)
    w.add_string("general.license", "apache-2.0")
    if tokenizer:
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(pre)
        w.add_token_list(byte_tokens())
        w.add_token_types([3, 3, 4] + [1] * (len(byte_tokens()) - 3))
        w.add_token_merges(MERGES)
        w.add_bos_token_id(1)
        w.add_eos_token_id(0)
        w.add_chat_template("{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}")
    for name, value in (fields or {}).items():
        (w.add_string if isinstance(value, str) else w.add_uint32)(name, value)
    back = {v: k for k, v in (interchange.BLOCK_TENSORS | interchange.MODEL_TENSORS).items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, index, local = module.split(".", 3)
            target, local = f"blk.{index}.{back[local]}.{suffix}", back[local]
        else:
            target, local = f"{back[module]}.{suffix}", ""
        if arch == "llama" and local in ("attn_q", "attn_k"):
            tensor = interleave(tensor, HEADS if local == "attn_q" else KV_HEADS)
        data = tensor.float().numpy()
        if data.ndim == 2 and kind != F32:
            w.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            w.add_tensor(target, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
