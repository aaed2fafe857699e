"""SliceGPT: the residual stream in its principal components, without the weakest; narrower dense products.

Ashkboos et al., arXiv:2401.15024, sections 3 and 4, and the released code. Norms become RMS norms without
weights, whose scales and shifts go into the products behind them. Where a stream is read or written, its
basis Q is multiplied into the product and cut to the kept width; where two bases meet, a shortcut Q'^T Q goes
around attention and MLP. Each Q is fitted to what the already sliced part makes of the sample, in float64.

Differs from the code: embeddings lose their mean for layer norms only; the norm's epsilon is the model's; the
last block hands on the full width in the original basis, so nothing is rotated into the head, and its norm
keeps its scale; a head that is tied to the embedding may stay tied, with a projection behind the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from axicon.compress.calibration import Computed, observe, sequences, through
from axicon.errors import AxiconError
from axicon.model import slicing
from axicon.model.decoder import Block, Decoder, Norm
from axicon.model.masks import kept
from axicon.model.packed import PackedLinear
from axicon.model.shape import ModelShape

PRODUCTS = ("qkv", "out", "gate_up", "up", "down")
DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class SliceGPT:
    stage: ClassVar[str] = "slice"
    fraction: float = 0.25
    """Of the channels of the residual stream, how much goes."""
    round_to: int = 16
    """The kept width is rounded down to a multiple of it: 8 in the code, 16 for the C++ kernels."""
    tie: Literal["reject", "project", "untie"] = "reject"
    """What becomes of a head that is the embedding: project keeps it so, untie stores a second matrix."""
    orientation: Literal["pca", "random"] = "pca"
    """random: the kept components are mixed among themselves, which changes nothing but how even they are."""
    seed: int = 0
    """Of the random orientation."""
    max_size_ratio: float = 1.0
    """Refuse to make a model of more than so many times the weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise AxiconError(
                f"slice_gpt: fraction={self.fraction:g}: the share of channels that goes, from 0 to below 1"
            )
        if self.round_to < 1 or not self.max_size_ratio > 0:
            raise AxiconError(
                f"slice_gpt: round_to={self.round_to}, max_size_ratio={self.max_size_ratio}: "
                "must be at least 1 and more than 0"
            )
        object.__setattr__(self, "_state", {})

    @property
    def needs_inputs(self) -> bool:
        return True

    @property
    def state(self) -> dict[str, Any]:
        """What is known on the way: `layers`, `embedding` (the part that holds it), `basis` (D, kept)."""
        found: dict[str, Any] = self.__dict__["_state"]
        return found

    def reshaped(self, shape: ModelShape) -> ModelShape:
        """Raises AxiconError for a model that cannot be sliced, or that would grow."""
        if (reason := slicing.why_not(shape)) is not None:
            raise AxiconError(f"slice_gpt: the model {reason}; choose another method")
        if shape.tie_head and self.tie == "reject":
            raise AxiconError(
                "slice_gpt: the head is the embedding's matrix: choose tie=project, which keeps it so behind "
                "a projection, or tie=untie, which stores it twice"
            )
        projected = shape.tie_head and self.tie == "project"
        made = slicing.sliced(shape, self.width(shape.width), projected=projected)
        ratio = parameters(made) / parameters(shape)
        if ratio > self.max_size_ratio:
            raise AxiconError(
                f"slice_gpt: with fraction={self.fraction:g} the model has {ratio:.3f} times the weights, as "
                f"shortcuts cost more than goes; take a larger fraction, or allow max_size_ratio={ratio:.2f}"
            )
        return made

    def width(self, whole: int) -> int:
        """Channels that are kept of so many."""
        kept_ = int((1 - self.fraction) * whole) // self.round_to * self.round_to
        if kept_ < 1:
            raise AxiconError(
                f"slice_gpt: of {whole} channels fraction={self.fraction:g} leaves less than "
                f"round_to={self.round_to}"
            )
        return kept_

    def carried(self) -> dict[str, Tensor]:
        return {"basis": self.state["basis"], "layers": torch.tensor(self.state["layers"])}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        self.state.update(basis=tensors["basis"].clone(), layers=int(tensors["layers"]))

    def begin(self, model: Decoder) -> None:
        self.state.clear()
        self.state.update(layers=model.shape.layers, embedding=model)

    def block(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for name in PRODUCTS:
            module = getattr(block, name, None)
            if isinstance(module, PackedLinear) or (module is not None and kept(module) is not None):
                raise AxiconError(
                    f"slice_gpt: blocks.{block.index}.{name} is packed or pruned, which slicing would undo; "
                    "slice the dense model first"
                )
        inputs = self.entered(block, inputs)
        basis, width = self.state["basis"], self.state["basis"].shape[1]
        whole = len(basis)
        layered = block.attention_norm.kind == "layer"
        reads = ("qkv", "gate_up" if block.gated else "up")
        _fuse(block, "attention_norm", reads[0], basis)
        if layered:
            _centre(block.out)
        block.attention_shortcut = _linear(basis, None, block.out.weight.dtype)
        middle = self._basis(block, inputs, "mlp_norm", width)
        block.attention_shortcut = _linear(middle.T @ basis, None, block.out.weight.dtype)
        _write(block.out, middle)
        _fuse(block, "mlp_norm", reads[1], middle)
        if layered:
            _centre(block.down)
        block.mlp_shortcut = _linear(middle, None, block.down.weight.dtype)
        last = block.index + 1 == self.state.get("layers")
        if not last:
            after = self._basis(block, inputs, None, width)
            block.mlp_shortcut = _linear(after.T @ middle, None, block.down.weight.dtype)
            _write(block.down, after)
            self.state["basis"] = after
        if block.down.bias is None and getattr(block, reads[1]).bias is not None:
            block.down.bias = nn.Parameter(block.down.weight.new_zeros(block.down.out_features), False)
        block.shape = slicing.sliced_block(
            block.shape, width, whole if last else width, shifted=block.qkv.bias is not None
        )
        return through(block, inputs)

    def finish(self, model: Decoder) -> None:
        norm, head = model.final_norm, model.lm_head
        assert norm is not None
        if norm.bias is not None:
            shift_V = head.weight.double() @ norm.bias.double()
            bias_V = shift_V if head.bias is None else head.bias.double() + shift_V
            head.bias = nn.Parameter(bias_V.to(head.weight.dtype), requires_grad=False)
        model.final_norm = _rms(norm, norm.width, norm.width, norm.weight)

    def entered(self, block: Block, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The first block's inputs, from here on in a basis fitted to them. A trial on one block begins there
        too.
        """
        if "basis" in self.state:
            return inputs
        layered = block.attention_norm.kind == "layer"
        whole, first = block.shape.width_in, inputs[0]
        gram = _Gram(whole, layered)
        for x_BTD in inputs:
            gram.add(x_BTD)
        basis = self._oriented(gram.components(), self.width(whole), 0)
        self.state["basis"] = basis
        part: Decoder | None = self.state.pop("embedding", None)
        if part is not None:
            self._embed(part, _centred(basis) if layered else basis)
            if not torch.equal(inputs[0], first):
                return inputs  # they are what the embedding makes of the tokens, now in the new basis
        to_basis = (_centred(basis) if layered else basis).to(first.dtype)
        return Computed(lambda x_BTD: x_BTD @ to_basis, inputs)

    def _embed(self, part: Decoder, basis: Tensor) -> None:
        tokens = part.embed_tokens
        dtype = tokens.weight.dtype
        if part.shape.tie_head and self.tie == "project":
            part.project_in = _linear(basis.T, None, dtype)
        else:
            part.embed_tokens = _embedding(tokens, basis)
        if part.shape.rope is None:
            part.embed_positions = _embedding(part.embed_positions, basis)

    def _basis(self, block: Block, inputs: Sequence[Tensor], at: str | None, width: int) -> Tensor:
        """(D, width): of what the named norm of the block is given, or of what the block returns."""
        whole = block.down.out_features
        gram = _Gram(whole)
        if at is not None:
            observe(block, inputs, {at: gram.add})
        else:
            for x_BTD in inputs:
                gram.add(sequences(block, x_BTD))
        return self._oriented(gram.components(), width, 2 * block.index + (1 if at else 2))

    def _oriented(self, components: Tensor, width: int, number: int) -> Tensor:
        basis = components[:, :width]
        if self.orientation == "random":
            made = torch.Generator().manual_seed(self.seed * 100_003 + number)
            basis = basis @ torch.linalg.qr(torch.randn(width, width, generator=made, dtype=torch.float64)).Q
        return basis


class _Gram:
    """The sum of x^T x over rows of a signal in float64, and its eigenvectors, strongest first."""

    def __init__(self, width: int, centred: bool = False) -> None:
        self.sum_DD, self.centred = torch.zeros(width, width, dtype=torch.float64), centred

    def add(self, x_ND: Tensor) -> None:
        x_ND = x_ND.reshape(-1, x_ND.shape[-1]).double()
        if self.centred:
            x_ND = x_ND - x_ND.mean(-1, keepdim=True)
        self.sum_DD.addmm_(x_ND.T, x_ND)

    def components(self) -> Tensor:
        """(D, D), orthogonal. Damping moves no eigenvector."""
        if not self.sum_DD.isfinite().all():
            raise AxiconError("slice_gpt: the sample leads to NaN or infinite values; try dtype=float32")
        self.sum_DD.diagonal().add_(DAMPING * self.sum_DD.diagonal().mean())
        return torch.linalg.eigh(self.sum_DD).eigenvectors.flip(1)


def parameters(shape: ModelShape) -> int:
    """How many weights a model of this shape has."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(shape).parameters())


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=False)
    return made


def _embedding(old: nn.Embedding, basis: Tensor) -> nn.Embedding:
    weight = old.weight
    rows = [(part.double() @ basis).to(weight.dtype) for part in weight.split(4096)]
    made = nn.Embedding(len(weight), basis.shape[1], _weight=torch.cat(rows))
    return made.requires_grad_(False)


def _rms(old: Norm, width: int, divisor: int, scale: Tensor | None = None) -> Norm:
    """An RMS norm in the place of one over `divisor` channels."""
    made = Norm("rms", width, old.eps, divisor=divisor)
    dtype = torch.get_default_dtype() if old.weight is None else old.weight.dtype
    weight = torch.ones(width) if scale is None else scale.detach().clone()
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return made


def _fuse(block: Block, norm_name: str, product_name: str, basis: Tensor) -> None:
    """What a norm scales and shifts by into the product behind it, which then reads the basis."""
    norm: Norm = getattr(block, norm_name)
    product: nn.Linear = getattr(block, product_name)
    weight = product.weight.double()
    bias = None if product.bias is None else product.bias.double()
    if norm.bias is not None:
        shift = weight @ norm.bias.double()
        bias = shift if bias is None else bias + shift
    if norm.weight is not None:
        weight = weight * norm.weight.double()
    setattr(block, product_name, _linear(weight @ basis, bias, product.weight.dtype))
    setattr(block, norm_name, _rms(norm, basis.shape[1], len(basis)))


def _centre(product: nn.Linear) -> None:
    """What it writes into the stream has no mean: that a layer norm takes it out is no longer needed."""
    weight = product.weight.double()
    product.weight.copy_(weight - weight.mean(0))
    if product.bias is not None:
        product.bias.copy_(product.bias.double() - product.bias.double().mean())


def _centred(basis: Tensor) -> Tensor:
    """Of rows whose own mean is taken out first."""
    return basis - basis.mean(0)


def _write(product: nn.Linear, basis: Tensor) -> None:
    """The product then writes the basis."""
    weight = basis.T @ product.weight.double()
    product.weight = nn.Parameter(weight.to(product.weight.dtype), requires_grad=False)
    product.out_features = len(weight)
    if product.bias is not None:
        bias = basis.T @ product.bias.double()
        product.bias = nn.Parameter(bias.to(product.bias.dtype), requires_grad=False)
