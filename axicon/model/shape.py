"""ModelShape: sizes and switches of a decoder, read from a Hugging Face config.

A family only fills this in; the decoder never asks which family it is. Widths are kept per block (residual
stream in, between attention and MLP, out), so that a model whose channels were deleted is still a shape.

Letters: B batch, T tokens, N rows of a step, D width of the residual stream, H query heads, G key/value
heads, K head width, F hidden width of the MLP, V vocabulary, P positions, L layers, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from axicon.errors import AxiconError
from axicon.model import slicing, variant
from axicon.model.config import MOST_LAYERS, Reader, refuse_architecture
from axicon.model.variant import PLAIN, AttentionVariant

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
NormKind = Literal["rms", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions (arXiv:2104.09864): inverse frequencies theta^(-2i/K), then a scaling.

    `linear` divides all of them by `factor`; `llama3` divides the long wavelengths only, with a smooth
    passage between (Llama 3.1, as in transformers' `_compute_llama3_parameters`).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    width: int | None = None
    """Channels of each head that rotate, the first ones (GPT-NeoX); None rotates all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """One block."""

    width_in: int
    width_middle: int
    """Residual width between attention and MLP."""
    width_out: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    """Width inside the MLP (F)."""
    scale: float
    """What query-key products are multiplied by."""
    gated: bool = True
    """MLP is down(act(gate(x)) * up(x)) instead of down(act(up(x)))."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each query and key head before the rotation (Qwen3)."""
    attention: AttentionVariant = PLAIN
    window: int | None = None
    """Sliding window: position p sees p - window + 1 .. p. None sees everything before it."""
    parallel: bool = False
    """MLP beside attention, both on the block's input: x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX)."""
    attention_shortcut: bool = False
    """A matrix on the residual around attention instead of the identity, (width_in -> width_middle)."""
    mlp_shortcut: bool = False
    """The same around the MLP, (width_middle -> width_out)."""

    def parts(self, module: str) -> dict[str, slice]:
        """Rows of a fused product by part, in order: `qkv` holds q, k and v; `gate_up` gate and up."""
        query, key = self.heads * self.head_width, self.kv_heads * self.head_width
        sizes = {
            "qkv": {"q": query, "k": key, "v": key},
            "gate_up": {"gate": self.hidden, "up": self.hidden},
        }[module]
        rows, start = {}, 0
        for name, size in sizes.items():
            rows[name] = slice(start, start + size)
            start += size
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    family: Literal["opt", "llama", "gpt_neox"]
    architecture: str
    """`model_type` of the config: opt, llama, mistral, qwen2, qwen3, gpt_neox."""
    vocab: int
    embedding_width: int
    """Columns of the token embedding; projected to the first block's width where they differ (OPT-350m)."""
    head_width: int
    """Columns of the head; the last block's output is projected to it where they differ."""
    blocks: tuple[BlockShape, ...]
    max_positions: int
    norm: NormKind
    norm_eps: float
    norm_width: int
    """Channels an RMS norm's mean divides by: the width before any slicing."""
    norm_affine: bool = True
    norm_first: bool = True
    """Norms before attention and MLP; False puts them after the residual sum (OPT-350m)."""
    final_norm: bool = True
    activation: Activation
    rope: Rope | None
    """None means learned positions."""
    position_offset: int = 0
    """Row of the learned positions that belongs to position 0 (2 in OPT)."""
    head_bias: bool = False
    input_projection: bool = False
    """Between embedding and first block, also where their widths are equal."""
    tie_head: bool
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    stored_dtype: str | None = field(default=None, compare=False)
    """What the config says the weights are stored in, for information."""

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Residual width at the first block."""
        return self.blocks[0].width_in

    @property
    def project_in(self) -> bool:
        return self.input_projection or self.embedding_width != self.blocks[0].width_in

    @property
    def project_out(self) -> bool:
        return self.head_width != self.blocks[-1].width_out

    @property
    def only_here(self) -> str | None:
        """What of it no other program knows, in words that follow "the model"; None where some could read it.
        """
        varied = next((b.attention for b in self.blocks if not b.attention.plain), None)
        if any(b.attention_shortcut for b in self.blocks):
            return "is sliced, with shortcuts around attention and MLP"
        return None if varied is None else f"has {varied}"

    @staticmethod
    def from_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelShape:
        """Read `config.json` (and `generation_config.json`, whose end tokens win, as in transformers).

        Raises AxiconError for an architecture without a weight map, an absurd number, and every switch that
        would change the model in a way this decoder does not compute.
        """
        architecture = config.get("model_type")
        build = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
        if build is None:
            raise refuse_architecture(architecture, list(ARCHITECTURES))
        shape = build(Reader(config, generation or {}))
        shape = variant.read(shape, config[variant.KEY]) if variant.KEY in config else shape
        return slicing.read(shape, config[slicing.KEY]) if slicing.KEY in config else shape


def _opt(c: Reader) -> ModelShape:
    """OPT (arXiv:2205.01068), as in transformers' `OPTConfig`."""
    width, heads = c.size("hidden_size", 768), c.size("num_attention_heads", 12)
    head_width = _multiple("hidden_size", width, "num_attention_heads", heads)
    bias = c.flag("enable_bias", True)
    norm_first = c.flag("do_layer_norm_before", True)
    embedding = c.size("word_embed_proj_dim", width)
    block = BlockShape(
        width_in=width, width_middle=width, width_out=width,
        heads=heads, kv_heads=heads, head_width=head_width,
        hidden=c.size("ffn_dim", 3072), scale=head_width**-0.5, gated=False,
        qkv_bias=bias, out_bias=bias, mlp_bias=bias,
    )
    shape = ModelShape(
        family="opt", architecture="opt", vocab=c.size("vocab_size", 50272), embedding_width=embedding,
        head_width=embedding, blocks=(block,) * c.size("num_hidden_layers", 12, MOST_LAYERS),
        max_positions=c.size("max_position_embeddings", 2048), norm="layer", norm_eps=1e-5, norm_width=width,
        norm_affine=c.flag("layer_norm_elementwise_affine", True), norm_first=norm_first,
        final_norm=norm_first and not c.flag("_remove_final_layer_norm", False),
        activation=c.activation("activation_function", "relu"), rope=None, position_offset=2,
        tie_head=c.flag("tie_word_embeddings", True), bos_id=c.token("bos_token_id", 2),
        eos_ids=c.end_tokens(2), stored_dtype=c.stored_dtype(),
    )
    c.finish(ignored=("dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std"))
    return shape


