"""Decoder: one block for the OPT (arXiv:2205.01068) and LLaMA (arXiv:2302.13971) families.

The decoder computes; it does not remember. Whoever calls `forward` passes `attend`, which owns cache and
mask, so the same blocks serve evaluation (whole sequences), serving (packed steps) and compression (block by
block).

Products that share an input are fused at load (`qkv`, `gate_up`): one call instead of three or two. The rows
of each part are `BlockShape.parts(...)`. Every product is a module called with (N, I), so another storage
format, an adapter or a gate replaces the attribute and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axicon.model.attention import HeadGate, dense_attention
from axicon.model.shape import BlockShape, ModelShape, NormKind, Rope

Attend = Callable[["Block", Tensor, Tensor, Tensor], Tensor]
"""(block, q (N, H, K), k (N, G, K), v (N, G, K)) -> (N, H, K). Queries and keys are already rotated."""

Rotary = tuple[Tensor, Tensor]
"""cos and sin (N, 1, K) of the rows of a step; sin has the sign of `rotate` in it."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Norm(nn.Module):
    """RMS norm (arXiv:1910.07467) or layer norm over the last dimension, in float32 inside the kernel.

    `divisor` is the number of channels an RMS norm averages over. It stays the original width when channels
    were deleted from the stream (SliceGPT, arXiv:2401.15024, section 3).
    """

    def __init__(
        self, kind: NormKind, width: int, eps: float, *, affine: bool = True, divisor: int | None = None
    ) -> None:
        super().__init__()
        divisor = divisor or width
        if kind == "layer" and divisor != width:
            raise ValueError(f"a layer norm over {width} channels cannot average over {divisor}")
        self.kind, self.width = kind, width
        # mean over `divisor` + eps = (mean over `width` + eps * divisor / width) * width / divisor
        self.eps, self.gain = eps * divisor / width, math.sqrt(divisor / width)
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)
        y = F.rms_norm(x, (self.width,), self.weight, self.eps)
        return y if self.gain == 1.0 else y * self.gain


def inverse_frequencies(rope: Rope, head_width: int) -> Tensor:
    """float32 (K / 2,), or half of the channels that rotate."""
    width = rope.width or head_width
    plain = 1.0 / (rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    longest = rope.original_positions / rope.low_freq_factor
    shortest = rope.original_positions / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    turns = rope.original_positions / wavelength
    mix = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - mix) * plain / rope.factor + mix * plain
    scaled = torch.where(wavelength > longest, plain / rope.factor, plain)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), smooth, scaled)


