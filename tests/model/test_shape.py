"""ModelShape: what a config says, and what is refused because the decoder would not compute it."""

from __future__ import annotations

from typing import Any

import pytest

from axicon.errors import AxiconError
from axicon.model.shape import ARCHITECTURES, BlockShape, ModelShape, Rope

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}


NEOX: dict[str, Any] = {"model_type": "gpt_neox", "num_key_value_heads": None}


def shape(**changes: Any) -> ModelShape:
    return ModelShape.from_config(LLAMA | changes)


def test_sizes_are_read() -> None:
    s = shape()
    assert (s.vocab, s.width, s.layers, s.max_positions) == (97, 48, 3, 64)
    assert s.blocks[0] == BlockShape(
        width_in=48, width_middle=48, width_out=48, heads=6, kv_heads=2, head_width=8, hidden=80,
        scale=8**-0.5)
    assert not s.project_in
    assert not s.project_out


def test_rows_of_fused_products() -> None:
    assert shape().blocks[0].parts("qkv") == {"q": slice(0, 48), "k": slice(48, 64), "v": slice(64, 80)}
    assert shape().blocks[0].parts("gate_up") == {"gate": slice(0, 80), "up": slice(80, 160)}


@pytest.mark.parametrize(
    ("architecture", "qkv", "out", "qk_norm", "bos", "eos"),
    [("llama", False, False, False, 1, (2,)), ("mistral", False, False, False, 1, (2,)),
     ("qwen2", True, False, False, None, ()), ("qwen3", False, False, True, None, ())],
)
def test_what_distinguishes_the_llama_family(
    architecture: str, qkv: bool, out: bool, qk_norm: bool, bos: int | None, eos: tuple[int, ...]
) -> None:
    s = shape(model_type=architecture)
    block = s.blocks[0]
    assert (block.qkv_bias, block.out_bias, block.qk_norm) == (qkv, out, qk_norm)
    assert (s.bos_id, s.eos_ids) == (bos, eos)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """A config with nothing in it means the same here and there."""
    import transformers

    config = transformers.AutoConfig.for_model(architecture)
    empty = ModelShape.from_config({"model_type": architecture})
    full = ModelShape.from_config(config.to_dict())
    assert empty == full


def test_old_and_new_rope_settings_mean_the_same() -> None:
    linear = Rope(theta=500.0, kind="linear", factor=4.0)
    assert shape(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0}).rope == linear
    new = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    assert shape(rope_parameters=new).rope == linear
    assert shape(rope_scaling=None).rope == Rope()


def test_llama3_scaling_without_original_length_uses_the_models() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert shape(rope_scaling=scaling).rope == Rope(kind="llama3", factor=8.0, original_positions=64)


def test_old_and_new_names_of_partial_rotation_mean_the_same() -> None:
    new = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert shape(**NEOX, rope_parameters=new).rope == Rope(theta=500.0, width=4)
    assert shape(**NEOX, rotary_pct=0.5, rotary_emb_base=500).rope == Rope(theta=500.0, width=4)
    assert shape(**NEOX).rope == Rope(width=2)
    assert shape(**NEOX, rotary_pct=1.0).rope == Rope()


def test_windows_that_never_cut_are_none() -> None:
    assert [b.window for b in shape(model_type="mistral", sliding_window=63).blocks] == [63] * 3
    assert [b.window for b in shape(model_type="mistral", sliding_window=64).blocks] == [None] * 3
    assert [b.window for b in shape(model_type="qwen2", sliding_window=5).blocks] == [None] * 3
    qwen = shape(model_type="qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=2)
    assert [b.window for b in qwen.blocks] == [None, None, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*opt, llama, mistral, qwen2, qwen3, gpt_neox"),
        (NEOX | {"rotary_pct": 0.1}, "0.1 of the 8 channels of a head rotate"),
        (NEOX | {"rotary_pct": 1.5}, "1.5 of the 8 channels"),
        (NEOX | {"rotary_pct": -1}, "rotary_pct is -1"),
        (NEOX | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not built in"),
        (NEOX | {"use_parallel_residual": 1}, "use_parallel_residual is 1"),
        (NEOX | {"rotary_pct": 0.5, "new_switch": 1}, "new_switch is not understood for gpt_neox"),
        ({"rotary_pct": 0.5}, "rotary_pct is not understood for llama"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "no weight map"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -48}, "hidden_size is -48"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 1 << 25}, "from 1 to"),
        ({"num_hidden_layers": 5000}, "from 1 to 1024"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 6"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"hidden_act": "xielu"}, "'xielu' is not built in; known are relu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not built in"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is 0.0"),
        ({"rope_scaling": "linear"}, "expected an object"),
        ({"rope_theta": 0}, "rope_theta is"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "every channel must rotate"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "layer_types": ["x"] * 3},
         "layer_types must name"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, r"another tool \(hqq\)"),
        ({"num_experts": 8}, "num_experts is not understood for llama"),
        ({"new_switch": True, "other": 3}, "new_switch, other is not understood"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AxiconError, match=message) as error:
        shape(**changes)
    assert "\n" not in str(error.value)


def test_notes_and_switches_that_are_off_are_no_reason_to_refuse() -> None:
    plain = shape()
    assert shape(_name_or_path="x", transformers_version="4.1", torch_dtype="float16") == plain
    assert shape(new_switch=False, another=None, third=0, fourth=[]) == plain
    assert shape(partial_rotary_factor=1.0) == plain
    published = {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
                 "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}
    assert shape(**published) == plain