def _multiple(name: str, whole: int, part_name: str, part: int) -> int:
    if whole % part:
        raise AxiconError(f"config.json: {name} {whole} is not a multiple of {part_name} {part}")
    return whole // part


def _gpt_neox(c: Reader) -> ModelShape:
    """GPT-NeoX and Pythia (arXiv:2204.06745), as in transformers' `GPTNeoXConfig`."""
    width, heads = c.size("hidden_size", 6144), c.size("num_attention_heads", 64)
    head_width = _multiple("hidden_size", width, "num_attention_heads", heads)
    positions, bias = c.size("max_position_embeddings", 2048), c.flag("attention_bias", True)
    block = BlockShape(
        width_in=width, width_middle=width, width_out=width,
        heads=heads, kv_heads=heads, head_width=head_width,
        hidden=c.size("intermediate_size", 24576), scale=head_width**-0.5, gated=False,
        qkv_bias=bias, out_bias=bias, mlp_bias=True, parallel=c.flag("use_parallel_residual", True),
    )
    shape = ModelShape(
        family="gpt_neox", architecture="gpt_neox", vocab=c.size("vocab_size", 50432), embedding_width=width,
        head_width=width, blocks=(block,) * c.size("num_hidden_layers", 44, MOST_LAYERS),
        max_positions=positions, norm="layer", norm_eps=c.number("layer_norm_eps", 1e-5), norm_width=width,
        activation=c.activation("hidden_act", "gelu"), rope=Rope(**c.partial_rope(positions, head_width)),
        tie_head=c.flag("tie_word_embeddings", False), bos_id=c.token("bos_token_id", 0),
        eos_ids=c.end_tokens(2), stored_dtype=c.stored_dtype(),
    )
    c.finish(ignored=("initializer_range", "attention_dropout", "hidden_dropout", "classifier_dropout"))
    return shape