def rotary(positions_N: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotary:
    """Angles in float32, then the dtype of the stream, as transformers does."""
    angles = positions_N[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat([cos, cos], -1).to(dtype)[:, None],
        torch.cat([-sin, sin], -1).to(dtype)[:, None],
    )


def rotate(x_NHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotate pairs (i, i + K/2) by the row's angle: x * cos + swap_halves(x) * signed sin.

    Where the table is narrower than a head, the channels behind it stay as they are.
    """
    cos, sin = rotary
    width = cos.shape[-1]
    if width < x_NHK.shape[-1]:
        return torch.cat([rotate(x_NHK[..., :width], rotary), x_NHK[..., width:]], -1)
    return torch.addcmul(x_NHK * cos, x_NHK.roll(x_NHK.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    """One layer. What multiplies: `qkv`, `out`, `gate_up` or `up`, `down`, and shortcuts if there are any;
    `head_gate` opens and shuts its heads if they have gates.
    """

    def __init__(self, shape: ModelShape, index: int) -> None:
        super().__init__()
        s: BlockShape = shape.blocks[index]
        if s.parallel and (s.attention_shortcut or s.mlp_shortcut or not shape.norm_first):
            raise ValueError("a parallel block has its norms first and no shortcuts")
        self.shape, self.index, self.rope = s, index, shape.rope
        self.scale, self.window, self.variant = s.scale, s.window, s.attention
        self.norm_first, self.gated = shape.norm_first, s.gated
        self.activate = ACTIVATIONS[shape.activation]
        rows = (s.heads + 2 * s.kv_heads) * s.head_width
        self.qkv = nn.Linear(s.width_in, rows, bias=s.qkv_bias)
        self.out = nn.Linear(s.heads * s.head_width, s.width_middle, bias=s.out_bias)
        if s.gated:
            self.gate_up = nn.Linear(s.width_middle, 2 * s.hidden, bias=s.mlp_bias)
        else:
            self.up = nn.Linear(s.width_middle, s.hidden, bias=s.mlp_bias)
        self.down = nn.Linear(s.hidden, s.width_out, bias=s.mlp_bias)
        self.q_norm = Norm("rms", s.head_width, shape.norm_eps) if s.qk_norm else None
        self.k_norm = Norm("rms", s.head_width, shape.norm_eps) if s.qk_norm else None
        self.attention_norm = _norm(shape, s.width_in if shape.norm_first else s.width_middle)
        self.mlp_norm = _norm(shape, s.width_middle if shape.norm_first else s.width_out)
        self.attention_shortcut = (
            nn.Linear(s.width_in, s.width_middle, bias=False) if s.attention_shortcut else None)
        self.mlp_shortcut = nn.Linear(s.width_middle, s.width_out, bias=False) if s.mlp_shortcut else None
        self.head_gate = HeadGate(s.attention, s.width_in, s.heads) if s.attention.gated else None
        self.prefix: nn.ParameterList | None = None
        """Keys and values (P, G, K) that every token sees, made by an adapter; in whole sequences only."""

    def forward(self, x_ND: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        """Residual stream in (N, width_in) and out (N, width_out)."""
        if self.shape.parallel:
            beside = self.mlp(self.mlp_norm(x_ND))
            return x_ND + (beside + self.attention(self.attention_norm(x_ND), rotary, attend))
        residual = x_ND if self.attention_shortcut is None else self.attention_shortcut(x_ND)
        if self.norm_first:
            x = residual + self.attention(self.attention_norm(x_ND), rotary, attend)
        else:
            x = self.attention_norm(residual + self.attention(x_ND, rotary, attend))
        residual = x if self.mlp_shortcut is None else self.mlp_shortcut(x)
        if self.norm_first:
            return residual + self.mlp(self.mlp_norm(x))
        return cast(Tensor, self.mlp_norm(residual + self.mlp(x)))

    def attention(self, x_ND: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        # Queries and keys are neighbours in `qkv`, so one rotation serves both.
        qkv = self.qkv(x_ND).view(len(x_ND), heads + 2 * kv_heads, self.shape.head_width)
        qk, v_NGK = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])], dim=1)
        if rotary is not None:
            qk = rotate(qk, rotary)
        o_NHK = attend(self, qk[:, :heads], qk[:, heads:], v_NGK)
        if self.head_gate is not None:
            o_NHK = o_NHK * self.head_gate(x_ND)[..., None]
        return cast(Tensor, self.out(o_NHK.reshape(len(x_ND), heads * self.shape.head_width)))

    def mlp(self, x_ND: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.gate_up(x_ND).chunk(2, -1)
            return cast(Tensor, self.down(self.activate(gate) * up))
        return cast(Tensor, self.down(self.activate(self.up(x_ND))))


def _norm(shape: ModelShape, width: int) -> Norm:
    divisor = shape.norm_width if shape.norm == "rms" else None
    return Norm(shape.norm, width, shape.norm_eps, affine=shape.norm_affine, divisor=divisor)


class Decoder(nn.Module):
    """Blocks `first` .. `last - 1` of a model; the embedding where it begins, norm and head where it ends.

    Weights are random after construction; `axicon.model.checkpoint.load` fills them. With a tied head and
    both ends present, `lm_head.weight` is `embed_tokens.weight`, one parameter.
    """

    def __init__(self, shape: ModelShape, blocks: range | None = None) -> None:
        super().__init__()
        blocks = range(shape.layers) if blocks is None else blocks
        if not (blocks.step == 1 and 0 <= blocks.start < blocks.stop <= shape.layers):
            raise ValueError(f"{blocks} is not a range of the model's {shape.layers} blocks")
        self.shape, self.first, self.last = shape, blocks.start, blocks.stop
        self.has_embedding, self.has_head = self.first == 0, self.last == shape.layers
        if self.has_embedding:
            self.embed_tokens = nn.Embedding(shape.vocab, shape.embedding_width)
            if shape.rope is None:
                self.embed_positions = nn.Embedding(shape.max_positions + shape.position_offset, shape.width)
            self.project_in = (
                nn.Linear(shape.embedding_width, shape.width, bias=False) if shape.project_in else None)
        self.blocks = nn.ModuleList([Block(shape, i) for i in blocks])
        if self.has_head:
            width = shape.blocks[-1].width_out
            self.final_norm = _norm(shape, width) if shape.final_norm else None
            self.project_out = nn.Linear(width, shape.head_width, bias=False) if shape.project_out else None
            self.lm_head = nn.Linear(shape.head_width, shape.vocab, bias=shape.head_bias)
            if shape.tie_head and self.has_embedding:
                self.lm_head.weight = self.embed_tokens.weight
        self.prompt: nn.Parameter | None = None
        """Embeddings (P, embedding_width) before those of the tokens, made by an adapter; in whole sequences
        only, at positions 0 .. P - 1."""
        self._frequencies: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream: that of the norms, which no storage format packs."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        """(N, width) at the first block. Positions are 0 .. max_positions - 1."""
        x = self.embed_tokens(tokens_N)
        if self.prompt is not None:
            last = len(self.prompt) - 1
            virtual_ND = self.prompt[positions_N.clamp(max=last)].to(x.dtype)
            x = torch.where((positions_N <= last)[:, None], virtual_ND, x)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.shape.rope is None:
            x = x + self.embed_positions(positions_N + self.shape.position_offset)
        return cast(Tensor, x)

    def rotary(self, positions_N: Tensor) -> Rotary | None:
        """cos and sin of each row, made once per step for all blocks; None with learned positions."""
        if self.shape.rope is None:
            return None
        if self._frequencies is None or self._frequencies.device != positions_N.device:
            # Made here and not at construction, which may be without memory.
            frequencies = inverse_frequencies(self.shape.rope, self.shape.blocks[0].head_width)
            self._frequencies = frequencies.to(positions_N.device)
        return rotary(positions_N, self._frequencies, self.dtype)

    def forward(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """Packed rows through the blocks, (N, width_out); no final norm.

        A stage without the embedding takes the hidden states (N, width_in) of the stage before it instead.
        """
        x_ND = self.embed(tokens_N, positions_N) if self.has_embedding else tokens_N
        rotary = self.rotary(positions_N)
        for block in self.blocks:
            x_ND = block(x_ND, rotary, attend)
        return x_ND

    def head(self, x_ND: Tensor) -> Tensor:
        """Final norm, output projection, head: float32 (N, V)."""
        if self.final_norm is not None:
            x_ND = self.final_norm(x_ND)
        if self.project_out is not None:
            x_ND = self.project_out(x_ND)
        return cast(Tensor, self.lm_head(x_ND).float())

    def states(self, tokens_BT: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """(B, T, width_out) of whole sequences, causal, no cache; `head` makes logits of any rows of it.

        Every row begins at position 0. There is no padding mask: pad on the right and drop what pads predict.
        With `lengths`, tokens from there on cost nothing and get zeros.
        """
        if self.prompt is not None:
            virtual = len(self.prompt)
            longer = None if lengths is None else [n + virtual for n in lengths]
            return self._states(F.pad(tokens_BT, (virtual, 0)), longer)[:, virtual:]
        return self._states(tokens_BT, lengths)

    def _states(self, tokens_BT: Tensor, lengths: Sequence[int] | None) -> Tensor:
        batch, length = tokens_BT.shape
        prefix = cast(Block, self.blocks[0]).prefix
        first = 0 if prefix is None else len(prefix[0])
        if first + length > self.shape.max_positions:
            raise ValueError(f"{first + length} tokens, the model knows {self.shape.max_positions} positions")
        positions_T = torch.arange(length, device=tokens_BT.device)
        if lengths is None or min(lengths) == length:
            x_ND = self(tokens_BT.reshape(-1), first + positions_T.repeat(batch), dense_attend(batch))
            return x_ND.view(batch, length, -1)
        real_BT = positions_T < torch.tensor(lengths, device=tokens_BT.device)[:, None]
        positions_N = first + positions_T.expand(batch, length)[real_BT]
        x_ND = self(tokens_BT[real_BT], positions_N, packed_attend(lengths))
        x_BTD = x_ND.new_zeros(batch, length, x_ND.shape[-1])
        return x_BTD.masked_scatter(real_BT[..., None], x_ND)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """float32 (B, T, V) of whole sequences, as `states`."""
        x_BTD = self.states(tokens_BT)
        return self.head(x_BTD.flatten(0, 1)).view(*tokens_BT.shape, -1)


def dense_attend(batch: int) -> Attend:
    """`attend` over B whole sequences of equal length that lie one after the other in the rows of a step."""

    def attend(block: Block, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        q, k, v = (x.view(batch, -1, *x.shape[1:]) for x in (q_NHK, k_NGK, v_NGK))
        return _prefixed(block, q, k, v).flatten(0, 1)

    return attend


def _prefixed(block: Block, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attention of whole sequences behind the block's prefix, if it has one."""
    if block.prefix is None:
        return dense_attention(
            q_BTHK, k_BTGK, v_BTGK, block.scale, block.window, variant=block.variant)
    lead = [x.to(k_BTGK.dtype).expand(len(q_BTHK), *x.shape) for x in block.prefix]
    k, v = (torch.cat(pair, dim=1) for pair in zip(lead, (k_BTGK, v_BTGK), strict=True))
    return dense_attention(
        q_BTHK, k, v, block.scale, block.window, before=len(block.prefix[0]), variant=block.variant)


def packed_attend(lengths: Sequence[int]) -> Attend:
    """`attend` over whole sequences of these lengths that lie one after the other in the rows of a step."""
    sizes = list(lengths)

    def attend(block: Block, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        parts = zip(*(torch.split(x[None], sizes, 1) for x in (q_NHK, k_NGK, v_NGK)), strict=True)
        return torch.cat([_prefixed(block, q, k, v)[0] for q, k, v in parts])

    return attend
