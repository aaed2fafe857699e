"""Reads a Hugging Face `config.json` strictly: numbers are checked, a key is either understood or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from axicon.errors import AxiconError

ACTIVATIONS = {
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}
LARGEST = 1 << 24
"""No size in a config is larger than this (16.8 million); what is, is a mistake or an attack."""
MOST_LAYERS = 1 << 10

FOREIGN = ("compressed-tensors", "gptq", "awq")
"""`quant_method` of the other tools whose weights are read, by `axicon.model.foreign`."""

HARMLESS = frozenset({
    # What transformers writes into every config, and what only training, generation or other programs read.
    "model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype",
    "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "use_cache",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "task_specific_params", "chunk_size_feed_forward", "finetuning_task",
    "tokenizer_class", "prefix", "transformers.js_config", "max_length", "min_length", "do_sample",
    "temperature", "top_k", "top_p", "num_beams", "num_beam_groups", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "early_stopping", "num_return_sequences",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "bad_words_ids", "typical_p", "diversity_penalty",
    "encoder_no_repeat_ngram_size", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset",
    "_attn_implementation", "attn_implementation", "output_scores", "return_dict_in_generate",
    "remove_invalid_values",
})


def refuse_architecture(found: object, known: Sequence[str]) -> AxiconError:
    name = f"model_type {found!r}" if found is not None else "no model_type"
    return AxiconError(
        f"config.json: {name}, and axicon has no weight map for it; it reads {', '.join(known)}. "
        "Choose a model of one of these families")


class Reader:
    """Takes values out of a config and remembers which keys were understood."""

    def __init__(self, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        self.config, self.generation = config, generation
        self._seen = {
            "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
            "rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor",
            "quantization_config",  # axicon's own: read by `axicon.model.formats`
            "slicing",  # the same, by `axicon.model.slicing`
            "attention_variant",  # the same, by `axicon.model.variant`
        }
        if config.get("quantization_config"):
            method = config["quantization_config"]
            method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
            if method != "axicon" and method not in FOREIGN:
                raise AxiconError(
                    f"config.json: the weights were quantised by another tool ({method}); axicon reads dense "
                    f"ones, its own, {', '.join(FOREIGN)}. Take the model it was made from")

    def _get(self, key: str, default: Any) -> Any:
        self._seen.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def size(self, key: str, default: int, most: int = LARGEST) -> int:
        """A positive whole number of reasonable size."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise AxiconError(f"config.json: {key} is {value!r}, expected a whole number from 1 to {most}")
        return value

    def optional_size(self, key: str, default: int | None) -> int | None:
        if self.config.get(key) is None and default is None:
            self._seen.add(key)
            return None
        return self.size(key, default or 0)

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise AxiconError(f"config.json: {key} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise AxiconError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def token(self, key: str, default: int | None) -> int | None:
        value = self._get(key, default)
        if value is None and key not in self.config:
            return default
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise AxiconError(f"config.json: {key} is {value!r}, expected a token id")
        return value

    def end_tokens(self, default: int | None) -> tuple[int, ...]:
        """`eos_token_id` of generation_config.json where it names one, else of config.json."""
        value = self.generation.get("eos_token_id")
        if value is None:
            value = self.config.get("eos_token_id", default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise AxiconError(f"config.json: eos_token_id is {value!r}, expected token ids")
        return tuple(dict.fromkeys(ids))

    def stored_dtype(self) -> str | None:
        value = self.config.get("dtype") or self.config.get("torch_dtype")
        return value if isinstance(value, str) else None

    def activation(self, key: str, default: str) -> Any:
        value = self._get(key, default)
        if value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise AxiconError(f"config.json: {key} {value!r} is not built in; known are {known}")
        return ACTIVATIONS[value]

    def partial_rope(self, positions: int, head_width: int) -> dict[str, Any]:
        """The same where only the first channels of a head rotate, in GPT-NeoX's names: a quarter, unless
        `rotary_pct` says otherwise."""
        share, theta = self.number("rotary_pct", 0.25), self.number("rotary_emb_base", 10000.0)
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise AxiconError(f"config.json: rope parameters are {found!r}, expected an object")
        found = {"rope_theta": theta, "partial_rotary_factor": share, **found}
        share = Reader(found, {}).number("partial_rotary_factor", 1.0)
        width = int(head_width * share)
        if share > 1 or width < 2 or width % 2:
            raise AxiconError(
                f"config.json: {share:g} of the {head_width} channels of a head rotate, expected a share "
                "from 0 to 1 that makes pairs")
        rope = Reader({**self.config, "rope_parameters": found | {"partial_rotary_factor": None}}, {})
        return rope.rope(positions) | {"width": None if width == head_width else width}

    def rope(self, positions: int) -> dict[str, Any]:
        """Arguments of `Rope`, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise AxiconError(f"config.json: rope parameters are {found!r}, expected an object")
        kind = found.get("rope_type", found.get("type", "default"))
        keys: dict[str, tuple[str, ...]] = {
            "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        }
        if kind not in keys:
            raise AxiconError(
                f"config.json: rope scaling {kind!r} is not built in; known are {', '.join(keys)}. "
                "Remove the scaling to run the model at its original length")
        if self.config.get("rope_interleaved"):
            raise AxiconError("config.json: rope_interleaved is not built in")
        partial = found.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise AxiconError("config.json: partial_rotary_factor is not built in; every channel must rotate")
        scaling = Reader(found, {})
        rope = {"theta": Reader({**self.config, **found}, {}).number("rope_theta", 10000.0), "kind": kind}
        rope |= {key: scaling.number(key, 0.0) for key in keys[kind]}
        if kind == "llama3":
            rope["original_positions"] = scaling.size("original_max_position_embeddings", positions)
            if rope["high_freq_factor"] <= rope["low_freq_factor"]:
                raise AxiconError("config.json: high_freq_factor must be greater than low_freq_factor")
        return rope

    def windows(self, layers: int, positions: int, *, default: int | None, switch: bool) -> list[int | None]:
        """Sliding window of each layer; None where it would never cut anything.

        Mistral applies `sliding_window` to every layer. Qwen applies it only with `use_sliding_window`, to
        the layers that `layer_types` names, or else to those from `max_window_layers` on.
        """
        off = switch and not self.flag("use_sliding_window", False)
        if off or self.config.get("sliding_window", default) is None:
            return [None] * layers
        window = self.size("sliding_window", default or 0)
        kinds = self.config.get("layer_types")
        if kinds is None:
            first = self.config.get("max_window_layers", 28) if switch else 0
            kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise AxiconError(
                "config.json: layer_types must name sliding_attention or full_attention once per layer")
        return [window if kind == "sliding_attention" and window < positions else None for kind in kinds]

    def finish(self, ignored: Sequence[str] = ()) -> None:
        """Refuse what was not understood and is switched on: it could change what the model computes."""
        unknown = [
            key for key, value in self.config.items()
            if key not in self._seen and key not in HARMLESS and key not in ignored
            and value not in (None, False, 0, "", [], {})
        ]
        if unknown:
            raise AxiconError(
                f"config.json: {', '.join(sorted(unknown))} is not understood for "
                f"{self.config['model_type']} and could change the model. If it is only a note, remove "
                "it from config.json")
