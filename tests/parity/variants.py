"""Every variant of every architecture with a weight map, as the arguments of a tiny transformers config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

POSITIONS = 64

_llama = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
_grouped = _llama | {"num_key_value_heads": 2}
_opt = {
    "vocab_size": 97, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 48,
}
_neox = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 3, "max_position_embeddings": POSITIONS,
}
_llama3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", _opt),
    "opt_350m": ("OPT", _opt | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt_projected": ("OPT", _opt | {"word_embed_proj_dim": 32}),
    "opt_plain": ("OPT", _opt | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt_gelu": ("OPT", _opt | {"activation_function": "gelu"}),
    "opt_no_final_norm": ("OPT", _opt | {"_remove_final_layer_norm": True}),
    "opt_untied": ("OPT", _opt | {"tie_word_embeddings": False}),
    "llama": ("Llama", _llama),
    "llama_tied": ("Llama", _llama | {"tie_word_embeddings": True}),
    "llama_grouped": ("Llama", _grouped),
    "llama_one_kv_head": ("Llama", _llama | {"num_key_value_heads": 1}),
    "llama_biases": ("Llama", _grouped | {"attention_bias": True, "mlp_bias": True}),
    "llama_eps": ("Llama", _llama | {"rms_norm_eps": 1e-2}),
    "llama_gelu": ("Llama", _llama | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_wide_heads": ("Llama", _grouped | {"head_dim": 16}),
    "llama_theta": ("Llama", _grouped | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    "llama_linear": ("Llama", _grouped | {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama_llama3": ("Llama", _grouped | {"head_dim": 16, "rope_parameters": _llama3}),
    "mistral": ("Mistral", _grouped | {"sliding_window": None}),
    "mistral_window": ("Mistral", _grouped | {"sliding_window": 7}),
    "mistral_wide_window": ("Mistral", _grouped | {"sliding_window": 4096}),
    "qwen2": ("Qwen2", _grouped),
    "qwen2_window": ("Qwen2", _grouped | {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2_layer_types": ("Qwen2", _grouped | {
        "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3": ("Qwen3", _grouped | {"head_dim": 16}),
    "qwen3_tied": ("Qwen3", _grouped | {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "neox": ("GPTNeoX", _neox),
    "neox_sequential": ("GPTNeoX", _neox | {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "neox_whole_rotary": ("GPTNeoX", _neox | {"rotary_pct": 1.0, "rotary_emb_base": 500}),
    "neox_no_biases": ("GPTNeoX", _neox | {"attention_bias": False, "hidden_act": "gelu_new"}),
    "neox_tied": ("GPTNeoX", _neox | {"tie_word_embeddings": True, "hidden_act": "relu"}),
    "neox_scaled": ("GPTNeoX", _neox | {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 100.0, "factor": 4.0, "partial_rotary_factor": 0.25}}),
}


def reference(name: str) -> transformers.PreTrainedModel:
    """The tiny random model in float32, every weight away from its initial zero or one."""
    kind, arguments = VARIANTS[name]
    config = getattr(transformers, f"{kind}Config")(**arguments)
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(name: str, folder: Path, **arguments: Any) -> transformers.PreTrainedModel:
    """The same, written to `folder` as transformers writes it."""
    model = reference(name)
    model.save_pretrained(folder, **arguments)
    return model
