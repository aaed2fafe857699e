"""What trains of a model: all of it, its head, low-rank adapters beside its products, or what repairs it once
it is pruned (`axicon.model.perp`).

A scheme chooses parameters by `requires_grad`, and puts modules in place that have some. Adapters
(`axicon.model.lowrank`) are float32 whatever the model is, and the products beneath them may be packed: those
stay as they are, gradients included. What was pruned stays so under every scheme, by the masks of
`axicon.model.masks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from axicon.errors import AxiconError
from axicon.kernels.directions import uniforms
from axicon.model.decoder import Block, Decoder, dense_attend
from axicon.model.gates import join_gates
from axicon.model.lowrank import TARGETS, Key, LoraLinear, freeze, parts_of, products, untie
from axicon.model.packed import PackedLinear
from axicon.model.perp import MaskedLinear, Perp
from axicon.model.weights import BLOCK_NAMES, LAYERS


class Scheme(Protocol):
    def install(self, model: Decoder, key: Key) -> None:
        """Choose what trains, and put it there. Raises AxiconError where this model has no such thing."""
        ...

    def merge(self, model: Decoder) -> None:
        """Make what was trained a part of the model's own weights. Raises AxiconError where it cannot."""
        ...


@dataclass(frozen=True, kw_only=True)
class Full:
    """Everything trains, but what was pruned."""

    def install(self, model: Decoder, key: Key) -> None:
        packed = sorted({m.format for m in model.modules() if isinstance(m, PackedLinear)})
        if packed:
            raise AxiconError(
                f"scheme=full trains the weights themselves, which are stored as {', '.join(packed)} here; "
                "take scheme=lora, or the dense model this one was made from"
            )
        for p in model.parameters():
            p.requires_grad_(True)
        for block in model.blocks:
            MaskedLinear.install(block)

    def merge(self, model: Decoder) -> None:
        freeze(model)
        for block in model.blocks:
            MaskedLinear.merge(block)