@dataclass(frozen=True, slots=True)
class _Llama:
    """What distinguishes the members of the LLaMA family, with the defaults of their transformers configs."""

    vocab: int
    width: int
    hidden: int
    kv_heads: int | None
    positions: int
    eps: float = 1e-6
    head_width: int | None = None
    bos: int | None = 1
    eos: int | None = 2
    qkv_bias: bool | None = None
    """None reads `attention_bias`."""
    out_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    window_switch: bool = False
    """Windows follow `use_sliding_window`, `max_window_layers` and `layer_types` (Qwen)."""
    window: int | None = None

    def __call__(self, c: Reader) -> ModelShape:
        width, heads = c.size("hidden_size", self.width), c.size("num_attention_heads", 32)
        head_width = c.optional_size("head_dim", self.head_width)
        if head_width is None:
            head_width = _multiple("hidden_size", width, "num_attention_heads", heads)
        kv_heads = c.optional_size("num_key_value_heads", self.kv_heads) or heads
        _multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        if head_width % 2:
            raise AxiconError(f"config.json: head_dim {head_width} is odd, rotary positions need pairs")
        positions = c.size("max_position_embeddings", self.positions)
        layers = c.size("num_hidden_layers", 32, MOST_LAYERS)
        attention_bias = c.flag("attention_bias", False)
        mlp_bias = c.flag("mlp_bias", False)
        blocks = tuple(
            BlockShape(
                width_in=width, width_middle=width, width_out=width, heads=heads, kv_heads=kv_heads,
                head_width=head_width, scale=head_width**-0.5,
                hidden=c.size("intermediate_size", self.hidden),
                qkv_bias=attention_bias if self.qkv_bias is None else self.qkv_bias,
                out_bias=attention_bias if self.out_bias is None else self.out_bias,
                mlp_bias=mlp_bias if self.mlp_bias is None else self.mlp_bias,
                qk_norm=self.qk_norm, window=window,
            )
            for window in c.windows(layers, positions, default=self.window, switch=self.window_switch)
        )
        shape = ModelShape(
            family="llama", architecture=str(c.config["model_type"]), vocab=c.size("vocab_size", self.vocab),
            embedding_width=width, head_width=width, blocks=blocks, max_positions=positions, norm="rms",
            norm_eps=c.number("rms_norm_eps", self.eps), norm_width=width,
            activation=c.activation("hidden_act", "silu"), rope=Rope(**c.rope(positions)),
            tie_head=c.flag("tie_word_embeddings", False), bos_id=c.token("bos_token_id", self.bos),
            eos_ids=c.end_tokens(self.eos), stored_dtype=c.stored_dtype(),
        )
        c.finish(ignored=("initializer_range", "attention_dropout", "pretraining_tp", "is_llama_config"))
        return shape


ARCHITECTURES: dict[str, Callable[[Reader], ModelShape]] = {
    "opt": _opt,
    "llama": _Llama(32000, 4096, 11008, None, 2048, mlp_bias=None),
    "mistral": _Llama(32000, 4096, 14336, 8, 131072, qkv_bias=False, out_bias=False, window=4096),
    "qwen2": _Llama(151936, 4096, 22016, 32, 32768, bos=None, eos=None, qkv_bias=True, out_bias=False,
                    window_switch=True, window=4096),
    "qwen3": _Llama(151936, 4096, 22016, 32, 32768, head_width=128, bos=None, eos=None, qk_norm=True,
                    window_switch=True, window=4096),
    "gpt_neox": _gpt_neox,
}
"""Architectures with a weight map, by `model_type`."""