@dataclass(frozen=True, kw_only=True)
class Gated(Full):
    """Everything trains, and gates that join the heads (`axicon.model.gates`)."""

    gate: Literal["linear", "mlp", "all_heads"] = "linear"
    spread: float = 0.001
    """Standard deviation of the gates' weights at first, the paper's for finetuning."""

    def __post_init__(self) -> None:
        if self.spread < 0:
            raise ValueError("spread must be at least 0")

    def install(self, model: Decoder, key: Key) -> None:
        join_gates(model, self.gate, self.spread, key("gates"))
        super().install(model, key)


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output matrix alone. One that is tied to the embedding becomes a matrix of its own."""

    def install(self, model: Decoder, key: Key) -> None:
        freeze(model)
        if not isinstance(model.lm_head, nn.Linear):
            raise AxiconError("scheme=head trains the head, which is packed here; take scheme=lora")
        untie(model)
        for p in model.lm_head.parameters():
            p.requires_grad_(True)

    def merge(self, model: Decoder) -> None:
        freeze(model)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: W + alpha / r B A (Hu et al., arXiv:2106.09685), with the paper's and PEFT's start:
    A uniform within 1 / sqrt(inputs), B zero.
    """

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    """Of q, k, v, out, gate, up, down."""

    def __post_init__(self) -> None:
        if self.r < 1 or not self.alpha > 0:
            raise ValueError("r and alpha must be more than 0")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(f"targets are some of {', '.join(TARGETS)}")

    def install(self, model: Decoder, key: Key) -> None:
        freeze(model)
        seed = key("adapters")
        found: set[str] = set()
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            for name, product in products(block):
                parts = {t: rows for t, rows in parts_of(block, name).items() if t in self.targets}
                if not parts:
                    continue
                found |= parts.keys()
                place = f"blocks.{model.first + i}.{name}"
                setattr(block, name, LoraLinear(product, parts, self.r, self.alpha, seed, place))
        if missing := sorted(set(self.targets) - found):
            raise AxiconError(f"scheme.targets: this model has no product {', '.join(missing)}")

    def merge(self, model: Decoder) -> None:
        for block in model.blocks:
            for name, product in list(products(block)):
                if isinstance(product, LoraLinear):
                    setattr(block, name, product.merged())


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values before those of the text, in every block (Li and Liang, arXiv:2101.00190), without the
    paper's reparametrisation. They begin as those of random tokens, as in MeZO (arXiv:2305.17333).
    """

    length: int = 5

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("length must be more than 0")

    @torch.no_grad()
    def install(self, model: Decoder, key: Key) -> None:
        freeze(model)
        tokens = _random_tokens(model, self.length, key("adapters"))
        attend, found = dense_attend(1), []

        def listen(block: Block, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            found.append((k_NGK.float(), v_NGK.float()))
            return attend(block, q_NHK, k_NGK, v_NGK)

        model(tokens, torch.arange(self.length, device=model.device), listen)
        for block, pair in zip(model.blocks, found, strict=True):
            block.prefix = nn.ParameterList([nn.Parameter(x.clone()) for x in pair])

    def merge(self, model: Decoder) -> None:
        raise AxiconError("a prefix is no weight of the model; take output=adapter")


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """Embeddings before those of the text (Lester et al., arXiv:2104.08691), which begin as those of random
    tokens.
    """

    length: int = 10

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("length must be more than 0")

    @torch.no_grad()
    def install(self, model: Decoder, key: Key) -> None:
        freeze(model)
        tokens = _random_tokens(model, self.length, key("adapters"))
        model.prompt = nn.Parameter(model.embed_tokens(tokens).float().clone())

    def merge(self, model: Decoder) -> None:
        raise AxiconError("a soft prompt is no weight of the model; take output=adapter")


def _random_tokens(model: Decoder, count: int, seed: int) -> Tensor:
    """int64 (count,)."""
    return (uniforms(seed, 0, 0, count) % model.shape.vocab).to(model.device)


def adapted(model: Decoder) -> Iterator[tuple[int, str, LoraLinear]]:
    """Every product with adapters: index of its block, name there, and it."""
    for i, block in enumerate(model.blocks):
        for name, product in products(block):
            if isinstance(product, LoraLinear):
                yield model.first + i, name, product


def peft_tensors(model: Decoder) -> dict[str, Tensor]:
    """What was put beside the model, by the names that the library PEFT gives it.

    Raises AxiconError for a family whose q, k and v are one product in other people's files.
    """
    if model.prompt is not None:
        return {"prompt_embeddings": model.prompt.detach()}
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    prefixes = [x.detach() for block in blocks if block.prefix is not None for x in block.prefix]
    if prefixes:  # (P, G, K) of keys and of values, block by block
        return {"prompt_embeddings": torch.stack(prefixes, dim=1).flatten(1)}
    found = {}
    for index, _, product in adapted(model):
        for part in product.parts:
            layer = f"{LAYERS[model.shape.family]}.{index}.{_peft_name(model, part)}"
            a, b = product.pair(part)
            found[f"base_model.model.{layer}.lora_A.weight"] = a.detach()
            found[f"base_model.model.{layer}.lora_B.weight"] = b.detach()
    return found


def peft_config(scheme: Lora | Prefix | SoftPrompt, model: Decoder, base: str) -> dict[str, Any]:
    """`adapter_config.json` of these adapters, as PEFT reads it."""
    about = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    if not isinstance(scheme, Lora):
        block, is_prefix = model.shape.blocks[0], isinstance(scheme, Prefix)
        return about | {
            "peft_type": "PREFIX_TUNING" if is_prefix else "PROMPT_TUNING",
            "num_virtual_tokens": scheme.length, "num_layers": model.shape.layers,
            "num_attention_heads": block.kv_heads if is_prefix else block.heads,
            "token_dim": block.kv_heads * block.head_width if is_prefix else model.shape.embedding_width,
            "num_transformer_submodules": 1,
        }  # fmt: skip
    return about | {
        "peft_type": "LORA", "r": scheme.r, "lora_alpha": scheme.alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({_peft_name(model, part).rpartition(".")[2] for part in scheme.targets}),
    }  # fmt: skip


def _peft_name(model: Decoder, part: str) -> str:
    names = BLOCK_NAMES[model.shape.family]
    if part not in names:
        raise AxiconError(
            f"adapters of {part} have no name of their own in a {model.shape.family} model, whose q, k and v "
            "are one product there; take output=merged"
        )
    return names[part]


SCHEMES: dict[str, type[Scheme]] = {
    "full": Full, "gated": Gated, "head": Head, "lora": Lora, "prefix": Prefix, "prompt": SoftPrompt,
    "perp": Perp,
}  # fmt: skip
